"""The products of a mixture of experts equal a loop over experts, forward and backward, in every implementation.

M tokens, E experts, k experts of a token, D model width, F hidden width of an expert
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.experts import SCORES, choose, experts, grouped_product
from gpt4o_jax.ops.weights import FORMATS, dense, rounded

M, E, K, D, F = 45, 5, 2, 12, 20


def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape) * 0.3


def close(got, wanted):
    assert np.max(np.abs(got - wanted)) <= 1e-5 * np.max(np.abs(wanted))


def loop(x_MD, chosen_Mk, gates_Mk, gate_EDF, up_EDF, down_EFD):
    """Every expert on every token, with weight 0 if not chosen."""
    y_MD = 0
    for e in range(E):
        hidden_MF = x_MD @ up_EDF[e]
        hidden_MF = jnp.tanh(hidden_MF) if gate_EDF is None else jnp.tanh(x_MD @ gate_EDF[e]) * hidden_MF
        weight_M = jnp.sum(jnp.where(chosen_Mk == e, gates_Mk, 0), axis=1)
        y_MD += weight_M[:, None] * (hidden_MF @ down_EFD[e])
    return y_MD


@pytest.mark.parametrize("platform", ["cpu", "gpu"])  # ragged_dot runs anywhere
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("load", ["even", "one expert", "none for the first and last"])
def test_equal_to_a_loop_over_experts(platform, gated, load):
    low, high = {"even": (0, E), "one expert": (2, 3), "none for the first and last": (1, E - 1)}[load]
    chosen = jax.random.randint(jax.random.key(0), (M, K), low, high)
    weights = normal(1, M, D), normal(2, M, K), normal(3, E, D, F) if gated else None, normal(4, E, D, F), normal(5, E, F, D)

    def value_and_gradients(f):
        loss = lambda x, gates, gate, up, down: jnp.sum(jnp.sin(f(x, chosen, gates, gate, up, down)))
        return f(weights[0], chosen, *weights[1:]), jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))(*weights)

    got = value_and_gradients(lambda *a: experts(*a, jnp.tanh, Compute(platform, "float32")))
    jax.tree.map(close, got, value_and_gradients(loop))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("rows", [1, 2, 300, 1100])
def test_groups_of_any_size(platform, rows):
    sizes = np.random.default_rng(rows).multinomial(rows, [0.6, 0.0, 0.3, 0.1])
    x, w = normal(0, rows, D), normal(1, 4, D, F)
    wanted = np.concatenate(
        [x[a:b] @ w[e] for e, (a, b) in enumerate(zip(np.cumsum(sizes) - sizes, np.cumsum(sizes), strict=True))]
    )
    close(jax.jit(grouped_product, static_argnums=0)(Compute(platform, "float32"), x, w, jnp.asarray(sizes, jnp.int32)), wanted)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("format", FORMATS)
def test_narrow_weights_multiply_as_what_they_stand_for(platform, rows, format):
    sizes = jnp.asarray(np.random.default_rng(rows).multinomial(rows, [0.6, 0.0, 0.3, 0.1]), jnp.int32)
    x, compute = normal(0, rows, D), Compute(platform, "float32")
    narrow = jax.vmap(lambda w: rounded(w, 1, format))(normal(1, 4, D, F))
    plain = jax.vmap(dense)(narrow)[:, :F, :D].swapaxes(1, 2)
    product = jax.jit(grouped_product, static_argnums=0)
    close(product(compute, x, narrow, sizes), product(compute, x, plain, sizes))


def test_bfloat16_rounds_operands_of_both_passes():
    sizes = jnp.array([4, 0, 3], jnp.int32)
    x, w, g = normal(0, 7, D), normal(1, 3, D, F), normal(2, 7, F)
    run = lambda compute, *a: jax.vjp(lambda x, w: grouped_product(compute, x, w, sizes), *a[:2])[1](a[2])
    rounded = [a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, w, g)]
    jax.tree.map(close, run(Compute("cpu", "bfloat16"), x, w, g), run(Compute("cpu", "float32"), *rounded))


# ---------------------------------------------------------------- the choice


def test_normalised_softmax_scores_are_a_softmax_over_the_chosen():
    """Mixtral takes the softmax after the choice; Qwen 3 takes it before and divides by the sum: the same numbers."""
    logits = normal(0, M, E)
    chosen, gates = choose(SCORES["softmax"](logits), K, normalise=True)
    top, index = jax.lax.top_k(logits, K)
    np.testing.assert_array_equal(chosen, index)
    close(gates, jax.nn.softmax(top, axis=-1))


@pytest.mark.parametrize("scores", SCORES)
def test_without_normalising_gates_are_the_scores(scores):
    s = np.asarray(SCORES[scores](normal(0, M, E)))
    chosen, gates = choose(s, K, normalise=False)
    np.testing.assert_array_equal(gates, np.sort(s, axis=1)[:, ::-1][:, :K])
    np.testing.assert_array_equal(chosen, np.argsort(-s, axis=1)[:, :K])


def test_the_bias_counts_in_the_choice_alone_and_has_no_gradient():
    s, bias = SCORES["sigmoid"](normal(0, M, E)), jnp.array([9.0, 0, 0, 0, 9.0])
    chosen, gates = choose(s, K, True, bias)
    assert set(np.unique(chosen)) == {0, 4}
    own = np.take_along_axis(np.asarray(s), np.asarray(chosen), axis=1)
    close(gates, own / own.sum(axis=1, keepdims=True))
    np.testing.assert_array_equal(jax.grad(lambda b: jnp.sum(choose(s, K, True, b)[1] ** 2))(bias), 0)
