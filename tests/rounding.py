"""Starts that differ by a rounding: how far a discontinuity (a sign, an int8 code) then leads is a control for reordered sums."""

import jax
import numpy as np


def next_larger(params, seed: int):
    """`params` (float32 JAX arrays) with a random half of the numbers replaced by the next larger float."""
    random = np.random.default_rng(seed)
    change = lambda x: np.where(random.random(x.shape) < 0.5, np.nextafter(x, np.float32(np.inf)), x)
    return jax.tree.map(lambda x: jax.device_put(change(jax.device_get(x)), x.sharding), params)
