"""Causal self-attention by blocks of queries, one key/value head at a time, recomputed in the backward pass.

XLA:CPU multiplies the small batched matrices of the plain einsum slowly, and writes all scores [B, N, T, T] to memory several
times. Here the scores of one block of queries of one head stay in a core's cache, keys hidden from a block by causality or the
window are never multiplied, and only the output and one number per query are kept for the backward pass, which recomputes the
scores (FlashAttention-2, arXiv:2307.08691, without its online softmax: a row of scores fits). Products are float32: bfloat16 is
no faster in this form.

`block_attention` is for whole rows on CPUs. `attend` and `attend_backward` are its building blocks, which parallel/context.py
combines for rows split over several devices, on any platform.

B batch, T positions, N query heads, K key/value heads, G query heads per key/value head, H head width,
X rows times key/value heads, S key positions, c queries of a block, s keys that the block can see
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt4o_jax.ops import keep
from gpt4o_jax.ops.compute import precision

SMALLEST_BLOCK, MOST_BLOCKS = 64, 8  # queries; blocks are unrolled, so more of them would only compile longer


class How(NamedTuple):
    """Static arguments."""

    scale: float
    window: int | None
    softcap: float | None
    serial: bool  # heads one after another, to stay in a CPU's cache; or all together
    heads: int  # key/value heads of a row: consecutive in X, sharing the row's segments


def block_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N, scale: float, window=None, softcap=None):
    """Equal to ops.attention.attention with the causal_mask of rows in order; see there for the arguments. Float32 [B, T, N, H].

    sinks_N, segments_BT: arrays, or None.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    heads = lambda x: jnp.moveaxis(x, 2, 1).reshape(B * K, T, H)
    q = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 3).reshape(B * K, N // K, T, H)
    sinks = None if sinks_N is None else jnp.tile(sinks_N.reshape(K, N // K), (B, 1))
    how = How(scale, window, softcap, serial=True, heads=K)
    out = _rows(how, q, heads(k_BTKH), heads(v_BTKH), segments_BT, sinks)
    return jnp.moveaxis(out.reshape(B, K, N // K, T, H), 3, 1).reshape(B, T, N, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(how, q, k, v, segments, sinks):
    return attend(how, q, k, v, segments, sinks=sinks)[0]


def _rows_forward(how, q, k, v, segments, sinks):
    out, normaliser = (checkpoint_name(x, keep.ATTENTION) for x in attend(how, q, k, v, segments, sinks=sinks))
    return out, (q, k, v, segments, sinks, out, normaliser)


def _rows_backward(how, saved, d_out):
    q, k, v, segments, sinks, out, normaliser = saved
    d_q, d_k, d_v, d_sinks = attend_backward(how, q, k, v, out, normaliser, d_out, segments, sinks=sinks)
    return d_q, d_k, d_v, None, d_sinks


_rows.defvjp(_rows_forward, _rows_backward)


def attend(how: How, q, k, v, segments=None, key_segments=None, sinks=None, distance=None):
    """(softmax over the visible keys, times values [X, G, T, H]; log of its denominator [X, G, T, 1]), float32.

    q: [X, G, T, H], float32; k, v: [X, S, H], whose dtype the operands of products take; sinks: [X, G] or None.
    distance: None if the keys are the queries' own: causal, with segments [X / how.heads, T] or None. Otherwise the number of
    positions, possibly traced, from the first key to the first query: all keys precede all queries, the queries form one block,
    and key_segments [X / how.heads, S] belong to the keys. A query without visible keys gets the lowest normaliser and a
    meaningless output.
    """

    blocks = _blocks(q.shape[2], k.shape[1], how.window, distance)

    def head(visible, q_GTH, k_SH, v_SH, sinks_G):
        outs, normalisers = [], []
        for (begin, end, first, last), visible_cs in zip(blocks, visible, strict=True):
            scores_Gcs, _ = _scores(how, q_GTH[:, begin:end], k_SH[first:last], visible_cs)
            top_Gc1 = jnp.max(scores_Gcs, axis=-1, keepdims=True)
            if sinks_G is not None:
                top_Gc1 = jnp.maximum(top_Gc1, sinks_G[:, None, None])
            weights_Gcs = jnp.exp(scores_Gcs - top_Gc1)
            total_Gc1 = jnp.sum(weights_Gcs, axis=-1, keepdims=True)
            if sinks_G is not None:
                total_Gc1 += jnp.exp(sinks_G[:, None, None] - top_Gc1)
            G, c, s = weights_Gcs.shape
            out_GcH = _dot(weights_Gcs.reshape(G * c, s), v_SH[first:last]).reshape(G, c, -1)
            outs.append(out_GcH / total_Gc1)
            normalisers.append(top_Gc1 + jnp.log(total_Gc1))
        return jnp.concatenate(outs, axis=1), jnp.concatenate(normalisers, axis=1)

    visible = functools.partial(_visible, how.window, blocks, distance)
    return _over_heads(how, head, visible, (segments, key_segments), (q, k, v, sinks))


def attend_backward(how: How, q, k, v, out, normaliser, d_out, segments=None, key_segments=None, sinks=None, distance=None):
    """Gradients of q, k, v and sinks (or None), float32, as far as they come from these keys.

    out, normaliser: of the softmax over all keys, of which these may be a part. Other arguments as for `attend`.
    """

    blocks = _blocks(q.shape[2], k.shape[1], how.window, distance)

    def head(visible, q_GTH, k_SH, v_SH, sinks_G, out_GTH, normaliser_GT1, d_out_GTH):
        # softmax's gradient: weights * (d_weights - sum(weights * d_weights)); the sum equals that of out * d_out.
        inner_GT1 = jnp.sum(out_GTH * d_out_GTH, axis=-1, keepdims=True)
        # Accumulated transposed, so that their products transpose the smaller factor: twice as fast on XLA:CPU.
        d_q, d_k_HS, d_v_HS = [], *(jnp.zeros(x.shape[::-1], jnp.float32) for x in (k_SH, v_SH))
        for (begin, end, first, last), visible_cs in zip(blocks, visible, strict=True):
            q_GcH, k_sH, v_sH = q_GTH[:, begin:end], k_SH[first:last], v_SH[first:last]
            scores_Gcs, slope = _scores(how, q_GcH, k_sH, visible_cs)
            weights_Gcs = jnp.exp(scores_Gcs - normaliser_GT1[:, begin:end])
            G, c, s = weights_Gcs.shape
            d_out_XH = d_out_GTH[:, begin:end].reshape(G * c, -1)
            d_weights_Gcs = _dot(d_out_XH, v_sH.T).reshape(G, c, s)
            d_scores_Gcs = weights_Gcs * (d_weights_Gcs - inner_GT1[:, begin:end])
            if slope is not None:
                d_scores_Gcs *= slope
            d_scores_Xs = d_scores_Gcs.reshape(G * c, s)
            d_q.append(_dot(d_scores_Xs, k_sH).reshape(G, c, -1) * how.scale)
            scaled_XH = q_GcH.reshape(G * c, -1) * how.scale
            d_k_HS = d_k_HS.at[:, first:last].add(_dot(scaled_XH.T, d_scores_Xs.astype(k.dtype)))
            d_v_HS = d_v_HS.at[:, first:last].add(_dot(d_out_XH.T, weights_Gcs.reshape(G * c, s).astype(v.dtype)))
        d_sinks = None if sinks_G is None else -jnp.sum(jnp.exp(sinks_G[:, None, None] - normaliser_GT1) * inner_GT1, axis=(1, 2))
        return jnp.concatenate(d_q, axis=1), d_k_HS.T, d_v_HS.T, d_sinks

    visible = functools.partial(_visible, how.window, blocks, distance)
    return _over_heads(how, head, visible, (segments, key_segments), (q, k, v, sinks, out, normaliser, d_out))


def equal_blocks(T: int) -> int:
    """The best number of equal blocks for T queries whose keys all precede them."""
    return max(n for n in range(1, MOST_BLOCKS + 1) if n == 1 or (T % n == 0 and n * SMALLEST_BLOCK <= T))


def _over_heads(how, head, visible, segments, arrays):
    """head(visible(*segments of its row), *arrays of the head) for all heads.

    The masks of a row are computed beforehand and kept in memory: XLA:CPU would otherwise compare segments inside every
    exponential, and then vectorise neither.
    """
    if not how.serial:
        rows = jax.tree.map(lambda x: x.reshape(-1, how.heads, *x.shape[1:]), arrays)
        row = lambda segments, arrays: jax.vmap(functools.partial(head, visible(*segments)))(*arrays)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.vmap(row)(segments, rows))
    packed = segments[0] is not None
    seen = jax.vmap(visible)(*segments) if packed else visible(*segments)

    def one(x):
        n, arrays = x
        return head([y[n // how.heads] for y in seen] if packed else seen, *arrays)

    return jax.lax.map(one, (jnp.arange(len(arrays[0])), arrays))


def _blocks(T: int, S: int, window: int | None, distance) -> list[tuple[int, int, int, int]]:
    """(first query, end of the queries, first key, end of the keys) of each block."""
    if distance is not None:
        return [(0, T, 0, S)]
    size = max(SMALLEST_BLOCK, -(-T // MOST_BLOCKS))
    begins = range(0, T, size)
    return [(n, min(n + size, T), 0 if window is None else max(0, n - window + 1), min(n + size, T)) for n in begins]


def _visible(window, blocks, distance, segments_T, key_segments_S) -> list:
    """For each block, the mask [c, s] of the keys that its queries see, or None if they see all."""
    segments_S = segments_T if distance is None else key_segments_S
    visible = []
    for begin, end, first, last in blocks:
        at_c1, at_s = jnp.arange(begin, end)[:, None], jnp.arange(first, last)
        conditions = [at_s <= at_c1] if distance is None else []
        if window is not None:
            conditions.append(at_s > at_c1 + (0 if distance is None else distance) - window)
        if segments_T is not None:
            conditions.append(segments_T[begin:end, None] == segments_S[first:last])
        visible.append(functools.reduce(jnp.logical_and, conditions) if conditions else None)
    return visible


def _scores(how, q_GcH, k_sH, visible_cs):
    """(scores [G, c, s], hidden ones at the lowest float32; derivative of the soft-cap, or None)."""
    c, s = q_GcH.shape[1], k_sH.shape[0]
    scores = _dot(q_GcH.reshape(-1, q_GcH.shape[-1]) * how.scale, k_sH.T).reshape(-1, c, s)
    slope = None
    if how.softcap is not None:
        capped = jnp.tanh(scores / how.softcap)
        scores, slope = capped * how.softcap, 1 - capped * capped
    return scores if visible_cs is None else jnp.where(visible_cs, scores, jnp.finfo(jnp.float32).min), slope


def _dot(x, y):
    return jnp.dot(x.astype(y.dtype), y, preferred_element_type=jnp.float32, precision=precision(y.dtype))
