"""Positional encoding: rotary (arXiv:2104.09864), learned embeddings, or only the causal mask (arXiv:2305.19466).

Hardware: 2 CPU cores.
Time: about 3 minutes for the 9 runs of --seeds=3, a third of a minute each; 17 minutes in the table, beside other jobs.
Expected: rotary 2.436 bits per byte, no encoding +0.059, learned embeddings +0.093 (benchmarks/ablations/positions.md).
Command: python -m gpt4o_jax sweep --sweep=configs/ablations/positions.py --workdir=runs/ablations/positions
"""

from gpt4o_jax.config import base_config


def get_config():
    c = base_config()
    c.tokenizer.vocab_size = 1024
    c.model.update(n_layers=2, scan_unroll=2, d_model=64, n_heads=2, context_length=128)
    c.optimizer.update(name="muon", peak_lr=3e-3, schedule="wsd", decay_fraction=0.4, end_lr_fraction=0.0, warmup_steps=20)
    c.train.update(length="300 steps", batch_size=8)
    c.eval.update(every=100, max_tokens=10_000)
    c.sample.update(every=0, max_new_tokens=20)
    c.checkpoint.every = 0
    return c


def sweep():
    yield "rope", {}
    yield "learned", {"model.positions": "learned"}
    yield "none", {"model.positions": "none"}
