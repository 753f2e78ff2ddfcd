"""Muon: momentum whose matrices are orthogonalised before they are applied.

Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon.
optax.contrib.scale_by_muon computes the same in float32; here the products take the run's operand type, which makes the iteration
cheap, and all layers of a stacked weight go through it together.

l matrices of a stacked weight, m rows, n columns (m <= n)
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpt4o_jax.model.matrices import Matrix
from gpt4o_jax.ops.sums import sum_of_squares

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic: steep at 0, so that five iterations suffice
ITERATIONS = 5


class MuonState(NamedTuple):
    count: jax.Array
    momentum: optax.Updates


def scale_by_muon(beta: float, matrices, dtype) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised, times sqrt(max(1, columns / rows)).

    matrices: tree like the parameters, of Matrix, or optax.MaskedNode for weights of another optimizer.
    dtype: operands of the iteration's products. Bias correction as in optax.contrib.scale_by_muon.
    """

    def init(params):
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None):
        del params
        count = state.count + 1
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.momentum, grads)
        unbias, unbias_next = 1 / (1 - beta**count), 1 / (1 - beta ** (count + 1))
        ahead = jax.tree.map(lambda m, g: beta * unbias_next * m + (1 - beta) * unbias * g, momentum, grads)
        updates = jax.tree.map(lambda u, matrix: _apply(u, matrix, dtype), ahead, matrices)
        return updates, MuonState(count, momentum)

    return optax.GradientTransformation(init, update)


def _apply(u, matrix: Matrix, dtype):
    layers = tuple(i for i in range(u.ndim) if i not in matrix.rows + matrix.columns)
    order = layers + matrix.rows + matrix.columns
    rows, columns = (math.prod(u.shape[i] for i in axes) for axes in matrix)
    stacked_lmn = u.transpose(order).reshape(-1, rows, columns)
    out = orthogonalise(stacked_lmn, dtype) * max(1.0, columns / rows) ** 0.5
    inverse = sorted(range(u.ndim), key=order.__getitem__)
    return out.reshape([u.shape[i] for i in order]).transpose(inverse)


def orthogonalise(x_lmn: jax.Array, dtype) -> jax.Array:
    """U V^T of each matrix's singular value decomposition U S V^T, approximately: singular values end near 1. Float32, as x_lmn.

    Newton-Schulz iteration x <- a x + (b A + c A^2) x with A = x x^T, on the form that is at least as wide as tall.
    """
    if x_lmn.shape[1] > x_lmn.shape[2]:
        return orthogonalise(x_lmn.swapaxes(1, 2), dtype).swapaxes(1, 2)

    def product(spec, p, q):
        return jnp.einsum(spec, p.astype(dtype), q.astype(dtype), preferred_element_type=jnp.float32)

    a, b, c = COEFFICIENTS
    x_lmn = x_lmn / (jnp.sqrt(sum_of_squares(x_lmn, keep=1))[:, None, None] + 1e-8)
    for _ in range(ITERATIONS):
        gram_lmm = product("lmn,lkn->lmk", x_lmn, x_lmn)
        poly_lmm = b * gram_lmm + c * product("lmk,lkj->lmj", gram_lmm, gram_lmm)
        x_lmn = a * x_lmn + product("lmk,lkn->lmn", poly_lmm, x_lmn)
    return x_lmn
