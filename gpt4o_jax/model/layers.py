"""Norms, parameter initialisers and parameters with named axes."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt4o_jax.ops.weights import Weight


def param(module: nn.Module, name: str, init, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
    """A float32 parameter whose axes carry the logical names of parallel/rules.py, or the Weight that stands for it."""
    if module.has_variable("params", name) and isinstance(given := module.get_variable("params", name), Weight):
        return given
    value = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    return value


def normal(std: float):
    return nn.initializers.normal(std)


def constant(*values: float):
    """An initialiser that gives these numbers."""
    return lambda key, shape, dtype: jnp.array(values, dtype)


def rms_normalise(x: jax.Array, eps: float, axes: int | tuple[int, ...] = -1) -> jax.Array:
    """x / root-mean-square of its last axis (or of `axes`), without parameters (arXiv:1910.07467)."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=axes, keepdims=True) + eps)


def scale(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], unit_offset: bool) -> jax.Array:
    """What a norm multiplies by: 1 at the start. unit_offset: the parameter is its distance from 1, so that decay pulls to 1."""
    if unit_offset:
        return 1 + param(module, name, nn.initializers.zeros, shape, axes)
    return param(module, name, nn.initializers.ones, shape, axes)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, in float32, with a learned scale.

    kind: "rms" or "layer"; bias: whether LayerNorm also learns an offset; unit_offset: see `scale`.
    """

    kind: str
    eps: float
    bias: bool
    unit_offset: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        width = (x.shape[-1],)
        if self.kind == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = rms_normalise(x, self.eps) * scale(self, "scale", width, ("norm",), self.unit_offset)
        if self.kind == "layer" and self.bias:
            x = x + param(self, "bias", nn.initializers.zeros, width, ("norm",))
        return x
