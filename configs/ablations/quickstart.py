"""What each ingredient of configs/quickstart.py is worth: its model at a quarter of its length, with one of them taken out.

Hardware: 2 CPU cores.
Time: 75 minutes for the 16 runs of --seeds=2 on a busy machine, by the table's own minutes.
Expected: 1.907 bits per byte, two seeds (benchmarks/ablations/quickstart.md). Without Muon +0.31, without RoPE +0.13, without
    QK-norm +0.03, without zero-initialised outputs +0.02, with a cosine instead of wsd +0.014; squared ReLU and RMSNorm gain
    nothing over GELU (-0.008) and LayerNorm (0.000) at this size.
Command: python -m gpt4o_jax sweep --sweep=configs/ablations/quickstart.py --workdir=runs/ablations/quickstart --seeds=2
"""

from gpt4o_jax.config import base_config


def get_config():
    c = base_config()
    c.model.update(n_layers=4, scan_unroll=4, d_model=256, n_heads=2, context_length=256)
    c.optimizer.update(name="muon", peak_lr=3e-3, schedule="wsd", decay_fraction=0.4, end_lr_fraction=0.0, warmup_steps=20)
    c.train.update(length="250 steps", batch_size=8)
    c.eval.update(every=0)
    c.sample.update(every=0)
    c.checkpoint.every = 0
    return c


def sweep():
    yield "quickstart", {}
    yield "adamw", {"optimizer.name": "adamw"}
    yield "cosine", {"optimizer.schedule": "cosine"}
    yield "gelu", {"model.mlp": "gelu"}
    yield "learned_positions", {"model.positions": "learned"}
    yield "layer_norm", {"model.norm": "layer"}
    yield "no_qk_norm", {"model.qk_norm": False}
    yield "scaled_init", {"model.output_init": "scaled"}
