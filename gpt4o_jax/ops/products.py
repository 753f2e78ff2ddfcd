"""Matrix products with a chosen operand type and float32 sums.

On CPUs with AVX512-BF16, on GPUs and on TPUs, a product of bfloat16 operands that accumulates in float32 is much faster than a
float32 one. Automatic differentiation would pass a float32 cotangent to the backward products and lose that, so the rule is
written out here.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from gpt4o_jax.ops.adapted import Adapted
from gpt4o_jax.ops.compute import Compute, precision
from gpt4o_jax.ops.weights import Weight, weight_product

# XLA:CPU has no kernel for bfloat16 vectors (12 to 25 times slower than float32), and gains nothing with a few rows. One rule for
# all few-row products: with a draft model, several tokens are computed together and should give the same results.
FEW_ROWS = 8


def product(spec: str, x: jax.Array, w: jax.Array | Weight | Adapted, compute: Compute) -> jax.Array:
    """einsum(spec, x, w), operands rounded to compute.dtype, float32 result. A Weight has its own precision and no gradient.

    Sums over the last axes of x and the first of w, without batch axes: "BTD,DNH->BTNH".
    The gradient's two products round their operands too. On CPU fewer than FEW_ROWS rows are multiplied in float32.
    """
    if isinstance(w, Weight):
        return weight_product(x, w, compute)
    if isinstance(w, Adapted):
        return product(spec, x, w.base, compute) + _change(spec, x, w, compute)
    if _in_float32(spec, x, compute):
        return _plain(spec, x, w, compute)
    return _rounded(spec, compute, x, w)


def _change(spec: str, x, w: Adapted, compute: Compute):
    """An adapter's contribution to product(spec, x, w): scale * (x A) B."""
    a, b, out = spec.replace("->", ",").split(",")
    kept = "".join(i for i in a if i in out)
    summed, outputs = a[len(kept) :], b[len(a) - len(kept) :]
    x_r = product(f"{a},{summed}r->{kept}r", x, w.A, compute)
    return w.scale * product(f"{kept}r,r{outputs}->{out}", x_r, w.B, compute)


def _in_float32(spec: str, x, compute: Compute) -> bool:
    a, _, out = spec.replace("->", ",").split(",")
    rows = math.prod(size for i, size in zip(a, x.shape, strict=True) if i in out)
    return compute.operand == jnp.float32 or (compute.platform == "cpu" and rows < FEW_ROWS)


def _plain(spec: str, x, w, compute: Compute):
    a, _, out = spec.replace("->", ",").split(",")
    n = sum(i not in out for i in a)
    if compute.platform != "cpu" or n == 1:
        return jnp.einsum(spec, x, w, preferred_element_type=jnp.float32, precision=precision(jnp.float32))
    # With several summed axes, XLA:CPU would transpose a copy of w for every generated token.
    flat = jnp.einsum("...K,KN->...N", x.reshape(*x.shape[:-n], -1), w.reshape(math.prod(w.shape[:n]), -1))
    return flat.reshape(*x.shape[:-n], *w.shape[n:])


def joint_product(specs: list[str], x: jax.Array, ws: list[jax.Array | Weight | Adapted], compute: Compute) -> list[jax.Array]:
    """product(spec, x, w) for several weights that read the same x and sum over its last axis.

    On CPU in bfloat16, one wide product: the narrow query, key and value products keep two cores busy only half of the time.
    """
    if any(isinstance(w, Adapted) for w in ws):
        ys = joint_product(specs, x, [w.base if isinstance(w, Adapted) else w for w in ws], compute)
        return [y + _change(s, x, w, compute) if isinstance(w, Adapted) else y for s, y, w in zip(specs, ys, ws, strict=True)]
    if compute.platform != "cpu" or _in_float32(specs[0], x, compute) or isinstance(ws[0], Weight):
        return [product(spec, x, w, compute) for spec, w in zip(specs, ws, strict=True)]
    widths = [w.size // w.shape[0] for w in ws]
    joint = jnp.concatenate([w.reshape(w.shape[0], -1) for w in ws], axis=1)
    parts = jnp.split(product("BTD,DF->BTF", x, joint, compute), list(itertools.accumulate(widths))[:-1], axis=-1)
    return [part.reshape(*x.shape[:-1], *w.shape[1:]) for part, w in zip(parts, ws, strict=True)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounded(spec, compute, x, w):
    return _einsum(spec, compute, x.astype(compute.operand), w.astype(compute.operand))


def _forward(spec, compute, x, w):
    x, w = x.astype(compute.operand), w.astype(compute.operand)
    return _einsum(spec, compute, x, w), (x, w)


def _backward(spec, compute, operands, g):
    x, w = operands
    a, b, out = spec.replace("->", ",").split(",")
    g = g.astype(compute.operand)
    return _einsum(f"{out},{b}->{a}", compute, g, w), _einsum(f"{a},{out}->{b}", compute, x, g)


_rounded.defvjp(_forward, _backward)


def _einsum(spec, compute, x, y):
    if compute.platform == "cpu":
        return _flat_dot(spec, x, y)
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _flat_dot(spec, x, y):
    """The same einsum as one product of two matrices.

    XLA's fast CPU kernel for bfloat16 (jaxlib 0.10) needs rank-2 operands, the left one contracted over its minor axis; anything
    else is first cast to float32, at half the speed. The layout constraint forces the transposition of the left operand.
    """
    a, b, out = spec.replace("->", ",").split(",")
    summed = [i for i in a if i not in out]
    size = dict(zip(a, x.shape, strict=True)) | dict(zip(b, y.shape, strict=True))
    k = math.prod(size[i] for i in summed)
    transposed = a[: len(summed)] == "".join(summed)
    x = with_layout_constraint(x.reshape(k, -1).T, Layout((0, 1))) if transposed else x.reshape(-1, k)
    if b[: len(summed)] == "".join(summed):
        flat = jnp.dot(x, y.reshape(k, -1), preferred_element_type=jnp.float32)
    else:
        flat = jnp.einsum("mk,nk->mn", x, y.reshape(-1, k), preferred_element_type=jnp.float32)
    if transposed:
        # A weight's gradient. If the weight was used transposed (tied embeddings), XLA would fold the transposition of this
        # result into the product, and then find no kernel for it.
        flat = jax.lax.optimization_barrier(flat)
    return flat.reshape([size[i] for i in out])
