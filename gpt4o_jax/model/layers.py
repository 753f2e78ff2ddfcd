"""Norms, parameter initialisers and parameters with named axes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt4o_jax.ops.adapted import Adapted
from gpt4o_jax.ops.sums import add_bias, multiply_scale, written
from gpt4o_jax.ops.weights import Weight


def param(module: nn.Module, name: str, init, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
    """A float32 parameter of `shape`, with logical axis names (parallel/rules.py).

    If the params hold a quantised Weight or an Adapted (LoRA) under this name, that is returned instead.
    """
    if module.has_variable("params", name) and isinstance(given := module.get_variable("params", name), Weight | Adapted):
        return given
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


def normal(std: float):
    """Initialiser: normal with this standard deviation."""
    return nn.initializers.normal(std)


def constant(*values: float):
    """Initialiser of a vector with these values."""
    return lambda key, shape, dtype: jnp.array(values, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def rms_normalise(x: jax.Array, eps: float, axes: int | tuple[int, ...] = -1) -> jax.Array:
    """x / root-mean-square of its last axis (or of `axes`), without parameters (arXiv:1910.07467)."""
    return _normalised(x, eps, axes)[0]


def _normalised(x, eps, axes):
    """(y, residuals of the gradient)."""
    inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=axes, keepdims=True) + eps)
    return x * inverse, (x * inverse, inverse)


def _normalised_gradient(eps, axes, saved, g):
    y, inverse = saved
    return (inverse * (g - y * jnp.mean(written(g * y), axis=axes, keepdims=True)),)


rms_normalise.defvjp(_normalised, _normalised_gradient)


def scale(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], unit_offset: bool) -> jax.Array:
    """The scale of a norm, initially 1. unit_offset: the parameter is scale - 1, so that weight decay pulls the scale to 1."""
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
        x = multiply_scale(rms_normalise(x, self.eps), scale(self, "scale", width, ("norm",), self.unit_offset))
        if self.kind == "layer" and self.bias:
            x = add_bias(x, param(self, "bias", nn.initializers.zeros, width, ("norm",)))
        return x
