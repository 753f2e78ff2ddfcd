"""Rotary position embedding (RoFormer, arXiv:2104.09864; pairs as in Llama's weights), and its scaling to longer contexts.

B batch, T positions, N heads, H head width, R rotated width, h half of it, P positions of a table, X an axis of 1 for the heads
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Rotation = tuple[jax.Array, jax.Array]  # (cosines, sines), [B, T, 1, h] each


class RopeScaling(NamedTuple):
    """How wavelengths are stretched by `factor` for contexts longer than those trained on.

    linear: all of them, as if positions were divided (arXiv:2306.15595). ntk: by a larger base, which stretches the longest by
    the whole factor and the shortest not at all. yarn (arXiv:2309.00071, with the ramp of its published code) and llama3 (Llama
    3.1): by the whole factor for pairs that turn fewer than `low` times within `original_context` tokens, not at all for more
    than `high` times, and by a ramp between. yarn also sharpens attention.
    """

    kind: str
    factor: float
    original_context: int | None = None
    low: float = 1.0
    high: float = 32.0


def rotation(
    positions_BT: jax.Array, width: int, theta: float, scaling: RopeScaling | None = None, below: int | None = None
) -> Rotation:
    """Cosines and sines of position * theta^(-2i/width), [B, T, 1, width / 2] float32 each, computed once for all layers.

    below: exclusive upper bound of all positions, if known: a table up to it may then be computed once and looked up by each row.
    """
    if below is not None and below < positions_BT.size:
        table = rotation(jnp.arange(below)[None], width, theta, scaling)
        return jax.lax.optimization_barrier(tuple(jnp.take(x_1PXh[0], positions_BT, axis=0) for x_1PXh in table))
    half = width // 2
    temperature = 1.0
    if scaling is not None and scaling.kind == "ntk":
        theta *= scaling.factor ** (half / (half - 1))
    frequency_h = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:
        frequency_h *= _slowdown(half, theta, scaling)
        temperature = 0.1 * math.log(scaling.factor) + 1 if scaling.kind == "yarn" else 1.0
    angle_BT1h = (positions_BT[..., None].astype(jnp.float32) * frequency_h)[:, :, None, :]
    cos, sin = jnp.cos(angle_BT1h), jnp.sin(angle_BT1h)
    if temperature != 1.0:  # on both queries and keys, so scores get its square
        cos, sin = cos * temperature, sin * temperature
    # Without the barrier XLA fuses sine and cosine into every use, and recomputes them for each head.
    return jax.lax.optimization_barrier((cos, sin))


def _slowdown(half: int, theta: float, s: RopeScaling) -> np.ndarray:
    """Factor of each pair's frequency, from 1 / factor to 1, [h] float32."""
    i_h = np.arange(half)
    if s.kind == "ntk":
        kept_h = np.ones(half)  # the base is already larger
    elif s.kind == "linear":
        kept_h = np.zeros(half)
    elif s.kind == "llama3":
        turns_h = s.original_context * theta ** (-i_h / half) / (2 * math.pi)
        kept_h = (turns_h - s.low) / (s.high - s.low)
    else:
        # yarn: linear in the pair's index, between the pairs that turn `high` and `low` times, rounded outward
        pair = lambda turns: half * math.log(s.original_context / (turns * 2 * math.pi)) / math.log(theta)
        first, last = max(math.floor(pair(s.high)), 0), min(math.ceil(pair(s.low)), 2 * half - 1)
        kept_h = 1 - (i_h - first) / max(last - first, 1e-3)
    kept_h = np.clip(kept_h, 0, 1)
    return (kept_h + (1 - kept_h) / s.factor).astype(np.float32)


def rotary(x_BTNH: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates the pairs (i, i + R/2) of the first R coordinates of every head; the others are unchanged. [B, T, N, H]."""
    cos, sin = rotation
    half = cos.shape[-1]
    first, second, rest = x_BTNH[..., :half], x_BTNH[..., half : 2 * half], x_BTNH[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
