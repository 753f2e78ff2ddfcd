"""The activation of the feed-forward, at (almost) the same number of parameters, on the built-in corpus.

SwiGLU (arXiv:2002.05202) has three matrices instead of two, so its width is 8/3 D instead of 4 D, rounded to a multiple of 8.

Hardware: 2 CPU cores.
Time: about 6 minutes for the 8 runs of --seeds=2, less than a minute each.
Expected: SwiGLU 2.392 bits per byte, 0.037 better than squared ReLU (p = 0.04, two seeds); ReLU and GELU within noise of it
    (benchmarks/ablations/mlp.md).
Command: python -m gpt4o_jax sweep --sweep=configs/ablations/mlp.py --workdir=runs/ablations/mlp --seeds=2
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
    yield "relu2", {}
    yield "relu", {"model.mlp": "relu"}
    yield "gelu", {"model.mlp": "gelu"}
    yield "swiglu", {"model.mlp": "swiglu", "model.d_ff": 168}
