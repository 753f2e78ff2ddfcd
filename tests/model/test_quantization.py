"""A model prepared for generation computes what it did before, to the precision of its weights."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax.commands import ready_flags
from gpt4o_jax.config import ModelConfig
from gpt4o_jax.model import gpt
from gpt4o_jax.model.cache import KINDS, empty_cache
from gpt4o_jax.model.quantization import WEIGHTS, for_generation
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.weights import Weight, dense

T = 10
TOKENS = np.random.default_rng(0).integers(0, 40, (2, T)).astype(np.int32)
INDEX = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))
ONES = np.ones_like(TOKENS)
BASE = ModelConfig(vocab_size=40, context_length=T, n_layers=3, d_model=32, n_heads=4, output_init="scaled", init_std=0.1)
VARIANTS = [
    dict(),
    dict(tied=True, mlp="swiglu", n_kv_heads=2, bias=True),
    dict(layer_pattern=("local", "global"), window=3, tied=True),
    dict(layer_pattern=("local", "global"), window=3, n_layers=4, value_embeddings=1, residual_mix=True),
    dict(n_layers=1),
    # All experts are chosen; otherwise rounding may reroute a token, which changes the result without bound.
    dict(n_layers=2, n_experts=2, moe_every=2, n_shared_experts=1, mlp="swiglu", router_bias=True),
    dict(n_layers=1, n_experts=2),
]


def plain(path, leaf):
    """A Weight as the array it represents."""
    if not isinstance(leaf, Weight):
        return leaf
    K = math.prod(leaf.summed)
    if leaf.values[0].ndim == 4:  # leads with axes of layers and experts
        return jax.vmap(jax.vmap(dense))(leaf)[..., : math.prod(leaf.outputs), :K].swapaxes(2, 3)
    if leaf.values[0].ndim == 3:  # leads with an axis of layers
        return jax.vmap(dense)(leaf)[:, :, :K].swapaxes(1, 2).reshape(1, *leaf.summed, *leaf.outputs)
    return dense(leaf)[:, :K] if path[-1].key == "embedding" else dense(leaf)[:, :K].T


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_logits_are_those_of_the_rounded_weights(one_device, changes):
    c = dataclasses.replace(BASE, **changes)
    model = gpt.GPT(c, Compute("cpu", "float32"))
    params = jax.jit(functools.partial(gpt.init, model))(jax.random.key(0))

    def logits(model, params):
        hidden, _, _ = jax.jit(lambda p: model.apply({"params": p}, TOKENS, INDEX, ONES))(params)
        return np.asarray(gpt.unembed(model, params, hidden))

    exact, errors = logits(model, params), []
    for weights in WEIGHTS:
        model_, rounded = for_generation(model, params, weights)
        got = logits(model_, rounded)
        wanted = logits(model_, jax.tree_util.tree_map_with_path(plain, rounded, is_leaf=lambda x: isinstance(x, Weight)))
        np.testing.assert_allclose(got, wanted, atol=1e-5 * np.max(np.abs(exact)))
        errors.append(np.max(np.abs(got - exact)) / np.max(np.abs(exact)))
    assert errors[0] <= 1e-6 and errors == sorted(errors), errors
    assert errors[1] < 0.02 and errors[2] < 0.05


@pytest.mark.parametrize("rows", [1, 8])
def test_for_few_rows_or_many_bfloat16_computes_the_same(one_device, rows):
    """The same rounding of operands, sums in another order."""
    model = gpt.GPT(dataclasses.replace(BASE, n_layers=2, tied=True), Compute("cpu", "bfloat16"))
    params = jax.jit(functools.partial(gpt.init, model))(jax.random.key(0))

    def last(rows, tokens):
        ready, rounded = for_generation(model, params, "bfloat16", rows=rows)
        hidden, _, _ = ready.apply({"params": rounded}, tokens, INDEX[: len(tokens)], ONES[: len(tokens)])
        return np.asarray(gpt.unembed(ready, rounded, hidden))

    wanted = last(1, TOKENS)
    for n in (1, len(TOKENS)):
        np.testing.assert_allclose(last(rows, TOKENS[:n]), wanted[:n], atol=2e-2 * np.max(np.abs(wanted)))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_one_token_at_a_time_is_the_full_pass(one_device, weights):
    """Few rows are multiplied differently from many, with the same results."""
    c = dataclasses.replace(BASE, n_layers=2, tied=True, layer_pattern=("local", "global"), window=4, n_experts=4, moe_every=2)
    model = gpt.GPT(c, Compute("cpu", "float32"))
    params = jax.jit(functools.partial(gpt.init, model))(jax.random.key(0))
    model, params = for_generation(model, params, weights)
    apply = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs)[:2])
    full, _ = apply(TOKENS, INDEX, ONES)
    cache = empty_cache(model.config, 2, T)
    for at in range(T):
        one = np.s_[:, at : at + 1]
        hidden, cache = apply(TOKENS[one], INDEX[one], ONES[one], cache)
        np.testing.assert_allclose(hidden, full[one], atol=1e-5 * float(jnp.max(jnp.abs(full))))


def test_commands_name_what_there_is():
    assert ready_flags.WEIGHTS == WEIGHTS and ready_flags.KV_CACHE == KINDS
