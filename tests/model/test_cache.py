"""With a cache, however a text is split, the model computes what one full pass computes.

B batch, T positions
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import ModelConfig
from gpt4o_jax.model import gpt
from gpt4o_jax.model.cache import KINDS, empty_cache, grow
from gpt4o_jax.ops.compute import Compute
from tests.pairwise import pairwise

T = 12
LENGTHS = np.array([12, 7, 9])  # the rows are ragged
INDEX = np.broadcast_to(np.arange(T, dtype=np.int32), (3, T))
TOKENS = np.random.default_rng(0).integers(0, 40, (3, T)).astype(np.int32)
BASE = ModelConfig(
    vocab_size=40, context_length=T, n_layers=2, d_model=16, n_heads=4, mlp="gelu", norm="layer",
    output_init="scaled", init_std=0.3,
)  # fmt: skip
CROSS = dict(positions=["rope", "learned", "none"], n_kv_heads=[4, 2], qk_norm=[True, False], bias=[True, False])
VARIANTS = [
    *pairwise(CROSS),  # every combination: tests/system
    dict(rope_scaling="linear", rope_factor=4.0),
    dict(rope_scaling="ntk", rope_factor=4.0, head_dim=6),
    dict(rope_scaling="yarn", rope_factor=4.0, rope_original_context=8, rope_high=2.0),
    dict(rope_scaling="llama3", rope_factor=8.0, rope_original_context=16),
    dict(norm_position="post", norm="rms", qk_norm_over="projection", n_kv_heads=2, mlp="swiglu"),
    dict(norm_position="sandwich", norm="rms", norm_unit_offset=True, embed_scale=True, tied=True, mlp="geglu"),
    dict(layer_pattern=("local",), window=4),
    dict(layer_pattern=("local", "global"), window=4, n_layers=4, n_kv_heads=2, scan_unroll=2),
    dict(layer_pattern=("local", "local", "global"), window=3, n_layers=3, positions="learned"),
    dict(layer_pattern=("local", "local", "global"), window=3, n_layers=5, rope_local_theta=50.0),
    dict(n_experts=4, norm="rms", mlp="swiglu"),
    dict(n_experts=4, n_shared_experts=1, router_scores="sigmoid", router_bias=True, moe_every=2, n_layers=3, n_kv_heads=2),
    dict(attention_softcap=1.5, attention_scale=0.7),
    dict(attention_sinks=True, n_kv_heads=2, layer_pattern=("local", "global"), window=2),
    dict(residual_mix=True, value_embeddings=2, n_layers=4, n_kv_heads=2, layer_pattern=("local", "global"), window=4),
    dict(residual_mix=True, value_embeddings=1, n_layers=3, mtp_heads=2),
    dict(qkv_bias=True, mlp="gelu_tanh"),
    dict(rope_fraction=0.5, n_kv_heads=2),
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()))
def test_prefill_and_decode_equal_the_full_pass(one_device, changes):
    assert distance_from_the_full_pass(changes) <= 1e-5


def distance_from_the_full_pass(changes: dict) -> float:
    """The largest of max|a - b| / max|b| over all tokens, however many of them were prefilled."""
    c = dataclasses.replace(BASE, **changes)
    model = gpt.GPT(c, Compute("cpu", "float32"))
    params = jax.jit(functools.partial(gpt.init, model))(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1, params)  # zero biases and unit scales would hide mistakes
    apply = jax.jit(lambda p, *inputs: model.apply({"params": p}, *inputs)[:2])
    full, _ = apply(params, TOKENS, INDEX, (LENGTHS[:, None] > INDEX).astype(np.int32))

    def compare(hidden, positions_BT, valid_BT):
        for row, t in zip(*np.nonzero(valid_BT), strict=True):
            wanted = full[row, positions_BT[row, t]]
            distances.append(float(np.max(np.abs(hidden[row, t] - wanted)) / np.max(np.abs(wanted))))

    full, distances = jax.device_get(full), []
    for splits in ([1, 1, 1], [5, 2, 8], [11, 7, 9]):  # tokens of each row that are prefilled
        done = np.array(splits)
        valid = done[:, None] > INDEX
        hidden, cache = apply(params, TOKENS, INDEX, valid.astype(np.int32), empty_cache(c, 3, T))
        compare(jax.device_get(hidden), INDEX, valid)
        while np.any(done < LENGTHS):  # then one token at a time; a row at its end is padding
            valid = (done < LENGTHS)[:, None]
            at = np.minimum(done, T - 1)[:, None]
            tokens = np.take_along_axis(TOKENS, at, axis=1)
            hidden, cache = apply(params, tokens, at.astype(np.int32), valid.astype(np.int32), cache)
            compare(jax.device_get(hidden), at, valid)
            done = done + valid[:, 0]
    return max(distances)


def test_a_prompt_may_come_in_pieces(one_device):
    """Four tokens at a time, each piece with the cache of those before; padding writes nothing."""
    c = ModelConfig(vocab_size=40, context_length=T, n_layers=2, d_model=16, n_heads=2, output_init="scaled", init_std=0.3)
    model = gpt.GPT(c, Compute("cpu", "float32"))
    params = jax.jit(functools.partial(gpt.init, model))(jax.random.key(0))
    apply = jax.jit(lambda p, *inputs: model.apply({"params": p}, *inputs)[:2])
    valid = (LENGTHS[:, None] > INDEX).astype(np.int32)
    full, whole = apply(params, TOKENS, INDEX, valid, empty_cache(c, 3, T + 4))
    cache, pieces = empty_cache(c, 3, T + 4), []
    for begin in range(0, T, 4):
        part = np.s_[:, begin : begin + 4]
        hidden, cache = apply(params, TOKENS[part], INDEX[part], valid[part], cache)
        pieces.append(hidden)
    difference = np.abs(np.concatenate(pieces, axis=1) - full) * valid[..., None]
    assert np.max(difference) <= 1e-5 * np.max(np.abs(full))
    for slots, wanted in zip(jax.tree.leaves(cache), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(slots, wanted, atol=1e-5 * np.max(np.abs(wanted)))
        for row, length in enumerate(LENGTHS):
            assert not np.asarray(slots)[:, row, length:].any()


# Long enough for rings to wrap around several times: they have 16 slots; the global layer has one per token of the text.
LONG = 56
LOCAL = ModelConfig(
    vocab_size=40, context_length=64, n_layers=4, d_model=16, n_heads=4, n_kv_heads=2, layer_pattern=("local", "global"),
    window=5, output_init="scaled", init_std=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def long_text():
    """(apply, parameters, tokens [2, LONG], hidden states of one full pass) of LOCAL."""
    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        model = gpt.GPT(LOCAL, Compute("cpu", "float32"))
        params = jax.jit(functools.partial(gpt.init, model))(jax.random.key(0))
        apply = jax.jit(lambda p, *inputs: model.apply({"params": p}, *inputs)[:2])
        tokens = np.random.default_rng(1).integers(0, 40, (2, LONG)).astype(np.int32)
        full, _ = apply(params, tokens, np.tile(np.arange(LONG, dtype=np.int32), (2, 1)), np.ones_like(tokens))
        yield apply, params, tokens, jax.device_get(full)


def feed(long_text, cache, starts, length, until=LONG, wrong=0):
    """Feeds each row `length` tokens from `starts`, at most up to `until`. Returns (cache, largest relative error)."""
    apply, params, tokens, full = long_text
    at = np.asarray(starts)[:, None] + np.arange(length, dtype=np.int32)
    valid, seen = at < until, np.minimum(at, LONG - 1).astype(np.int32)
    given = (np.take_along_axis(tokens, seen, axis=1) + wrong) % 40
    hidden, cache = apply(params, given, seen, valid.astype(np.int32), cache)
    error = np.abs(hidden - np.take_along_axis(full, seen[..., None], axis=1)) * valid[..., None]
    return cache, np.max(error) / np.max(np.abs(full))


# What rounding costs with these random weights; float32 differs from the full pass only in the order of sums.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.01, "int8": 0.015}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece", [1, 9, 31, 40])
def test_a_ring_gives_what_the_whole_text_gives(one_device, long_text, kind, piece):
    """Prompts shorter and longer than the ring, ragged, then single tokens."""
    cache = empty_cache(LOCAL, 2, LONG, kind, spare=0)
    assert [slots.k_BKSH.shape[3] for slots in cache] == [16, LONG]
    cache, first = feed(long_text, cache, [0, 0], piece)
    cache, second = feed(long_text, cache, [piece, piece], 6, until=piece + 4)
    errors = [first, second]
    for at in range(piece + 4, LONG, 1 if piece > 30 else 5):
        cache, error = feed(long_text, cache, [at, at], 1 if piece > 30 else 5)
        errors.append(error)
    assert max(errors) <= TOLERANCE[kind]


def test_a_late_piece_longer_than_a_ring_may_end_in_padding(one_device, long_text):
    cache, _ = feed(long_text, empty_cache(LOCAL, 2, LONG, spare=0), [0, 0], 30)
    _, error = feed(long_text, cache, [30, 27], 31)
    assert error <= 1e-5


def test_the_newest_tokens_may_be_taken_back(one_device, long_text):
    """Up to the number of spare slots in a ring: what was written for them is never seen again."""
    spare = 11
    cache = empty_cache(LOCAL, 2, LONG, spare=spare)
    cache, _ = feed(long_text, cache, [0, 0], 20)
    for at in range(20, LONG - spare, 2):
        cache, _ = feed(long_text, cache, [at, at], spare, wrong=7)  # a draft, none of it accepted
        cache, error = feed(long_text, cache, [at, at], 2)
        assert error <= 1e-5


def test_a_cache_grows_between_calls(one_device, long_text):
    cache, at = empty_cache(LOCAL, 2, 8), 0
    for slots in (8, 24, LONG):
        cache = grow(LOCAL, cache, slots)
        assert [s.k_BKSH.shape[3] for s in cache] == [min(slots, 32), slots]  # a window of 5 with 16 spare slots
        while at < slots:
            cache, error = feed(long_text, cache, [at, at], 4)
            assert error <= 1e-5
            at += 4


def test_empty_cache_has_the_shape_of_the_key_value_heads():
    c = ModelConfig(vocab_size=40, n_layers=3, d_model=16, n_heads=4, n_kv_heads=2, head_dim=6)
    (slots,) = empty_cache(c, batch=5, slots=7)
    assert slots.k_BKSH.shape == slots.v_BKSH.shape == (3, 5, 2, 7, 6)
    assert slots.k_BKSH.dtype == jnp.float32
    (rounded,) = empty_cache(c, batch=5, slots=7, kind="int8")
    assert rounded.k_BKSH.dtype == jnp.int8 and rounded.k_scale_BKS.shape == (3, 5, 2, 7)
