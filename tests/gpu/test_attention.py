"""cuDNN attention matches the reference within bfloat16 rounding, forward and backward: packed, windowed, grouped heads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax.ops.attention import self_attention
from gpt4o_jax.ops.compute import Compute

pytestmark = pytest.mark.gpu

B, T, N = 2, 256, 4


@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize("K", [4, 2])
@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_equals_the_reference(packed, window, K, H):
    keys = jax.random.split(jax.random.key(0), 4)
    rounded = lambda key, heads: jax.random.normal(key, (B, T, heads, H), jnp.bfloat16).astype(jnp.float32)
    q, k, v, g = rounded(keys[0], N), rounded(keys[1], K), rounded(keys[2], K), rounded(keys[3], N)
    index = np.arange(T)
    segments = jnp.asarray(np.stack([1 + (index >= 100) + (index >= 101), 1 + (index >= 200)]), jnp.int32) if packed else None

    def with_gradients(name, compute):
        f = functools.partial(self_attention, name, compute)
        out, pull = jax.vjp(lambda q, k, v: f(q, k, v, segments, None, window=window), q, k, v)
        return out, pull(g)

    got = jax.jit(functools.partial(with_gradients, "cudnn", Compute("gpu", "bfloat16")))()
    wanted = jax.jit(functools.partial(with_gradients, "reference", Compute("gpu", "float32")))()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) < 2e-2
