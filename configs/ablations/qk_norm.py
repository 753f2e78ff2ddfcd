"""QK-norm per head (arXiv:2010.04245) or none, at the usual learning rates and at four times those rates.

Its claimed benefit is not a lower loss at a good learning rate, but stability at higher ones.

Hardware: 2 CPU cores.
Time: about 4 minutes for the 8 runs of --seeds=2, half a minute each.
Expected: no difference at the usual rates (2.429 bits per byte); at four times those, the loss is 0.036 worse than the
    baseline without it (p = 0.04), and unchanged with it (benchmarks/ablations/qk_norm.md; two seeds).
Command: python -m gpt4o_jax sweep --sweep=configs/ablations/qk_norm.py --workdir=runs/ablations/qk_norm --seeds=2
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
    yield "on", {}
    yield "off", {"model.qk_norm": False}
    for norm in ("on", "off"):
        yield f"{norm}_4x_lr", {"model.qk_norm": norm == "on", "optimizer.peak_lr": 12e-3, "optimizer.muon_lr": 0.08}
