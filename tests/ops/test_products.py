"""product() is einsum: in float32 without rounding, in bfloat16 with rounded operands and float32 sums, forward and backward.

These specs cover every product in the model.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.products import joint_product, product

SIZES = dict(B=2, T=6, D=16, N=4, K=2, H=8, F=24, V=40)
SPECS = ["BTD,DNH->BTNH", "BTD,DKH->BTKH", "BTNH,NHD->BTD", "BTD,DF->BTF", "BTF,FD->BTD", "BTD,DV->BTV"]


def operands(spec):
    a, b, out = spec.replace("->", ",").split(",")
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, [SIZES[i] for i in names]) for k, names in zip(keys, (a, b, out), strict=True)]


def rounded(x):
    return np.asarray(x.astype(jnp.bfloat16), np.float64)


def close(got, wanted, tolerance):
    assert got.dtype == jnp.float32 and got.shape == wanted.shape
    assert np.max(np.abs(np.asarray(got) - wanted)) <= tolerance * np.max(np.abs(wanted))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("spec", SPECS)
def test_bfloat16_rounds_operands_and_sums_in_float32(spec, platform):
    x, w, g = operands(spec)
    a, b, out = spec.replace("->", ",").split(",")
    compute = Compute(platform, "bfloat16")
    y, pullback = jax.jit(lambda x, w: jax.vjp(lambda x, w: product(spec, x, w, compute), x, w))(x, w)
    dx, dw = jax.jit(lambda f, g: f(g))(pullback, g)
    close(y, np.einsum(spec, rounded(x), rounded(w)), 1e-6)
    close(dx, np.einsum(f"{out},{b}->{a}", rounded(g), rounded(w)), 1e-6)
    close(dw, np.einsum(f"{a},{out}->{b}", rounded(x), rounded(g)), 1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_float32_rounds_nothing(spec):
    x, w, _ = operands(spec)
    exact = np.einsum(spec, np.asarray(x, np.float64), np.asarray(w, np.float64))
    close(product(spec, x, w, Compute("cpu", "float32")), exact, 1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_few_rows_on_a_cpu_are_multiplied_in_float32(spec):
    """There bfloat16 is slower, so nothing is rounded."""
    x, w, _ = operands(spec)
    for rows, operand in ((x[:1], lambda a: np.asarray(a, np.float64)), (x, rounded)):
        close(product(spec, rows, w, Compute("cpu", "bfloat16")), np.einsum(spec, operand(rows), operand(w)), 1e-6)


def test_bfloat16_sums_are_not_rounded():
    """1 + 2^-10 needs more bits than bfloat16 has: a sum kept in bfloat16 would lose the small part."""
    x, w = jnp.array([[[1.0, 2.0**-10]] * 8]), jnp.ones((2, 1))
    assert product("BTD,DV->BTV", x, w, Compute("cpu", "bfloat16"))[0, 0, 0] == 1 + 2.0**-10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_joint_product_equals_its_parts(platform, dtype):
    """Projections of one input, computed together: the same numbers and the same gradients."""
    compute = Compute(platform, dtype)
    specs = ["BTD,DNH->BTNH", "BTD,DKH->BTKH", "BTD,DKH->BTKH"]
    x = operands(specs[0])[0]
    ws, gs = zip(*[operands(spec)[1:] for spec in specs], strict=True)

    @functools.partial(jax.jit, static_argnums=0)
    def run(make):
        parts, pullback = jax.vjp(make, x, list(ws))
        return parts, pullback(list(gs))

    together = run(lambda x, ws: joint_product(specs, x, ws, compute))
    apart = run(lambda x, ws: [product(spec, x, w, compute) for spec, w in zip(specs, ws, strict=True)])
    jax.tree.map(lambda a, b: close(a, np.asarray(b), 1e-6), together, apart)
