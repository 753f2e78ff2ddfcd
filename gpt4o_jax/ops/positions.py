"""Rotary position embedding (RoFormer, arXiv:2104.09864; pairing as in Llama's weights).

B batch, T positions, N heads, H head width
"""

import jax
import jax.numpy as jnp


def rotary(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotates pairs (i, i + H/2) of every head by position * theta^(-2i/H). Float32 inside."""
    half = x_BTNH.shape[-1] // 2
    frequency_h = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1h = (positions_BT[..., None].astype(jnp.float32) * frequency_h)[:, :, None, :]
    sin, cos = jnp.sin(angle_BT1h), jnp.cos(angle_BT1h)
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
