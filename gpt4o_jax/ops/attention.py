"""Scaled dot-product attention with grouped key/value heads.

B batch, T query positions, S key positions, N query heads, K key/value heads,
G query heads per key/value head, H head width
"""

import jax
import jax.numpy as jnp

from gpt4o_jax.ops.compute import Compute


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    compute: Compute,
    dropout=None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the keys that the mask allows. Float32 softmax and result.

    dropout: None, or a function applied to the attention weights [B, K, G, T, S].
    Source: Attention Is All You Need (arXiv:1706.03762), grouped heads: arXiv:2305.13245.
    """
    # XLA:CPU gains nothing from bfloat16 in these small batched products.
    dtype = jnp.float32 if compute.platform == "cpu" else compute.operand
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH.astype(dtype), k_BSKH.astype(dtype), preferred_element_type=jnp.float32
    )
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    if dropout is not None:
        weights_BKGTS = dropout(weights_BKGTS)
    out_BTKGH = jnp.einsum(
        "BKGTS,BSKH->BTKGH", weights_BKGTS.astype(dtype), v_BSKH.astype(dtype), preferred_element_type=jnp.float32
    )
    return out_BTKGH.reshape(B, T, N, H)
