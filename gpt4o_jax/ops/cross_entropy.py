"""Next-token cross-entropy that never holds a whole batch's logits.

B batch, T positions, D model width, V vocabulary, c positions in one chunk
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.products import product


class LossSums(NamedTuple):
    """Sums over positions, float32. Only `total` has a gradient: the others are its parts."""

    total: jax.Array
    nll: jax.Array  # weight * negative log-likelihood, in nats
    z_loss: jax.Array  # weight * coefficient * squared log-normaliser


def cross_entropy(
    hidden_BTD,
    unembed_DV,
    targets_BT,
    weights_BT,
    chunk: int,
    compute: Compute,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    vocab_axis: str | None = None,
) -> LossSums:
    """Weighted sum of -log softmax(logits)[target] + z_loss * logsumexp(logits)^2, logits as in `capped_logits`.

    z_loss keeps the normaliser near 1 (PaLM, arXiv:2204.02311, section 5).
    Logits exist for `chunk` positions of each row at a time. The gradient is computed in the forward pass, chunk by chunk, and
    only scaled in the backward pass: three products in all, where recomputing the logits would take four (an idea of Liger
    Kernel, arXiv:2410.10989).
    vocab_axis: inside a shard_map, the mesh axis that V is split over; the gradient of hidden_BTD is then that of the device's
    part of V.
    """
    how = (min(chunk, hidden_BTD.shape[1]), compute, softcap, z_loss, vocab_axis)
    return LossSums(*_weighted_sums(how, hidden_BTD, unembed_DV, targets_BT, weights_BT))


def capped_logits(hidden_BTD, unembed_DV, compute: Compute, softcap: float) -> jax.Array:
    """hidden @ unembed, then softcap * tanh(logits / softcap) unless softcap is 0 (Gemma 2, arXiv:2408.00118). Float32."""
    logits_BTV = product("BTD,DV->BTV", hidden_BTD, unembed_DV, compute)
    return softcap * jnp.tanh(logits_BTV / softcap) if softcap else logits_BTV


def token_scores(
    hidden_BTD, unembed_DV, targets_BT, chunk: int, compute: Compute, softcap: float = 0.0, vocab_axis: str | None = None
):
    """Per position: negative log-likelihood of the target in nats, and whether it ranks first. [B, T] each.

    The gradient of the first recomputes the logits chunk by chunk, so that a whole batch's are never kept.
    """

    def scores(h_BcD, y_Bc):
        logits_BcV = capped_logits(h_BcD, unembed_DV, compute, softcap)
        # Ties go to the smallest id.
        fixed_BcV, V = jax.lax.stop_gradient(logits_BcV), logits_BcV.shape[-1]
        best_Bc, top_Bc = jnp.argmax(fixed_BcV, axis=-1) + _first_id(V, vocab_axis), jnp.max(fixed_BcV, axis=-1)
        if vocab_axis is not None:
            best_Bc = jnp.where(top_Bc == jax.lax.pmax(top_Bc, vocab_axis), best_Bc, jnp.iinfo(jnp.int32).max)
            best_Bc = jax.lax.pmin(best_Bc, vocab_axis)
        return _parts(logits_BcV, y_Bc, vocab_axis).nll_Bc, best_Bc == y_Bc

    chunk = min(chunk, hidden_BTD.shape[1])
    chunks = (_chunks(hidden_BTD, chunk), _chunks(targets_BT, chunk))
    nll, first = jax.lax.map(jax.checkpoint(lambda c: scores(*c), prevent_cse=False), chunks)
    T = targets_BT.shape[1]
    return _join(nll)[:, :T], _join(first)[:, :T]


class _Parts(NamedTuple):
    """Terms of the loss and its gradient."""

    exp_BcV: jax.Array  # exp(logits - their maximum)
    total_Bc: jax.Array  # sum of exp over V
    is_target_BcV: jax.Array
    normaliser_Bc: jax.Array  # log of the sum of exp of the logits
    nll_Bc: jax.Array


def _parts(logits_BcV, y_Bc, vocab_axis) -> _Parts:
    top_Bc = jax.lax.stop_gradient(jnp.max(logits_BcV, axis=-1))  # affects rounding only
    top_Bc = top_Bc if vocab_axis is None else jax.lax.pmax(top_Bc, vocab_axis)
    # Written once, read twice: XLA:CPU would recompute the exponentials inside the sum, ten times slower.
    exp_BcV = jax.lax.optimization_barrier(jnp.exp(logits_BcV - top_Bc[..., None]))
    total_Bc = _sum(exp_BcV, vocab_axis)
    normaliser_Bc = top_Bc + jnp.log(total_Bc)
    V = logits_BcV.shape[-1]
    is_target_BcV = jnp.arange(V) + _first_id(V, vocab_axis) == y_Bc[..., None]
    nll_Bc = normaliser_Bc - _sum(jnp.where(is_target_BcV, logits_BcV, 0.0), vocab_axis)
    return _Parts(exp_BcV, total_Bc, is_target_BcV, normaliser_Bc, nll_Bc)


def _sum(x_BcV, vocab_axis):
    """Sum over V, including its other shards."""
    sum_Bc = jnp.sum(x_BcV, axis=-1)
    return sum_Bc if vocab_axis is None else jax.lax.psum(sum_Bc, vocab_axis)


def _first_id(V: int, vocab_axis):
    """First token id of this device's part of the vocabulary."""
    return 0 if vocab_axis is None else jax.lax.axis_index(vocab_axis) * V


