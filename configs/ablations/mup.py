"""Does the best learning rate at width 32 transfer to width 128, without and with muP (arXiv:2203.03466, base width 32)?

Heads stay 16 wide, so the wider model has more of them. At the base width, both parametrisations are the same model.

Hardware: 2 CPU cores.
Time: about 22 minutes for the 36 runs of --seeds=3, measured beside other jobs.
Expected: at width 32 the best rate is 4e-3. At width 128 it is half that without muP (2.363 bits per byte at 2e-3, 2.447 at
    4e-3), and the same 4e-3 with muP (2.389, 0.03 worse than the best without). benchmarks/ablations/mup.md; three seeds.
Command: python -m gpt4o_jax sweep --sweep=configs/ablations/mup.py --workdir=runs/ablations/mup
"""

from gpt4o_jax.config import base_config

RATES = (1e-3, 2e-3, 4e-3, 8e-3)


def get_config():
    c = base_config()
    c.tokenizer.vocab_size = 1024
    c.model.update(n_layers=2, scan_unroll=2, d_model=32, n_heads=2, context_length=128)
    c.optimizer.update(name="adamw", peak_lr=RATES[0], schedule="wsd", decay_fraction=0.4, end_lr_fraction=0.0, warmup_steps=20)
    c.train.update(length="300 steps", batch_size=8)
    c.eval.update(every=100, max_tokens=10_000)
    c.sample.update(every=0, max_new_tokens=20)
    c.checkpoint.every = 0
    return c


def sweep():
    wide = {"model.d_model": 128, "model.n_heads": 8}
    for rule, knobs in (("32", {}), ("128", wide), ("128_mup", wide | {"model.mup_base_width": 32})):
        for lr in RATES:
            yield f"{rule}_lr{lr:g}", knobs | {"optimizer.peak_lr": lr}
