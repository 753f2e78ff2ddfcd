"""Muon on hidden matrices (kellerjordan.github.io/posts/muon) against AdamW, Lion, Adafactor and Schedule-Free AdamW.

Hardware: 2 CPU cores.
Time: 22 runs with --seeds=2, about half a minute each on an idle machine; 1.4 to 2 minutes beside other jobs.
Expected: with two seeds (benchmarks/ablations/optimizer.md) within noise of Muon's 2.426 bits per byte: AdamW at 3e-3 (2.441) and
    Schedule-Free AdamW at 9e-3 (2.402); Adafactor is at best 0.05 worse, Lion 0.14. At 9e-3, AdamW and Adafactor are unstable.
Command: python -m gpt4o_jax sweep --sweep=configs/ablations/optimizer.py --workdir=runs/ablations/optimizer --seeds=2
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
    yield "muon", {}
    for lr in (1e-3, 3e-3, 9e-3):
        yield f"adamw_{lr:g}", {"optimizer.name": "adamw", "optimizer.peak_lr": lr}
    for lr in (3e-4, 1e-3, 3e-3):
        yield f"lion_{lr:g}", {"optimizer.name": "lion", "optimizer.peak_lr": lr, "optimizer.b2": 0.99}  # as its paper has it
    for lr in (3e-3, 9e-3):
        yield f"adafactor_{lr:g}", {"optimizer.name": "adafactor", "optimizer.peak_lr": lr}
        # The average that it is evaluated at takes the place of the decay.
        scheduled = {"optimizer.schedule": "constant", "optimizer.peak_lr": lr}
        yield f"schedule_free_{lr:g}", {"optimizer.name": "schedule_free"} | scheduled
