"""Attention is softmax(q k^T / sqrt(H)) v over the allowed keys, including grouped heads, and so are its gradients.

B batch, T query positions, S key positions, N query heads, K key/value heads, H head width
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax.errors import RunError
from gpt4o_jax.ops.attention import attention, choose, self_attention
from gpt4o_jax.ops.attention_splash import splash_attention
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.masks import causal_mask

B, T, N, H = 2, 10, 4, 8
SEGMENTS = np.array([[1] * 4 + [2] * 5 + [0], [1] * 10])
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0], list(range(10))])
FLOAT32 = Compute("cpu", "float32")


def masks():
    """Masks [B, T, S] by name."""
    return {
        "everything": np.ones((B, T, 15), bool),
        "causal": np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T)),
        "packed": np.tril(SEGMENTS[:, :, None] == SEGMENTS[:, None, :]),
        "cache": np.broadcast_to(np.arange(15) <= 5 + np.arange(T)[:, None], (B, T, 15)),
    }


def inputs(K, S):
    keys = jax.random.split(jax.random.key(K), 4)
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)]
    return [jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]


def one_head_at_a_time(q, k, v, mask):
    """The formula in float64, head by head: query head n reads key/value head n // (N / K)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b in range(B):
        for n in range(N):
            g = n // (N // k.shape[2])
            scores = np.where(mask[b], q[b, :, n] @ k[b, :, g].T / np.sqrt(H), -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[b, :, n] = weights / weights.sum(axis=-1, keepdims=True) @ v[b, :, g]
    return out


def close(got, wanted, tolerance=1e-5):
    assert np.max(np.abs(np.asarray(got) - np.asarray(wanted))) <= tolerance * np.max(np.abs(np.asarray(wanted)))


@pytest.mark.parametrize("K", [4, 2, 1])
@pytest.mark.parametrize("name", list(masks()))
def test_equals_the_formula(name, K):
    mask = masks()[name]
    q, k, v, _ = inputs(K, mask.shape[2])
    out = attention(q, k, v, jnp.asarray(mask), FLOAT32)
    assert out.dtype == jnp.float32
    close(out, one_head_at_a_time(q, k, v, mask))


@pytest.mark.parametrize("K", [4, 1])
@pytest.mark.parametrize("name", ["packed", "cache"])
def test_gradients_equal_those_of_the_formula(name, K):
    mask = jnp.asarray(masks()[name])
    q, k, v, g = inputs(K, mask.shape[2])

    def plain(q, k, v):
        k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
        scores = jnp.where(mask[:, None], jnp.einsum("BTNH,BSNH->BNTS", q, k) / H**0.5, -jnp.inf)
        return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores), v)

    gradient = lambda f: jax.jit(jax.grad(lambda *x: jnp.vdot(f(*x), g), argnums=(0, 1, 2)))(q, k, v)
    jax.tree.map(close, gradient(lambda q, k, v: attention(q, k, v, mask, FLOAT32)), gradient(plain))


def test_bfloat16_operands_stay_within_their_rounding():
    mask = masks()["packed"]
    q, k, v, _ = inputs(2, T)
    for platform in ("cpu", "gpu"):
        close(attention(q, k, v, jnp.asarray(mask), Compute(platform, "bfloat16")), one_head_at_a_time(q, k, v, mask), 2e-2)


def test_masked_keys_have_no_weight_at_all():
    """Whatever a masked key or value holds, the result does not change by a bit."""
    mask = jnp.asarray(masks()["packed"])
    q, k, v, _ = inputs(2, T)
    f = jax.jit(functools.partial(attention, mask_BTS=mask, compute=FLOAT32))
    other_k, other_v = (x.at[0, 4:].set(50.0).at[1, 9].set(-50.0) for x in (k, v))
    before, after = f(q, k, v), f(q, other_k, other_v)
    np.testing.assert_array_equal(before[0, :4], after[0, :4])
    np.testing.assert_array_equal(before[1, :9], after[1, :9])


def test_dropout_sees_the_weights():
    mask = jnp.asarray(masks()["causal"])
    q, k, v, _ = inputs(2, T)

    def doubled(weights):
        np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-6)
        return 2 * weights

    close(attention(q, k, v, mask, FLOAT32, dropout=doubled), 2 * attention(q, k, v, mask, FLOAT32))


def test_causal_mask_by_its_definition():
    mask = np.asarray(causal_mask(*map(jnp.asarray, (POSITIONS, POSITIONS, SEGMENTS, SEGMENTS))))
    for b in range(B):
        for t in range(T):
            for s in range(T):
                allowed = SEGMENTS[b, t] == SEGMENTS[b, s] and POSITIONS[b, s] <= POSITIONS[b, t]
                assert mask[b, t, s] == allowed


# ---------------------------------------------------------------- soft-cap, sinks, scale, window


