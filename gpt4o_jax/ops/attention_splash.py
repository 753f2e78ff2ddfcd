"""Causal self-attention on TPUs: the splash kernel that JAX ships, with its block sizes and masks.

B batch, T positions, N query heads, K key/value heads, H head width
"""

import jax
import jax.numpy as jnp

from gpt4o_jax.ops import keep

LANES = 128  # the kernel's blocks are multiples of this
LARGEST_BLOCK = 512


def splash_attention(
    q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N, compute, scale: float, window=None, softcap=None, interpret=False
):
    """Equal to ops.attention.attention with the causal_mask of rows in order, float32 [B, T, N, H]; T a multiple of 128.

    interpret: runs the kernel on any platform, slowly, for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    first_heads = lambda x: jnp.moveaxis(x, 2, 1).astype(compute.operand)
    _, T, N, _ = q_BTNH.shape
    kernel = _kernel(T, N, window, softcap, interpret)
    ids = None if segments_BT is None else splash.SegmentIds(segments_BT, segments_BT)
    call = lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids, sinks=sinks_N)
    # The kernel does not scale. Done here in float32, before the operands are rounded.
    out_BNTH = jax.vmap(call)(first_heads(q_BTNH * scale), first_heads(k_BTKH), first_heads(v_BTKH), ids)
    return jnp.moveaxis(out_BNTH, 1, 2).astype(jnp.float32)


def _kernel(T: int, N: int, window: int | None, softcap: float | None, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block = max(size for size in range(LANES, LARGEST_BLOCK + 1, LANES) if T % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    return splash.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * N),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=keep.ATTENTION,
        interpret=interpret,
    )
