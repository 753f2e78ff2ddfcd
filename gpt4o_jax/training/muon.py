"""Muon: momentum whose matrices are orthogonalised before they are applied.

Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon.
optax.contrib.scale_by_muon computes the same in float32; here the products take the run's operand type, which makes the iteration
cheap, and all layers of a stacked weight go through it together, distributed over the devices that share them.

l matrices of a stacked weight, m rows, n columns (m <= n)
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpt4o_jax.model.matrices import hidden_matrix
from gpt4o_jax.ops.compute import precision
from gpt4o_jax.ops.sums import sum_of_squares
from gpt4o_jax.parallel import per_shard, spec

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic: steep at 0, so that five iterations suffice
ITERATIONS = 5


class MuonState(NamedTuple):
    count: jax.Array
    momentum: optax.Updates


def scale_by_muon(beta: float, axes, dtype) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised, times sqrt(max(1, columns / rows)).

    axes: tree like the parameters, of the names of their axes, or optax.MaskedNode for weights of another optimizer.
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
        updates = jax.tree.map(lambda u, names: _apply(u, names, dtype), ahead, axes)
        return updates, MuonState(count, momentum)

    return optax.GradientTransformation(init, update)


def _apply(u, names: tuple[str, ...], dtype):
    """The scaled, orthogonalised matrices of a stacked weight; names: of its axes."""
    if jax.sharding.get_abstract_mesh().empty:
        return _of_shard(u, [()] * u.ndim, names, dtype)
    split = [(axes,) if isinstance(axes, str) else axes or () for axes in spec(names)]
    return per_shard(lambda u: _of_shard(u, split, names, dtype), [names], names)(u)


def _of_shard(u, split: list[tuple[str, ...]], names: tuple[str, ...], dtype):
    """A device's shard of _apply's result from its shard u; split: the mesh axes that each axis is split over.

    The devices that share matrices exchange parts by all-to-all, so that each gets some of the matrices whole, and return them in
    the same way. Otherwise every product of the iteration would gather all matrices. A stack of few leaves some devices idle.
    """
    matrix = hidden_matrix(names)
    stacked = tuple(i for i in range(u.ndim) if i not in matrix.rows + matrix.columns)
    order = stacked + matrix.rows + matrix.columns
    parts = u.transpose(order)
    x = parts.reshape(-1, *parts.shape[len(stacked) :])
    count = x.shape[0]
    # (mesh axis, axis of x), minor mesh axes first, as they are joined; size 1 is left out because XLA:CPU would copy x
    shared = [(name, at) for at, i in enumerate(order[len(stacked) :], 1) for name in reversed(split[i])]
    shared = [(name, at) for name, at in shared if jax.lax.axis_size(name) > 1]
    ways = math.prod(jax.lax.axis_size(name) for name, _ in shared)
    x = jnp.pad(x, [(0, -count % ways)] + [(0, 0)] * (x.ndim - 1))
    for name, at in shared:
        x = jax.lax.all_to_all(x, name, split_axis=0, concat_axis=at, tiled=True)
    rows = math.prod(x.shape[1 : 1 + len(matrix.rows)])
    x_lmn = x.reshape(x.shape[0], rows, -1)
    x = (orthogonalise(x_lmn, dtype) * max(1.0, x_lmn.shape[2] / rows) ** 0.5).reshape(x.shape)
    for name, at in reversed(shared):
        x = jax.lax.all_to_all(x, name, split_axis=at, concat_axis=0, tiled=True)
    inverse = sorted(range(u.ndim), key=order.__getitem__)
    return x[:count].reshape(parts.shape).transpose(inverse)


def orthogonalise(x_lmn: jax.Array, dtype) -> jax.Array:
    """U V^T of each matrix's singular value decomposition U S V^T, approximately: singular values end near 1. Float32, as x_lmn.

    Newton-Schulz iteration x <- a x + (b A + c A^2) x with A = x x^T, on the form that is at least as wide as tall.
    """
    if x_lmn.shape[1] > x_lmn.shape[2]:
        return orthogonalise(x_lmn.swapaxes(1, 2), dtype).swapaxes(1, 2)

    def product(spec, p, q):
        p, q = p.astype(dtype), q.astype(dtype)
        return jnp.einsum(spec, p, q, preferred_element_type=jnp.float32, precision=precision(dtype))

    a, b, c = COEFFICIENTS
    x_lmn = x_lmn / (jnp.sqrt(sum_of_squares(x_lmn, keep=1))[:, None, None] + 1e-8)

    def iteration(_, x_lmn):
        gram_lmm = product("lmn,lkn->lmk", x_lmn, x_lmn)
        poly_lmm = b * gram_lmm + c * product("lmk,lkj->lmj", gram_lmm, gram_lmm)
        return a * x_lmn + product("lmk,lkn->lmn", poly_lmm, x_lmn)

    return jax.lax.fori_loop(0, ITERATIONS, iteration, x_lmn)  # unrolled, a step takes 1.4 times as long to compile for TPUs
