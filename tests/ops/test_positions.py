"""Rotary positions: a rotation of each pair of a head's coordinates, so that scores see only distances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax.ops import positions as ops

H, THETA = 8, 10_000.0


def rotary(x, positions, theta):
    return ops.rotary(x, ops.rotation(positions, H, theta))


def vectors(T, seed=0):
    return jax.random.normal(jax.random.key(seed), (1, T, 2, H))


def test_equals_multiplication_by_complex_numbers():
    """The pair (i, i + H/2) as one complex number, times e^(i position theta^(-2i/H)); every row has its own positions."""
    x = jax.random.normal(jax.random.key(1), (2, 5, 3, H))
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 100, 5, 1000]])
    pairs = np.asarray(x[..., : H // 2], np.float64) + 1j * np.asarray(x[..., H // 2 :], np.float64)
    frequencies = THETA ** (-2 * np.arange(H // 2) / H)
    turned = pairs * np.exp(1j * positions[:, :, None, None] * frequencies)
    wanted = np.concatenate([turned.real, turned.imag], axis=-1)
    # Angles up to 1000 radians in float32 are known to 1000 * 2^-24.
    np.testing.assert_allclose(rotary(x, jnp.asarray(positions), THETA), wanted, atol=5e-4)
    np.testing.assert_allclose(rotary(x, jnp.asarray(positions % 8), THETA)[0], wanted[0], atol=2e-6)


def test_position_zero_changes_nothing():
    x = vectors(4)
    np.testing.assert_array_equal(rotary(x, jnp.zeros((1, 4), jnp.int32), THETA), x)


@pytest.mark.parametrize("theta", [100.0, 10_000.0, 500_000.0])
def test_norm_is_preserved(theta):
    x = vectors(64)
    turned = rotary(x, jnp.arange(64)[None], theta)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6)


def test_scores_depend_on_distance_only():
    """q at m and k at n give the same score as q at m + shift and k at n + shift."""
    q, k = vectors(12, 1), vectors(12, 2)
    positions = jnp.arange(12)[None]

    def scores(shift):
        turned = (rotary(x, positions + shift, THETA) for x in (q, k))
        return jnp.einsum("BTNH,BSNH->BNTS", *turned)

    for shift in (1, 17, 100):
        np.testing.assert_allclose(scores(shift), scores(0), atol=1e-4)
    assert float(jnp.max(jnp.abs(scores(0) - jnp.einsum("BTNH,BSNH->BNTS", q, k)))) > 0.1
