"""Sums written for XLA:CPU equal the plain ones, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt4o_jax.model.layers import rms_normalise
from gpt4o_jax.ops import sums


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def same_gradients(f, reference, *args):
    """Values and gradients of a weighted sum of both, by max|a-b| <= 1e-5 max|a|."""
    weight = random(*reference(*args).shape, seed=9)
    for fn in (lambda g: g, jax.jit):
        got = fn(jax.value_and_grad(lambda *a: jnp.sum(f(*a) * weight), argnums=tuple(range(len(args)))))(*args)
        wanted = jax.value_and_grad(lambda *a: jnp.sum(reference(*a) * weight), argnums=tuple(range(len(args))))(*args)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(b))))


@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 5, 7)])
def test_bias_and_scale(shape):
    x = random(2, 3, 5, 7)
    x, p = x.reshape(-1, *shape[-2:]) if len(shape) < 3 else x, random(*shape, seed=1)
    same_gradients(sums.add_bias, lambda x, b: x + b, x, p)
    same_gradients(sums.multiply_scale, lambda x, s: x * s, x, p)


@pytest.mark.parametrize("axes", [-1, (-2, -1)])
def test_rms_normalise(axes):
    plain = lambda x: x / jnp.sqrt(jnp.mean(x * x, axis=axes, keepdims=True) + 1e-3)
    same_gradients(lambda x: rms_normalise(x, 1e-3, axes), plain, random(4, 6, 10))


def test_norms():
    tree = {"a": random(3, 40, 50), "b": random(70, seed=1), "c": random(seed=2)}
    np.testing.assert_allclose(sums.global_norm(tree), optax.tree.norm(tree), rtol=1e-6)
    np.testing.assert_allclose(sums.sum_of_squares(tree["a"], keep=1), jnp.sum(tree["a"] ** 2, axis=(1, 2)), rtol=1e-5)
