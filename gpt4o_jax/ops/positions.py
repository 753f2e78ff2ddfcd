"""Rotary position embedding (RoFormer, arXiv:2104.09864; pairing as in Llama's weights).

B batch, T positions, N heads, H head width, h half of it
"""

import jax
import jax.numpy as jnp

Rotation = tuple[jax.Array, jax.Array]  # (cosines, sines), [B, T, 1, h] each


def rotation(positions_BT: jax.Array, head_width: int, theta: float) -> Rotation:
    """Cosines and sines of position * theta^(-2i/H): computed once, used by every layer. Float32."""
    half = head_width // 2
    frequency_h = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1h = (positions_BT[..., None].astype(jnp.float32) * frequency_h)[:, :, None, :]
    # Without the barrier XLA fuses sine and cosine into every use, and computes them again for each head.
    return jax.lax.optimization_barrier((jnp.cos(angle_BT1h), jnp.sin(angle_BT1h)))


def rotary(x_BTNH: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of every head."""
    cos, sin = rotation
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
