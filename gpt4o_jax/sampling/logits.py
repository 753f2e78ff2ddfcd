"""From logits to a token: pure functions on logits_BV.

B rows, V vocabulary
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose the next token. Filters apply in the order of the fields.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave everything in.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def filter_logits(logits_BV: jax.Array, s: Sampling) -> jax.Array:
    """Logits over temperature, with what the filters exclude at -inf.

    top_k: the k largest (ties by lower id). top_p: the fewest tokens, most probable first, whose
    probability reaches p (nucleus sampling, arXiv:1904.09751), of what top_k left. min_p: those at
    least min_p times as probable as the best (arXiv:2407.01082). The best token always stays.
    """
    logits_BV = logits_BV / s.temperature
    if not (s.top_k or s.top_p < 1 or s.min_p):
        return logits_BV
    order_BV = jnp.argsort(-logits_BV, axis=-1)  # stable
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    rank_V = jnp.arange(logits_BV.shape[-1])
    keep_BV = jnp.broadcast_to(rank_V < (s.top_k or rank_V.size), sorted_BV.shape)
    p_BV = jax.nn.softmax(jnp.where(keep_BV, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    keep_BV &= (before_BV < s.top_p) & (p_BV >= s.min_p * p_BV[:, :1])
    keep_BV = keep_BV.at[:, 0].set(True)
    keep_BV = jnp.take_along_axis(keep_BV, jnp.argsort(order_BV, axis=-1), axis=-1)
    return jnp.where(keep_BV, logits_BV, -jnp.inf)


def choose(logits_BV: jax.Array, keys_B: jax.Array, s: Sampling) -> jax.Array:
    """One token id for each row, drawn with that row's own key. int32 [B]."""
    if s.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    filtered_BV = filter_logits(logits_BV, s)
    return jax.vmap(jax.random.categorical)(keys_B, filtered_BV).astype(jnp.int32)
