"""Rounded weights multiply as the numbers they represent, which are the nearest ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.products import product
from gpt4o_jax.ops.weights import FORMATS, dense, rounded, rows

# Inputs that fill no lane, some lanes, one part and several parts.
SHAPES = [(16,), (100,), (4, 32), (768,), (1536,), (11, 128)]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("summed", SHAPES, ids=str)
def test_products_are_those_of_the_dense_matrix(format, summed):
    random = np.random.default_rng(0)
    w = random.normal(size=(*summed, 5, 3)).astype(np.float32)
    weight = rounded(jnp.asarray(w), len(summed), format)
    K = int(np.prod(summed))
    matrix = np.asarray(dense(weight), np.float64)
    assert not matrix[:, K:].any()
    step = {"bfloat16": 2**-8 * np.abs(w).reshape(K, -1).T, "int8": 1 / 254, "int4": 1 / 14}[format]
    limit = step if format == "bfloat16" else step * np.max(np.abs(w))
    assert np.all(np.abs(matrix[:, :K] - w.reshape(K, -1).T) <= limit * 1.001)
    letters = "DE"[: len(summed)]
    for batch in (1, 2, 20):
        x = random.normal(size=(batch, 1, *summed)).astype(np.float32)
        y = jax.jit(lambda x, w: product(f"BT{letters},{letters}NH->BTNH", x, w, Compute("cpu", "float32")))(x, weight)
        wanted = (x.reshape(batch, K) @ matrix[:, :K].T).reshape(batch, 1, 5, 3)
        np.testing.assert_allclose(y, wanted, atol=2e-6 * K**0.5 * np.max(np.abs(w)), rtol=1e-5)


@pytest.mark.parametrize("summed", SHAPES, ids=str)
def test_bfloat16_for_many_rows_is_the_same_matrix(summed):
    random = np.random.default_rng(0)
    w = jnp.asarray(random.normal(size=(*summed, 5)), jnp.float32)
    few, many = (rounded(w, len(summed), "bfloat16", rows) for rows in (1, 8))
    assert many.values[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(dense(few), dense(many).astype(jnp.float32))
    letters = "DE"[: len(summed)]
    for batch in (1, 8):
        x = jnp.asarray(random.normal(size=(batch, *summed)), jnp.bfloat16).astype(jnp.float32)
        multiply = jax.jit(lambda x, w: product(f"B{letters},{letters}N->BN", x, w, Compute("cpu", "bfloat16")))
        np.testing.assert_allclose(multiply(x, many), multiply(x, few), rtol=1e-5, atol=1e-5 * np.prod(summed) ** 0.5)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_an_embedding(format):
    table = np.random.default_rng(0).normal(size=(7, 20)).astype(np.float32)
    weight = rounded(jnp.asarray(table).T, 1, format)
    tokens = jnp.array([[3, 0], [6, 3]])
    np.testing.assert_array_equal(rows(weight, tokens), np.asarray(dense(weight))[np.asarray(tokens), :20])
