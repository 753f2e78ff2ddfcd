"""Next-token cross-entropy that never holds the logits of a whole batch.

B batch, T positions, D model width, V vocabulary, c positions in one chunk
"""

import functools

import jax
import jax.numpy as jnp

from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.products import product


def cross_entropy(hidden_BTD, unembed_DV, targets_BT, weights_BT, chunk: int, compute: Compute) -> jax.Array:
    """Sum over positions of weight * -log softmax(hidden @ unembed)[target], in nats. Float32.

    Logits exist for `chunk` positions of each row at a time. The gradient is computed in
    the forward pass, chunk by chunk, and only scaled in the backward one: three products
    in all, where recomputing the logits would take four (the idea is Liger Kernel's,
    arXiv:2410.10989).
    """
    return _weighted_sum(min(chunk, hidden_BTD.shape[1]), compute, hidden_BTD, unembed_DV, targets_BT, weights_BT)


def token_scores(hidden_BTD, unembed_DV, targets_BT, chunk: int, compute: Compute):
    """Per position: negative log-likelihood of the target in nats, and whether it ranks first. [B, T] each."""

    def scores(h_BcD, y_Bc):
        logits_BcV = product("BTD,DV->BTV", h_BcD, unembed_DV, compute)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted_sum(chunk, compute, hidden_BTD, unembed_DV, targets_BT, weights_BT):
    def body(total, c):
        h_BcD, y_Bc, weight_Bc = c
        nll_Bc, _ = _nll(product("BTD,DV->BTV", h_BcD, unembed_DV, compute), y_Bc)
        return total + jnp.sum(nll_Bc * weight_Bc), None

    chunks = tuple(_chunks(x, chunk) for x in (hidden_BTD, targets_BT, weights_BT))
    return jax.lax.scan(body, jnp.zeros((), jnp.float32), chunks)[0]


def _forward(chunk, compute, hidden_BTD, unembed_DV, targets_BT, weights_BT):
    def body(carry, c):
        total, d_unembed_DV = carry
        h_BcD, y_Bc, weight_Bc = c
        logits_BcV, pullback = jax.vjp(lambda h, u: product("BTD,DV->BTV", h, u, compute), h_BcD, unembed_DV)
        nll_Bc, normaliser_Bc = _nll(logits_BcV, y_Bc)
        is_target_BcV = jnp.arange(logits_BcV.shape[-1]) == y_Bc[..., None]
        d_logits_BcV = (jnp.exp(logits_BcV - normaliser_Bc[..., None]) - is_target_BcV) * weight_Bc[..., None]
        d_h_BcD, d_u_DV = pullback(d_logits_BcV)
        return (total + jnp.sum(nll_Bc * weight_Bc), d_unembed_DV + d_u_DV), (d_h_BcD, nll_Bc)

    chunks = tuple(_chunks(x, chunk) for x in (hidden_BTD, targets_BT, weights_BT))
    start = (jnp.zeros((), jnp.float32), jnp.zeros(unembed_DV.shape, jnp.float32))
    (total, d_unembed_DV), (d_hidden, nll) = jax.lax.scan(body, start, chunks)
    T = hidden_BTD.shape[1]
    return total, (_join(d_hidden)[:, :T], d_unembed_DV, _join(nll)[:, :T])


def _backward(chunk, compute, saved, g):
    d_hidden_BTD, d_unembed_DV, nll_BT = saved
    return d_hidden_BTD * g, d_unembed_DV * g, None, nll_BT * g


_weighted_sum.defvjp(_forward, _backward)
