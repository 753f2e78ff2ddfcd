"""Next-token cross-entropy that never holds the logits of a whole batch.

B batch, T positions, D model width, V vocabulary, c positions in one chunk
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.products import product


class LossSums(NamedTuple):
    """Sums over positions, float32. Only `total` has a gradient: the others are what it is made of."""

    total: jax.Array
    nll: jax.Array  # weight * negative log-likelihood, in nats
    z_loss: jax.Array  # weight * coefficient * squared log-normaliser


def cross_entropy(
    hidden_BTD, unembed_DV, targets_BT, weights_BT, chunk: int, compute: Compute, softcap: float = 0.0, z_loss: float = 0.0
) -> LossSums:
    """Weighted sum of -log softmax(logits)[target] + z_loss * logsumexp(logits)^2, logits as in `capped_logits`.

    z_loss keeps the normaliser near 1 (PaLM, arXiv:2204.02311, section 5).
    Logits exist for `chunk` positions of each row at a time. The gradient is computed in
    the forward pass, chunk by chunk, and only scaled in the backward one: three products
    in all, where recomputing the logits would take four (the idea is Liger Kernel's,
    arXiv:2410.10989).
    """
    how = (min(chunk, hidden_BTD.shape[1]), compute, softcap, z_loss)
    return LossSums(*_weighted_sums(how, hidden_BTD, unembed_DV, targets_BT, weights_BT))


def capped_logits(hidden_BTD, unembed_DV, compute: Compute, softcap: float) -> jax.Array:
    """hidden @ unembed, then softcap * tanh(logits / softcap) unless softcap is 0 (Gemma 2, arXiv:2408.00118). Float32."""
    logits_BTV = product("BTD,DV->BTV", hidden_BTD, unembed_DV, compute)
    return softcap * jnp.tanh(logits_BTV / softcap) if softcap else logits_BTV


def token_scores(hidden_BTD, unembed_DV, targets_BT, chunk: int, compute: Compute, softcap: float = 0.0):
    """Per position: negative log-likelihood of the target in nats, and whether it ranks first. [B, T] each."""

    def scores(h_BcD, y_Bc):
        logits_BcV = capped_logits(h_BcD, unembed_DV, compute, softcap)
        nll_Bc, _ = _nll(logits_BcV, y_Bc)
        return nll_Bc, jnp.argmax(logits_BcV, axis=-1) == y_Bc

    chunk = min(chunk, hidden_BTD.shape[1])
    chunks = (_chunks(hidden_BTD, chunk), _chunks(targets_BT, chunk))
    nll, first = jax.lax.map(lambda c: scores(*c), chunks)
    T = targets_BT.shape[1]
    return _join(nll)[:, :T], _join(first)[:, :T]


def _nll(logits_BcV, y_Bc):
    """(-log p(target), log normaliser); the target's logit by a masked sum, which stays local on a sharded V."""
    normaliser_Bc = jax.nn.logsumexp(logits_BcV, axis=-1)
    is_target_BcV = jnp.arange(logits_BcV.shape[-1]) == y_Bc[..., None]
    return normaliser_Bc - jnp.sum(jnp.where(is_target_BcV, logits_BcV, 0.0), axis=-1), normaliser_Bc


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
    chunk, compute, softcap, z_loss = how

    def body(sums, c):
        h_BcD, y_Bc, weight_Bc = c
        nll_Bc, normaliser_Bc = _nll(capped_logits(h_BcD, unembed_DV, compute, softcap), y_Bc)
        return _add(sums, nll_Bc, z_loss * normaliser_Bc**2, weight_Bc), None

    chunks = tuple(_chunks(x, chunk) for x in (hidden_BTD, targets_BT, weights_BT))
    return jax.lax.scan(body, (jnp.zeros((), jnp.float32),) * 3, chunks)[0]


def _add(sums, nll_Bc, z_Bc, weight_Bc):
    """(total, nll, z-loss) with those of a chunk added."""
    return tuple(a + jnp.sum(x * weight_Bc) for a, x in zip(sums, (nll_Bc + z_Bc, nll_Bc, z_Bc), strict=True))


def _forward(how, hidden_BTD, unembed_DV, targets_BT, weights_BT):
    chunk, compute, softcap, z_loss = how

    def body(carry, c):
        sums, d_unembed_DV = carry
        h_BcD, y_Bc, weight_Bc = c
        logits_BcV, pullback = jax.vjp(lambda h, u: capped_logits(h, u, compute, softcap), h_BcD, unembed_DV)
        top_Bc = jnp.max(logits_BcV, axis=-1)
        # Written once, read twice: XLA:CPU would compute the exponentials again inside the sum, and there ten times slower.
        exp_BcV = jax.lax.optimization_barrier(jnp.exp(logits_BcV - top_Bc[..., None]))
        total_Bc = jnp.sum(exp_BcV, axis=-1)
        normaliser_Bc = top_Bc + jnp.log(total_Bc)
        is_target_BcV = jnp.arange(logits_BcV.shape[-1]) == y_Bc[..., None]
        nll_Bc = normaliser_Bc - jnp.sum(jnp.where(is_target_BcV, logits_BcV, 0.0), axis=-1)
        z_Bc = z_loss * normaliser_Bc**2
        slope_Bc = (1 + 2 * z_loss * normaliser_Bc) / total_Bc
        d_h_BcD, d_u_DV = pullback((exp_BcV * slope_Bc[..., None] - is_target_BcV) * weight_Bc[..., None])
        return (_add(sums, nll_Bc, z_Bc, weight_Bc), d_unembed_DV + d_u_DV), (d_h_BcD, nll_Bc + z_Bc)

    chunks = tuple(_chunks(x, chunk) for x in (hidden_BTD, targets_BT, weights_BT))
    start = ((jnp.zeros((), jnp.float32),) * 3, jnp.zeros(unembed_DV.shape, jnp.float32))
    (sums, d_unembed_DV), (d_hidden, per_position) = jax.lax.scan(body, start, chunks, unroll=2)
    T = hidden_BTD.shape[1]
    return sums, (_join(d_hidden)[:, :T], d_unembed_DV, _join(per_position)[:, :T])


def _backward(how, saved, g):
    d_hidden_BTD, d_unembed_DV, per_position_BT = saved
    g_total, _, _ = g
    return d_hidden_BTD * g_total, d_unembed_DV * g_total, None, per_position_BT * g_total


_weighted_sums.defvjp(_forward, _backward)
