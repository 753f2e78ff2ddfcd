"""Causal self-attention for CPUs: one key/value head at a time, causal blocks of queries, recomputed in the backward pass.

XLA:CPU multiplies the small batched matrices of the plain einsum slowly, and writes all scores [B, N, T, T] to
memory several times. Here the scores of one block of queries of one head stay in the cache of a core, the keys that
causality or the window hide from a block are never multiplied, and nothing but the output and one number a query is
kept for the backward pass, which computes the scores again (FlashAttention-2, arXiv:2307.08691, without its online softmax:
a row of scores fits). Products are float32: in this form bfloat16 ones are no faster.

B batch, T positions, N query heads, K key/value heads, G query heads per key/value head, H head width,
c queries of a block, s keys that the block can see
"""

import functools

import jax
import jax.numpy as jnp

SMALLEST_BLOCK, MOST_BLOCKS = 64, 8  # queries; the blocks are unrolled, so that more of them would only compile longer


def block_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N, scale: float, window=None, softcap=None):
    """Equal to ops.attention.attention under causal_mask of rows in order; see there for the arguments. Float32.

    sinks_N, segments_BT: arrays, or None.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    heads = lambda x: jnp.moveaxis(x, 2, 1).reshape(B * K, T, H)
    q = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 3).reshape(B * K, N // K, T, H)
    segments = None if segments_BT is None else jnp.repeat(segments_BT, K, axis=0)
    sinks = None if sinks_N is None else jnp.tile(sinks_N.reshape(K, N // K), (B, 1))
    out = _heads(scale, window, softcap, q, heads(k_BTKH), heads(v_BTKH), segments, sinks)
    return jnp.moveaxis(out.reshape(B, K, N // K, T, H), 3, 1).reshape(B, T, N, H)


def _blocks(T: int, window: int | None):
    """(first query, end of the queries, first key) of each block; its keys end where its queries do."""
    size = max(SMALLEST_BLOCK, -(-T // MOST_BLOCKS))
    for begin in range(0, T, size):
        yield begin, min(begin + size, T), 0 if window is None else max(0, begin - window + 1)


def _scores(scale, window, softcap, q_GcH, k_sH, segments_T, begin, first):
    """(scores [G, c, s] with hidden ones at -inf, the derivative of the soft-cap or None)."""
    c, s = q_GcH.shape[1], k_sH.shape[0]
    scores = jnp.dot(q_GcH.reshape(-1, q_GcH.shape[-1]) * scale, k_sH.T).reshape(-1, c, s)
    slope = None
    if softcap is not None:
        capped = jnp.tanh(scores / softcap)
        scores, slope = capped * softcap, 1 - capped * capped
    at_c, at_s = begin + jnp.arange(c)[:, None], first + jnp.arange(s)
    visible = at_s <= at_c
    if window is not None:
        visible &= at_s > at_c - window
    if segments_T is not None:
        visible &= segments_T[begin : begin + c, None] == segments_T[first : first + s]
    return jnp.where(visible, scores, jnp.finfo(jnp.float32).min), slope


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _heads(scale, window, softcap, q, k, v, segments, sinks):
    return _forward(scale, window, softcap, q, k, v, segments, sinks)[0]


def _forward(scale, window, softcap, q, k, v, segments, sinks):
    """Arrays lead with B * K. Returns (output, what the backward pass needs)."""

    def head(x):
        q_GTH, k_TH, v_TH, segments_T, sinks_G = x
        outs, normalisers = [], []
        for begin, end, first in _blocks(q_GTH.shape[1], window):
            scores_Gcs, _ = _scores(scale, window, softcap, q_GTH[:, begin:end], k_TH[first:end], segments_T, begin, first)
            top_Gc1 = jnp.max(scores_Gcs, axis=-1, keepdims=True)
            if sinks_G is not None:
                top_Gc1 = jnp.maximum(top_Gc1, sinks_G[:, None, None])
            weights_Gcs = jnp.exp(scores_Gcs - top_Gc1)
            total_Gc1 = jnp.sum(weights_Gcs, axis=-1, keepdims=True)
            if sinks_G is not None:
                total_Gc1 += jnp.exp(sinks_G[:, None, None] - top_Gc1)
            G, c, s = weights_Gcs.shape
            out_GcH = jnp.dot(weights_Gcs.reshape(G * c, s), v_TH[first:end]).reshape(G, c, -1)
            outs.append(out_GcH / total_Gc1)
            normalisers.append(top_Gc1 + jnp.log(total_Gc1))
        return jnp.concatenate(outs, axis=1), jnp.concatenate(normalisers, axis=1)

    out, normaliser = jax.lax.map(head, (q, k, v, segments, sinks))
    return out, (q, k, v, segments, sinks, out, normaliser)


def _backward(scale, window, softcap, saved, d_out):
    def head(x):
        q_GTH, k_TH, v_TH, segments_T, sinks_G, out_GTH, normaliser_GT1, d_out_GTH = x
        # softmax's gradient: weights * (d_weights - sum(weights * d_weights)), the sum is that of out * d_out.
        inner_GT1 = jnp.sum(out_GTH * d_out_GTH, axis=-1, keepdims=True)
        d_q, d_k, d_v = [], jnp.zeros_like(k_TH), jnp.zeros_like(v_TH)
        for begin, end, first in _blocks(q_GTH.shape[1], window):
            q_GcH, k_sH, v_sH = q_GTH[:, begin:end], k_TH[first:end], v_TH[first:end]
            scores_Gcs, slope = _scores(scale, window, softcap, q_GcH, k_sH, segments_T, begin, first)
            weights_Gcs = jnp.exp(scores_Gcs - normaliser_GT1[:, begin:end])
            G, c, s = weights_Gcs.shape
            d_out_XH = d_out_GTH[:, begin:end].reshape(G * c, -1)
            d_weights_Gcs = jnp.dot(d_out_XH, v_sH.T).reshape(G, c, s)
            d_scores_Gcs = weights_Gcs * (d_weights_Gcs - inner_GT1[:, begin:end])
            if slope is not None:
                d_scores_Gcs *= slope
            d_scores_Xs = d_scores_Gcs.reshape(G * c, s)
            d_q.append(jnp.dot(d_scores_Xs, k_sH).reshape(G, c, -1) * scale)
            d_k = d_k.at[first:end].add(jnp.dot(d_scores_Xs.T, q_GcH.reshape(G * c, -1) * scale))
            d_v = d_v.at[first:end].add(jnp.dot(weights_Gcs.reshape(G * c, s).T, d_out_XH))
        d_sinks = None if sinks_G is None else -jnp.sum(jnp.exp(sinks_G[:, None, None] - normaliser_GT1) * inner_GT1, axis=(1, 2))
        return jnp.concatenate(d_q, axis=1), d_k, d_v, d_sinks

    q, k, v, segments, sinks, out, normaliser = saved
    d_q, d_k, d_v, d_sinks = jax.lax.map(head, (q, k, v, segments, sinks, out, normaliser, d_out))
    return d_q, d_k, d_v, None, d_sinks


_heads.defvjp(_forward, _backward)
