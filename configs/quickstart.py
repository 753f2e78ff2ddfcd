"""First light: a 4 M parameter decoder on Python's own documentation."""

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
    c.train.length = "800 steps"
    c.train.batch_size = 16
    c.eval.every = 200
    c.sample.every = 400
    c.checkpoint.every = 200
    return c
