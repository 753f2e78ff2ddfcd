"""A weight with a low-rank change beside it: W + scale * A B, which training never adds up.

Source: LoRA, Hu et al. 2021, arXiv:2106.09685.

r rank
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "A", "B"], meta_fields=["scale"])
@dataclasses.dataclass(frozen=True)
class Adapted:
    """Replaces a parameter whose product sums over some axes and produces others. Leading axes (layers, experts) are allowed."""

    base: jax.Array  # [..., *summed, *outputs]
    A: jax.Array  # [..., *summed, r]
    B: jax.Array  # [..., r, *outputs]
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape


def change(w: Adapted) -> jax.Array:
    """scale * A B, multiplied in float32, with the shape of the base."""
    leading = w.A.ndim + w.B.ndim - 2 - w.base.ndim
    A_lSr = w.A.reshape(*w.A.shape[:leading], -1, w.A.shape[-1])
    B_lrO = w.B.reshape(*w.B.shape[: leading + 1], math.prod(w.B.shape[leading + 1 :]))
    return w.scale * jnp.matmul(A_lSr, B_lrO, precision=jax.lax.Precision.HIGHEST).reshape(w.base.shape)
