"""Rotary positions rotate each pair of a head's coordinates, so that scores depend only on distances."""

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
    # Angles up to 1000 radians have an error of up to 1000 * 2^-24 in float32.
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


# ---------------------------------------------------------------- stretched to longer contexts


def frequencies(width, theta, scaling=None):
    """Angles at position 1, and the scale of the pair (cosine, sine)."""
    cos, sin = (np.asarray(x, np.float64)[0, 0, 0] for x in ops.rotation(jnp.ones((1, 1), jnp.int32), width, theta, scaling))
    return np.arctan2(sin, cos), np.hypot(cos, sin)


# Inverse frequencies and attention factor computed by ROPE_INIT_FUNCTIONS of transformers 5.23; theta is 10,000.
PUBLISHED = [
    ("linear", ops.RopeScaling("linear", 4.0), 1.0,
     [0.25, 0.079056941, 0.0250000004, 0.00790569466, 0.00249999994, 0.000790569466, 0.000250000012, 7.90569466e-05]),
    ("yarn", ops.RopeScaling("yarn", 4.0, 64, 1.0, 32.0), 1.138629436111989,
     [1.0, 0.237170815, 0.049999997, 0.00790569466, 0.00249999994, 0.000790569466, 0.000250000012, 7.90569466e-05]),
    ("yarn, other ramp", ops.RopeScaling("yarn", 4.0, 4096, 2.0, 16.0), 1.138629436111989,
     [1.0, 0.316227764, 0.100000001, 0.0316227786, 0.00749999937, 0.00158113893, 0.000250000012, 7.90569466e-05]),
    ("llama3", ops.RopeScaling("llama3", 8.0, 512, 1.0, 4.0), 1.0,
     [1.0, 0.316227764, 0.100000001, 0.0184966773, 0.00124999997, 0.000395284733, 0.000125000006, 3.95284733e-05]),
    ("llama3, half of 16", ops.RopeScaling("llama3", 8.0, 8192, 1.0, 4.0), 1.0,
     [1.0, 0.100000001, 0.00999999978, 0.000213607578]),
]  # fmt: skip


@pytest.mark.parametrize("name, scaling, temperature, wanted", PUBLISHED, ids=[p[0] for p in PUBLISHED])
def test_scaled_frequencies_are_the_published_ones(name, scaling, temperature, wanted):
    got, radius = frequencies(2 * len(wanted), THETA, scaling)
    np.testing.assert_allclose(got, wanted, rtol=2e-6)
    np.testing.assert_allclose(radius, temperature, rtol=1e-6)


def test_ntk_keeps_the_shortest_wavelength_and_stretches_the_longest():
    plain, _ = frequencies(16, THETA)
    got, _ = frequencies(16, THETA, ops.RopeScaling("ntk", 8.0))
    base = THETA * 8.0 ** (16 / 14)  # as in the post that introduced it: base * factor^(H / (H - 2))
    np.testing.assert_allclose(got, base ** (-np.arange(8) / 8), rtol=2e-6)
    np.testing.assert_allclose([got[0], got[-1]], [plain[0], plain[-1] / 8], rtol=2e-6)


def formula(x, positions, R, theta):
    """RoFormer's rotation of the first R coordinates, pair by pair and in float64: (i, i + R/2) by position theta^(-2i/R)."""
    x = np.asarray(x, np.float64)
    y = x.copy()
    for b, t in np.ndindex(positions.shape):
        for i in range(R // 2):
            angle = int(positions[b, t]) * theta ** (-2 * i / R)
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            y[b, t][:, [i, i + R // 2]] = x[b, t][:, [i, i + R // 2]] @ turn.T
    return y


@pytest.mark.parametrize("factor", [None, 1.5, 8.0])
@pytest.mark.parametrize("R", [4, 6, 8])
def test_partial_and_ntk_rotation_are_the_formulas(R, factor):
    """Partial: as GPT-NeoX (arXiv:2204.06745, 2.1). NTK: theta times factor^(R / (R - 2)) (arXiv:2309.00071, definition 1)."""
    x = jax.random.normal(jax.random.key(3), (2, 5, 3, H))
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 30, 5, 63]])
    theta = THETA if factor is None else THETA * factor ** (R / (R - 2))
    scaling = None if factor is None else ops.RopeScaling("ntk", factor)
    got = ops.rotary(x, ops.rotation(jnp.asarray(positions), R, THETA, scaling))
    np.testing.assert_allclose(got, formula(x, positions, R, theta), atol=3e-5)


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "llama3"])
def test_a_factor_of_one_changes_nothing(kind):
    got, radius = frequencies(16, THETA, ops.RopeScaling(kind, 1.0, 64))
    np.testing.assert_allclose(got, frequencies(16, THETA)[0], rtol=1e-6)
    np.testing.assert_allclose(radius, 1)


def test_linear_scaling_is_division_of_positions():
    x, positions = vectors(6), 4 * jnp.arange(6)[None]
    stretched = ops.rotary(x, ops.rotation(positions, H, THETA, ops.RopeScaling("linear", 4.0)))
    np.testing.assert_allclose(stretched, rotary(x, positions // 4, THETA), atol=1e-6)


def test_partial_rotation_turns_the_first_coordinates_alone():
    x, positions = vectors(6), jnp.arange(6)[None]
    got = ops.rotary(x, ops.rotation(positions, 4, THETA))
    np.testing.assert_array_equal(got[..., :4], ops.rotary(x[..., :4], ops.rotation(positions, 4, THETA)))
    np.testing.assert_array_equal(got[..., 4:], x[..., 4:])


def test_angles_of_whole_rows_are_those_of_their_positions():
    """Computed once for all positions and looked up: the same bits."""
    positions = jnp.asarray(np.random.default_rng(0).integers(0, 8, (3, 8)))
    scaling = ops.RopeScaling("yarn", 4.0, 8)
    for got, wanted in zip(ops.rotation(positions, 6, 1e4, scaling, 8), ops.rotation(positions, 6, 1e4, scaling), strict=True):
        np.testing.assert_array_equal(got, wanted)
