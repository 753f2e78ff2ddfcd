"""Scaled dot-product attention with grouped key/value heads: the reference implementation, and which backend runs where.

`attention` takes any mask and defines the result. `self_attention` computes it for rows in order, causal within their segments,
with the implementation that suits the hardware:

    name       where  why
    blocks     CPU    2 to 5 times the reference's speed, no [T, T] in memory; no attention dropout
    cudnn      GPU    cuDNN flash attention; bfloat16, head width a multiple of 8 up to 128; no soft-cap, sinks, attention dropout
    splash     TPU    Pallas flash attention; bfloat16, T a multiple of 128; no attention dropout
    reference  all    everything else: attention dropout, odd shapes, float32 on a GPU or TPU
    ring       all    rows split over several devices (mesh.context above 1), in parallel/context.py; no attention dropout
    gather     all    the same with fewer messages and more memory, for few devices

B batch, T query positions, S key positions, N query heads, K key/value heads,
G query heads per key/value head, H head width
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt4o_jax.errors import RunError
from gpt4o_jax.ops import keep
from gpt4o_jax.ops.attention_blocks import block_attention
from gpt4o_jax.ops.attention_splash import LANES, splash_attention
from gpt4o_jax.ops.compute import Compute, precision
from gpt4o_jax.ops.masks import causal_mask


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    compute: Compute,
    scale: float | None = None,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
    dropout=None,
) -> jax.Array:
    """softmax(scale * q k^T) v over the keys that mask_BTS (bool) allows, [B, T, N, H]. Float32 softmax and result.

    scale: None means 1 / sqrt(H). softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118).
    sinks_N: an extra logit per head in the softmax, with a value of zero (arXiv:2508.10925).
    dropout: None, or a function applied to the attention weights [B, K, G, T, S].
    Source: Attention Is All You Need (arXiv:1706.03762), grouped heads: arXiv:2305.13245.
    """
    # XLA:CPU gains nothing from bfloat16 in these small batched products.
    dtype = jnp.float32 if compute.platform == "cpu" else compute.operand
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision(dtype))
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = (q_BTNH * (H**-0.5 if scale is None else scale)).reshape(B, T, K, N // K, H)
    scores_BKGTS = product("BTKGH,BSKH->BKGTS", q_BTKGH.astype(dtype), k_BSKH.astype(dtype))
    if softcap is not None:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    if sinks_N is not None:
        sinks_BKGT1 = jnp.broadcast_to(sinks_N.reshape(K, -1, 1, 1), (*scores_BKGTS.shape[:-1], 1))
        scores_BKGTS = jnp.concatenate([scores_BKGTS, sinks_BKGT1], axis=-1)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    if sinks_N is not None:
        weights_BKGTS = weights_BKGTS[..., :-1]
    if dropout is not None:
        weights_BKGTS = dropout(weights_BKGTS)
    out_BTKGH = product("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(dtype), v_BSKH.astype(dtype))
    return out_BTKGH.reshape(B, T, N, H)


def self_attention(
    implementation: str,
    compute: Compute,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array | None,
    sinks_N: jax.Array | None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout=None,
) -> jax.Array:
    """Self-attention of rows in order: causal, within segments and window. Other arguments as for `attention`.

    implementation: as returned by `choose`. segments_BT: each position's document, documents being contiguous; None: one per row.
    window: number of keys attended to, the query's own included; None: all. dropout: used by the reference only.
    Returns [B, T, N, H], float32.
    """
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    if implementation == "blocks":
        return block_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N, scale, window, softcap)
    if implementation == "splash":
        return splash_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N, compute, scale, window, softcap)
    if implementation == "cudnn":
        return checkpoint_name(_cudnn(q_BTNH, k_BTKH, v_BTKH, segments_BT, compute, scale, window), keep.ATTENTION)
    B, T = q_BTNH.shape[:2]
    order_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    segments_BT = jnp.ones_like(order_BT) if segments_BT is None else segments_BT
    mask_BTS = causal_mask(order_BT, order_BT, segments_BT, segments_BT, window)
    z_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, mask_BTS, compute, scale, softcap, sinks_N, dropout)
    return checkpoint_name(z_BTNH, keep.ATTENTION)


def choose(
    wanted: str,
    compute: Compute,
    T: int,
    H: int,
    softcap: bool = False,
    sinks: bool = False,
    dropout: bool = False,
    context: int = 1,
) -> str:
    """Name of the implementation for these shapes. wanted: a name, or "auto" for the first that supports the case.

    T: row length; H: head width; context: number of devices a row is split over. Raises RunError with the reason if the wanted
    implementation, or with "auto" every one, does not support the case.
    """
    whole = (context > 1, f"needs whole rows, and mesh.context={context} cuts them")
    cut = _first(
        (context == 1, "is for rows cut over several devices, and mesh.context is 1"),
        (T % (2 * context), f"needs a context_length of a multiple of {2 * context} (2 * mesh.context), not {T}"),
        (dropout, "has no dropout on attention weights"),
    )
    reasons = {
        "blocks": _first(
            whole,
            (compute.platform != "cpu", f"is for CPUs, not for a {compute.platform}"),
            (dropout, "has no dropout on attention weights"),
        ),
        "cudnn": _first(
            whole,
            (compute.platform != "gpu", f"is for GPUs, not for a {compute.platform}"),
            (compute.dtype != "bfloat16", f"needs compute_dtype bfloat16, not {compute.dtype}"),
            (H % 8 or H > 128, f"needs heads of a multiple of 8 up to 128, not {H}"),
            (T % 2 and compute.packed, f"needs an even context_length for rows of several documents, not {T}"),
            (softcap, "has no soft-cap"),
            (sinks, "has no sinks"),
            (dropout, "has no dropout on attention weights here"),
        ),
        "splash": _first(
            whole,
            (compute.platform != "tpu", f"is for TPUs, not for a {compute.platform}"),
            # The kernel multiplies with the default precision, which is that of bfloat16 whatever the operands.
            (compute.dtype != "bfloat16", f"needs compute_dtype bfloat16, not {compute.dtype}"),
            (T % LANES, f"needs a context of a multiple of {LANES}, not {T}"),
            (dropout, "has no dropout on attention weights"),
        ),
        "reference": _first(whole),
        "ring": cut,
        "gather": cut,
    }
    able = [name for name, reason in reasons.items() if reason is None]
    if wanted == "auto" and able:
        return able[0]
    if wanted == "auto":  # only rows split over devices can rule out every implementation
        raise RunError(f"model.attention=auto: ring {reasons['ring']}, and nothing else takes rows cut by mesh.context={context}")
    if reasons[wanted] is not None:
        other = f"auto would take {able[0]}" if able else "nor can auto take anything else"
        raise RunError(f"model.attention={wanted} {reasons[wanted]}; {other}")
    return wanted


def _first(*checks) -> str | None:
    return next((reason for hit, reason in checks if hit), None)


def _cudnn(q_BTNH, k_BTKH, v_BTKH, segments_BT, compute, scale, window):
    # For packed documents cuDNN needs a mask in memory: [B, 1, T, T], shared by all heads.
    mask_B1TT = None if segments_BT is None else (segments_BT[:, None, :, None] == segments_BT[:, None, None, :])
    operands = [x.astype(compute.operand) for x in (q_BTNH, k_BTKH, v_BTKH)]
    local = None if window is None else (window - 1, 0)
    out = jax.nn.dot_product_attention(
        *operands, mask=mask_B1TT, scale=scale, is_causal=True, local_window_size=local, implementation="cudnn"
    )
    return out.astype(jnp.float32)
