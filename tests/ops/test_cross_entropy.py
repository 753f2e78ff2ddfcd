"""The chunked loss equals the plain one, in value and gradients, and never materialises the logits of a whole batch.

B batch, T positions, D model width, V vocabulary
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.cross_entropy import cross_entropy, token_scores

B, T, D, V = 3, 12, 8, 50
FLOAT32 = Compute("cpu", "float32")


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (B, T, D))
    unembed = jax.random.normal(keys[1], (D, V))
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    weights = jax.random.uniform(keys[3], (B, T)) * (jnp.arange(T) < jnp.array([[12], [7], [0]]))
    return hidden, unembed, targets, weights


def dense(hidden, unembed, targets, weights, softcap=0.0, z_loss=0.0):
    logits = hidden @ unembed
    logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
    normaliser = jnp.log(jnp.sum(jnp.exp(logits), axis=-1)) if z_loss else 0.0
    logprobs = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return jnp.sum((nll + z_loss * normaliser**2) * weights)


def close(got, wanted):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, atol=1e-5 * float(jnp.max(jnp.abs(wanted))), rtol=0)


@pytest.mark.parametrize(
    "chunk, softcap, z_loss",
    [(1, 0.0, 0.0), (4, 0.0, 0.0), (5, 0.0, 0.0), (12, 0.0, 0.0), (512, 0.0, 0.0), (5, 2.0, 0.0), (5, 0.0, 0.1), (4, 30.0, 1e-4)],
)
def test_equals_the_dense_loss_and_its_gradients(inputs, chunk, softcap, z_loss):
    """Whether or not the chunk divides T, or exceeds it; with a soft-cap, a z-loss, or both."""
    chunked = lambda h, u, y, w: 3.0 * cross_entropy(h, u, y, w, chunk, FLOAT32, softcap, z_loss).total
    reference = lambda *a: 3.0 * dense(*a, softcap, z_loss)
    loss, gradients = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1, 3)))(*inputs)
    wanted_loss, wanted_gradients = jax.value_and_grad(reference, argnums=(0, 1, 3))(*inputs)
    close(loss, wanted_loss)
    close(jax.jit(chunked)(*inputs), wanted_loss)  # without differentiation it takes a different path
    jax.tree.map(close, gradients, wanted_gradients)


def test_the_parts_of_the_loss_add_up_and_have_no_gradient(inputs):
    sums = jax.jit(lambda *a: cross_entropy(*a, 5, FLOAT32, 2.0, 0.1))(*inputs)
    close(sums.nll, dense(*inputs, 2.0))
    close(sums.z_loss, dense(*inputs, 2.0, 0.1) - dense(*inputs, 2.0))
    close(sums.total, sums.nll + sums.z_loss)
    differentiated, _ = jax.vjp(lambda *a: cross_entropy(*a, 5, FLOAT32, 2.0, 0.1), *inputs)  # the other path
    jax.tree.map(close, differentiated, sums)
    assert not np.any(jax.grad(lambda h: cross_entropy(h, *inputs[1:], 5, FLOAT32, 2.0, 0.1).nll)(inputs[0]))


def test_weightless_positions_cannot_matter(inputs):
    hidden, unembed, targets, weights = inputs
    other_targets = jnp.where(weights > 0, targets, (targets + 1) % V)
    other_hidden = jnp.where(weights[..., None] > 0, hidden, 100.0)
    f = jax.jit(jax.value_and_grad(lambda h, u, y: cross_entropy(h, u, y, weights, 5, FLOAT32).total, argnums=1))
    for a, b in zip(f(hidden, unembed, targets), f(other_hidden, unembed, other_targets), strict=True):
        np.testing.assert_array_equal(a, b)


def test_large_logits_stay_finite(inputs):
    hidden, unembed, targets, weights = inputs
    loss, gradient = jax.value_and_grad(lambda h: cross_entropy(h, unembed, targets, weights, 4, FLOAT32).total)(1e4 * hidden)
    close(loss, dense(1e4 * hidden, unembed, targets, weights))
    assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize("chunk", [1, 4, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_of_the_whole_batch_never_exist(inputs, chunk, dtype):
    """No value anywhere in the program, forward or backward, has the size of [B, T, V]."""
    compute = Compute("cpu", dtype)
    hidden, unembed, targets, weights = inputs
    loss = lambda h, u: cross_entropy(h, u, targets, weights, chunk, compute, 30.0, 1e-4).total
    for program in (loss, jax.value_and_grad(loss, argnums=(0, 1))):
        sizes = [v.aval.size for v in values(jax.make_jaxpr(program)(hidden, unembed).jaxpr)]
        assert B * chunk * V in sizes, "the logits of one chunk do exist"
        assert max(sizes) < B * T * V
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, unembed).compile()
    assert f"f32[{B},{T},{V}]" not in compiled.as_text()


def values(jaxpr):
    """Every value that a program computes, including those inside loops and calls."""
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from values(inner)


@pytest.mark.parametrize("chunk, softcap", [(4, 0.0), (5, 0.0), (512, 0.0), (5, 2.0)])
def test_token_scores_are_the_dense_ones(inputs, chunk, softcap):
    hidden, unembed, targets, _ = inputs
    logits = hidden @ unembed
    logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
    targets = targets.at[0].set(jnp.argmax(logits[0], axis=-1))
    nll, first = jax.jit(lambda h, u, y: token_scores(h, u, y, chunk, FLOAT32, softcap))(hidden, unembed, targets)
    close(nll, -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0])
    np.testing.assert_array_equal(first, jnp.argmax(logits, axis=-1) == targets)
    assert bool(first[0].all())
