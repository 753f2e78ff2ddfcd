"""Sums in a form that XLA:CPU runs at memory speed; on other platforms they are plain sums.

XLA:CPU (jaxlib 0.10) moves the arithmetic before a sum into the sum, and in programs with products turns a sum over rows, or over
several axes, into a windowed one. Both are ten to a hundred times slower than reading the array.
"""

import jax
import jax.numpy as jnp


def written(x):
    """x, on CPU written to memory before it is summed."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def sum_over_rows(x: jax.Array, ndim: int) -> jax.Array:
    """Sum over all but the last `ndim` axes; on CPU as a product with ones."""
    rows = tuple(range(x.ndim - ndim))

    def as_product(x):
        return jax.lax.dot_general(jnp.ones(x.shape[: len(rows)], x.dtype), x, ((rows, rows), ((), ())))

    return jax.lax.platform_dependent(x, cpu=as_product, default=lambda x: jnp.sum(x, axis=rows))


def sum_of_squares(x: jax.Array, keep: int = 0) -> jax.Array:
    """Sum of x**2 over all axes but the first `keep`: along the last axis first, then the rest."""
    if x.ndim <= keep:
        return jnp.square(x)
    rows = jnp.sum(jnp.square(x), axis=-1)
    return jnp.sum(written(rows), axis=tuple(range(keep, rows.ndim)))


def global_norm(tree) -> jax.Array:
    """Euclidean norm of all leaves together."""
    return jnp.sqrt(sum(sum_of_squares(x) for x in jax.tree.leaves(tree)))


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x + bias, where bias has the last axes of x."""
    return x + bias


add_bias.defvjp(lambda x, bias: (x + bias, bias.ndim), lambda ndim, g: (g, sum_over_rows(g, ndim)))


@jax.custom_vjp
def multiply_scale(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x * scale, where scale has the last axes of x."""
    return x * scale


multiply_scale.defvjp(lambda x, s: (x * s, (x, s)), lambda saved, g: (g * saved[1], sum_over_rows(g * saved[0], saved[1].ndim)))
