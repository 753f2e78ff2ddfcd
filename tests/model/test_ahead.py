"""Multi-token prediction: heads wired as in DeepSeek-V3, causal, within documents, and without effect on the trunk.

B batch, T positions, D model width, n heads
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax.config import ModelConfig
from gpt4o_jax.data.batches import make_batch
from gpt4o_jax.model import gpt
from gpt4o_jax.model.block import Block, Shared
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.positions import rotation
from gpt4o_jax.training.step import loss_sum, targets_ahead

FLOAT32 = Compute("cpu", "float32")
C = ModelConfig(
    vocab_size=64, context_length=16, n_layers=2, d_model=16, n_heads=2, mtp_heads=2, output_init="scaled", init_std=0.3
)
MODEL = gpt.GPT(C, FLOAT32)
LENGTHS = [5, 2, 6]
TOKENS = np.random.default_rng(0).integers(4, 64, sum(LENGTHS)).astype(np.int32)
BATCH = make_batch([(TOKENS, np.repeat([1, 2, 3], LENGTHS).astype(np.int32))])


@pytest.fixture
def params(one_device):
    return jax.jit(functools.partial(gpt.init, MODEL))(jax.random.key(0))


def apply(params, batch, ahead=True, model=MODEL):
    run = lambda p: model.apply({"params": p}, batch.tokens, batch.positions, batch.segments, ahead=ahead)
    return jax.jit(run)(params)


def close(got, wanted):
    assert np.max(np.abs(np.asarray(got) - np.asarray(wanted))) <= 1e-5 * np.max(np.abs(np.asarray(wanted)))


def test_heads_are_wired_as_published(params):
    """h_k = block([norm(h_(k-1)); norm(embedding of token i + k)] M_k), arXiv:2412.19437, equations 21 to 23."""
    hidden, _, aux = apply(params, BATCH)
    normed = lambda x, p: np.asarray(x) / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + C.norm_eps) * p["scale"]
    T = BATCH.tokens.shape[1]
    run = lambda p, x: MODEL.apply({"params": p}, *x, capture_intermediates=True)[1]["intermediates"]["layers"]["__call__"][0][0][
        -1
    ]
    h = jax.jit(run)(params, (BATCH.tokens, BATCH.positions, BATCH.segments))  # the trunk, before its final norm
    close(normed(h, params["final_norm"]), hidden)
    shared = Shared(BATCH.positions, BATCH.segments, rotation(jnp.asarray(BATCH.positions), C.head_width, C.rope_theta))
    for k in (1, 2):
        p = jax.tree.map(lambda x: x[k - 1], params["ahead"])
        later = np.zeros((1, T, 16), np.float32)
        later[:, : T - k] = params["embedding"][BATCH.tokens[:, k:]]
        both = [normed(h, p["hidden_norm"]), normed(later, p["embedding_norm"])]
        block = Block(C, FLOAT32, False, C.period[-1])
        h, _ = block.apply({"params": p["block"]}, np.concatenate(both, -1) @ p["join"], (None, None), shared)
        close(aux["ahead_nBTD"][k - 1][:, : T - k], normed(h, p["final_norm"])[:, : T - k])


def test_heads_leave_the_trunk_as_it_is(params):
    with_heads, without = apply(params, BATCH), apply(params, BATCH, ahead=False)
    np.testing.assert_array_equal(with_heads[0], without[0])
    assert without[2] == {}
    plain = gpt.GPT(dataclasses.replace(C, mtp_heads=0), FLOAT32)
    np.testing.assert_array_equal(apply({k: v for k, v in params.items() if k != "ahead"}, BATCH, False, plain)[0], without[0])


def test_head_k_sees_k_tokens_more_and_no_others(params):
    """Head k's state at position i depends on tokens up to i + k of its own document."""
    states = jax.jit(lambda t: MODEL.apply({"params": params}, t, BATCH.positions, BATCH.segments, ahead=True)[2]["ahead_nBTD"])
    before, segments = np.asarray(states(BATCH.tokens)), BATCH.segments[0]
    for s in range(BATCH.tokens.shape[1]):
        changed = np.array(BATCH.tokens)
        changed[0, s] = (changed[0, s] + 7) % 64
        differs = np.any(np.asarray(states(changed)) != before, axis=-1)
        for k in (1, 2):
            for i in range(len(segments) - k):
                if segments[i] == segments[i + k]:
                    assert differs[k - 1, 0, i] == (segments[s] == segments[i] and s <= i + k), (k, i, s)


def test_loss_is_the_mean_over_heads_of_later_targets_within_documents(params):
    total, parts = jax.jit(lambda p: loss_sum(MODEL, p, BATCH, 4, None, 0.0, 0.3))(params)
    aux = apply(params, BATCH)[2]
    wanted, start = 0.0, 0
    for n in LENGTHS:
        for k in (1, 2):
            logits = np.asarray(aux["ahead_nBTD"][k - 1, 0], np.float64) @ np.asarray(params["unembedding"], np.float64)
            for i in range(start, start + n - k):
                if i + k < BATCH.targets.shape[1] and BATCH.weights[0, i + k]:
                    row = logits[i]
                    wanted += (np.log(np.sum(np.exp(row - row.max()))) + row.max() - row[BATCH.targets[0, i + k]]) / 2
        start += n
    np.testing.assert_allclose(parts["mtp_loss"], wanted, rtol=1e-5)
    np.testing.assert_allclose(total, parts["loss"] + 0.3 * parts["mtp_loss"], rtol=1e-6)
    plain, without = jax.jit(lambda p: loss_sum(MODEL, p, BATCH, 4))(params)
    np.testing.assert_allclose(plain, parts["loss"], rtol=1e-6)
    assert set(without) == {"loss"}


def test_targets_ahead_stay_within_the_document():
    targets, weights = targets_ahead(BATCH, 2)
    for i in range(BATCH.tokens.shape[1]):
        inside = i + 2 < BATCH.tokens.shape[1] and BATCH.segments[0, i] == BATCH.segments[0, i + 2]
        assert weights[0, i] == (BATCH.weights[0, i + 2] if inside else 0)
        assert not inside or targets[0, i] == BATCH.targets[0, i + 2]