def _chunks(x, chunk):
    """[B, T, ...] -> [T/c, B, c, ...], the last chunk padded with zeros (whose weight is 0)."""
    pad = -x.shape[1] % chunk
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _join(x):
    """[T/c, B, c, ...] -> [B, T, ...]."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sums(how, hidden_BTD, unembed_DV, targets_BT, weights_BT):
    chunk, compute, softcap, z_loss, vocab_axis = how

    def body(sums, c):
        h_BcD, y_Bc, weight_Bc = c
        p = _parts(capped_logits(h_BcD, unembed_DV, compute, softcap), y_Bc, vocab_axis)
        return _add(sums, p.nll_Bc, z_loss * p.normaliser_Bc**2, weight_Bc), None

    chunks = tuple(_chunks(x, chunk) for x in (hidden_BTD, targets_BT, weights_BT))
    return jax.lax.scan(body, (jnp.zeros((), jnp.float32),) * 3, chunks)[0]


def _add(sums, nll_Bc, z_Bc, weight_Bc):
    """(total, nll, z-loss) plus those of a chunk."""
    return tuple(a + jnp.sum(x * weight_Bc) for a, x in zip(sums, (nll_Bc + z_Bc, nll_Bc, z_Bc), strict=True))


def _forward(how, hidden_BTD, unembed_DV, targets_BT, weights_BT):
    chunk, compute, softcap, z_loss, vocab_axis = how

    def body(carry, c):
        sums, d_unembed_DV = carry
        h_BcD, y_Bc, weight_Bc = c
        logits_BcV, pullback = jax.vjp(lambda h, u: capped_logits(h, u, compute, softcap), h_BcD, unembed_DV)
        p = _parts(logits_BcV, y_Bc, vocab_axis)
        z_Bc = z_loss * p.normaliser_Bc**2
        slope_Bc = (1 + 2 * z_loss * p.normaliser_Bc) / p.total_Bc
        d_h_BcD, d_u_DV = pullback((p.exp_BcV * slope_Bc[..., None] - p.is_target_BcV) * weight_Bc[..., None])
        return (_add(sums, p.nll_Bc, z_Bc, weight_Bc), d_unembed_DV + d_u_DV), (d_h_BcD, p.nll_Bc + z_Bc)

    chunks = tuple(_chunks(x, chunk) for x in (hidden_BTD, targets_BT, weights_BT))
    start = ((jnp.zeros((), jnp.float32),) * 3, jnp.zeros(unembed_DV.shape, jnp.float32))
    (sums, d_unembed_DV), (d_hidden, per_position) = jax.lax.scan(body, start, chunks, unroll=2)
    T = hidden_BTD.shape[1]
    return sums, (_join(d_hidden)[:, :T], d_unembed_DV, _join(per_position)[:, :T])


def _backward(how, saved, g):
    *_, vocab_axis = how
    d_hidden_BTD, d_unembed_DV, per_position_BT = saved
    g_total, _, _ = g
    # Every device holds the same total and receives a share of its cotangent; each part of V needs their sum.
    g_parts = g_total if vocab_axis is None else jax.lax.psum(g_total, vocab_axis)
    return d_hidden_BTD * g_parts, d_unembed_DV * g_parts, None, per_position_BT * g_total


_weighted_sums.defvjp(_forward, _backward)
