"""Learning-rate schedules: the fraction of the peak at each step."""

import jax
import jax.numpy as jnp

from gpt4o_jax.config import OptimizerConfig


def schedule_factor(config: OptimizerConfig, total_steps: int, step: jax.Array) -> jax.Array:
    """Learning rate / peak at 0-based `step`. Float32.

    Linear warm-up (s + 1) / (warmup + 1), then: cosine to end_lr_fraction; wsd (warm-up, stable, decay; arXiv:2404.06395): flat,
    then linear to end_lr_fraction; inverse_sqrt: sqrt((warmup + 1) / (s + 1)) (arXiv:1706.03762, 5.3), whatever total_steps;
    constant: flat.
    """
    step = jnp.asarray(step, jnp.float32)
    warmup, end = config.warmup_steps, config.end_lr_fraction
    rise = (step + 1) / (warmup + 1)
    if config.schedule == "cosine":
        progress = jnp.clip((step - warmup) / max(total_steps - warmup, 1), 0, 1)
        after = end + (1 - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    elif config.schedule == "wsd":
        decay_steps = max(round(config.decay_fraction * total_steps), 1)
        left = jnp.clip((total_steps - step) / decay_steps, 0, 1)
        after = end + (1 - end) * left
    elif config.schedule == "inverse_sqrt":
        after = jax.lax.rsqrt(jnp.maximum(rise, 1.0))
    else:
        after = jnp.ones_like(step)
    return jnp.minimum(rise, after)  # `after` is 1 during warm-up, unless a decay begins in it