def test_softcap_scale_and_sinks_equal_the_formula():
    mask = masks()["packed"]
    q, k, v, _ = inputs(2, T)
    sinks = np.array([-1.0, 0.0, 2.0, 5.0])
    got = attention(q, k, v, jnp.asarray(mask), FLOAT32, scale=0.7, softcap=1.5, sinks_N=jnp.asarray(sinks))
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for b in range(B):
        for n in range(N):
            scores = 1.5 * np.tanh(0.7 * q[b, :, n] @ k[b, :, n // 2].T / 1.5)
            weights = np.where(mask[b], np.exp(scores), 0)
            weights /= weights.sum(axis=-1, keepdims=True) + np.exp(sinks[n])
            close(got[b, :, n], weights @ v[b, :, n // 2])


@pytest.mark.parametrize("window", [1, 3, 100])
def test_windowed_mask_by_its_definition(window):
    mask = np.asarray(causal_mask(*map(jnp.asarray, (POSITIONS, POSITIONS, SEGMENTS, SEGMENTS)), window))
    distance = POSITIONS[:, :, None] - POSITIONS[:, None, :]
    np.testing.assert_array_equal(mask, (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & (distance >= 0) & (distance < window))


# ---------------------------------------------------------------- implementations: the reference's output and gradients

LONG = 256
VARIANTS = {
    "plain": {},
    "packed": dict(packed=True),
    "window": dict(packed=True, window=70),
    "softcap": dict(packed=True, softcap=2.0),
    "sinks": dict(packed=True, sinks=True),
    "everything": dict(packed=True, window=30, softcap=3.0, sinks=True, scale=0.3),
}


def both(f, T, K, packed=False, sinks=False, **kwargs):
    """Output and gradients of f and of the reference on the same random rows of three documents and padding."""
    keys = jax.random.split(jax.random.key(T + K), 4)
    q, g = (jax.random.normal(key, (B, T, N, 32)) for key in keys[:2])
    k, v = (jax.random.normal(key, (B, T, K, 32)) for key in keys[2:])
    ends = np.array([[T // 5, T // 2, T - 7], [T // 3, T // 3 + 1, T]])
    segments = 1 + np.sum(np.arange(T)[None, :, None] >= ends[:, None, :], axis=-1)
    segments = jnp.asarray(np.where(segments == 4, 0, segments), jnp.int32) if packed else None
    sink = jnp.array([-2.0, 0.0, 1.0, 3.0]) if sinks else None

    def with_gradients(f):
        out, pull = jax.vjp(lambda q, k, v, sink: f(q, k, v, segments, sink, **kwargs), q, k, v, sink)
        return out, pull(g)

    return jax.jit(lambda: (with_gradients(f), with_gradients(functools.partial(self_attention, "reference", FLOAT32))))()


@pytest.mark.parametrize("T, K", [(200, 4), (64, 2), (10, 1), (300, 1)])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_blocks_equal_the_reference(name, T, K):
    got, wanted = both(functools.partial(self_attention, "blocks", FLOAT32), T, K, **VARIANTS[name])
    jax.tree.map(functools.partial(close, tolerance=2e-5), got, wanted)


@pytest.mark.parametrize("K", [4, 2])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_splash_equals_the_reference(name, K):
    """The kernel runs in interpret mode here; `plan` compiles it."""

    def splash(q, k, v, segments, sinks, scale=None, **kwargs):
        return splash_attention(q, k, v, segments, sinks, FLOAT32, scale or q.shape[-1] ** -0.5, interpret=True, **kwargs)

    got, wanted = both(splash, LONG, K, **VARIANTS[name])
    jax.tree.map(functools.partial(close, tolerance=2e-5), got, wanted)


def test_the_table_of_implementations():
    names = ("auto", "blocks", "cudnn", "splash", "reference")
    cpu, gpu, tpu = Compute("cpu", "float32"), Compute("gpu", "bfloat16"), Compute("tpu", "bfloat16")
    assert [choose("auto", c, 256, 64) for c in (cpu, gpu, tpu)] == ["blocks", "cudnn", "splash"]
    assert choose("auto", cpu, 256, 64, dropout=True) == "reference"
    assert [choose("auto", gpu, 256, H) for H in (64, 128, 60, 256)] == ["cudnn", "cudnn", "reference", "reference"]
    assert choose("auto", Compute("gpu", "float32"), 256, 64) == choose("auto", gpu, 255, 64) == "reference"
    assert choose("auto", dataclasses.replace(gpu, packed=False), 255, 64) == "cudnn"
    assert choose("auto", gpu, 256, 64, softcap=True) == choose("auto", gpu, 256, 64, sinks=True) == "reference"
    assert choose("auto", tpu, 200, 64) == choose("auto", Compute("tpu", "float32"), 256, 64) == "reference"
    assert [choose(n, cpu, 256, 64) for n in names if n not in ("cudnn", "splash")] == ["blocks", "blocks", "reference"]
    with pytest.raises(RunError, match=r"model.attention=cudnn is for GPUs, not for a cpu; auto would take blocks"):
        choose("cudnn", cpu, 256, 64)
