"""What each ingredient of configs/quickstart.py contributes: the same model, trained a quarter as long, with one change.

Hardware: 2 CPU cores.
Time: 75 minutes for the 16 runs of --seeds=2, measured beside other jobs.
Expected: 1.907 bits per byte (benchmarks/ablations/quickstart.md). Learned positions instead of RoPE: +0.134; cosine instead of
    wsd: +0.014 (p < 0.03). Not significant with two seeds: AdamW at the same rate instead of Muon +0.31 (p = 0.06), no QK-norm
    +0.03, scaled instead of zero output initialisation +0.02, GELU -0.008, LayerNorm 0.000.
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
