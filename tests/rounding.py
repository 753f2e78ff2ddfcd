"""Starts that differ by a rounding: how far a step that jumps (a sign, a code of int8) leads then is a control for other sums."""

import jax
import numpy as np


def next_larger(params, seed: int):
    """`params` (float32 arrays of jax) in which half the numbers, by chance, are the next larger."""
    random = np.random.default_rng(seed)
    change = lambda x: np.where(random.random(x.shape) < 0.5, np.nextafter(x, np.float32(np.inf)), x)
    return jax.tree.map(lambda x: jax.device_put(change(jax.device_get(x)), x.sharding), params)
