"""The norm of each sub-layer: on its input, on its output before the addition (OLMo 2, arXiv:2501.00656), or on both (Gemma 2).

All three initialise output projections to small values; `pre_zero`, the default here, initialises them to zero, which works only
with a norm on the input.

Hardware: 2 CPU cores.
Time: about 4 minutes for the 8 runs of --seeds=2, half a minute each.
Expected: 2.43 to 2.46 bits per byte; with two seeds, no difference beyond noise
    (benchmarks/ablations/norm_placement.md).
Command: python -m gpt4o_jax sweep --sweep=configs/ablations/norm_placement.py --workdir=runs/ablations/norm_placement --seeds=2
"""

from gpt4o_jax.config import base_config


def get_config():
    c = base_config()
    c.tokenizer.vocab_size = 1024
    c.model.update(n_layers=2, scan_unroll=2, d_model=64, n_heads=2, context_length=128, output_init="scaled")
    c.optimizer.update(name="muon", peak_lr=3e-3, schedule="wsd", decay_fraction=0.4, end_lr_fraction=0.0, warmup_steps=20)
    c.train.update(length="300 steps", batch_size=8)
    c.eval.update(every=100, max_tokens=10_000)
    c.sample.update(every=0, max_new_tokens=20)
    c.checkpoint.every = 0
    return c


def sweep():
    yield "pre", {}
    yield "post", {"model.norm_position": "post"}
    yield "sandwich", {"model.norm_position": "sandwich"}
    yield "pre_zero", {"model.output_init": "zero"}
