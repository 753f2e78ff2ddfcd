"""The first run: a 4 M parameter decoder on Python's own documentation.

Hardware: 2 CPU cores.
Time: from a fresh clone to report.md on 2 shared cores: AMD EPYC 8.3 minutes, Intel Xeon 9.4, a CPU without AVX-512 16.4.
Expected: 1.54 bits per byte on held-out documents of CPython 3.11. Other versions of Python have a different text.
Command: bash launch/quickstart.sh
    or: python -m gpt4o_jax train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from gpt4o_jax.config import base_config


def get_config():
    c = base_config()
    c.model.n_layers = 4
    c.model.scan_unroll = 4
    c.model.d_model = 256
    c.model.n_heads = 2
    c.model.context_length = 256
    c.optimizer.name = "muon"
    c.optimizer.peak_lr = 3e-3
    c.optimizer.schedule = "wsd"
    c.optimizer.decay_fraction = 0.4
    c.optimizer.end_lr_fraction = 0.0
    c.optimizer.warmup_steps = 20
    c.train.length = "1000 steps"
    c.train.batch_size = 8
    c.eval.every = 250
    c.sample.every = 500
    c.sample.prompts = ("", "Return a ", "The following example shows how to ")
    c.checkpoint.every = 250
    return c
