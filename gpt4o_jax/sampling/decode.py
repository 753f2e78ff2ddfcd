"""The compiled part of generation: one call for the prompts (prefill), then calls of several single-token steps (decode).

P prompts, B rows (one per sample of a prompt), T prompt positions, S cache slots, D model width, V vocabulary,
n tokens per decode call
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt4o_jax.data.tokenizer import Symbols
from gpt4o_jax.model.cache import Cache, empty_cache, grow, take_rows
from gpt4o_jax.model.gpt import GPT, unembed
from gpt4o_jax.parallel import replicated
from gpt4o_jax.sampling import logits as lg
from gpt4o_jax.sampling.logits import Chosen, Sampling, Seen

DECODE_CHUNK = 16  # most tokens between two reads of the results: enough to hide the dispatch


class State(NamedTuple):
    """The state between calls. A row's last token is chosen but not in its cache yet."""

    cache: Cache
    token_B: jax.Array
    positions_B: jax.Array  # of that token
    keys_B: jax.Array
    seen: Seen | None  # None: not needed, there are no penalties


def bucket(n: int, limit: int, least: int = 32) -> int:
    """n rounded up to `least` times a power of 2, but at most `limit`: few shapes, few compilations."""
    size = least
    while size < n:
        size *= 2
    return min(size, limit)


def with_room(model: GPT, state: State, slots: int) -> State:
    """The state with at least `slots` slots in its cache. Attention reads all of them, so the cache grows with the text."""
    return state._replace(cache=grow(model.config, state.cache, slots))


def prefill(model: GPT, params, tokens_PT, lengths_P, slots: int):
    """Runs the prompts: (cache of `slots` slots, hidden state of each prompt's last token [P, D])."""
    P, T = tokens_PT.shape
    index_PT = jnp.broadcast_to(jnp.arange(T), (P, T))
    segments_PT = (index_PT < lengths_P[:, None]).astype(jnp.int32)
    cache = empty_cache(model.config, P, slots, model.compute.kv_cache)
    hidden_PTD, cache, _ = model.apply({"params": params}, tokens_PT, index_PT, segments_PT, cache)
    return cache, jnp.take_along_axis(hidden_PTD, (lengths_P - 1)[:, None, None], axis=1)[:, 0]


def drawable_logits(model: GPT, params, hidden_BTD, allowed_V: np.ndarray):
    """Logits [B, T, V], -inf for tokens that are not allowed."""
    return jnp.where(allowed_V, unembed(model, params, hidden_BTD), -jnp.inf)


def start(model: GPT, sampling: Sampling, allowed_V, params, tokens_PT, lengths_P, keys_B, slots: int) -> tuple[State, Chosen]:
    """Prefills the prompts once, repeats each for its rows and chooses the first token of every row: (State, Chosen [B])."""
    cache, last_PD = prefill(model, params, tokens_PT, lengths_P, slots)
    logits_PV = drawable_logits(model, params, last_PD[:, None], allowed_V)[:, 0]
    seen = None
    if sampling.penalised:
        valid_PT = jnp.arange(tokens_PT.shape[1]) < lengths_P[:, None]
        seen = lg.seen_in_prompt(tokens_PT, valid_PT, allowed_V.size)
    prompt_B = jnp.repeat(jnp.arange(len(lengths_P)), len(keys_B) // len(lengths_P))
    if len(keys_B) > len(lengths_P):
        cache = take_rows(cache, prompt_B)
    logits_BV, positions_B = logits_PV[prompt_B], lengths_P[prompt_B]
    seen = jax.tree.map(lambda x: x[prompt_B], seen)
    token_B = lg.choose(logits_BV, lg.at_positions(keys_B, positions_B), sampling, seen)
    return State(cache, token_B, positions_B, keys_B, lg.also_seen(seen, token_B)), lg.told(logits_BV, token_B, sampling)


@functools.lru_cache(maxsize=8)
def functions(model: GPT, sampling: Sampling, slots: int, vocab_size: int | None, symbols: Symbols, chunk: int):
    """(start, decode), jitted: start(params, tokens_PT, lengths_P, keys_B) and decode(params, state, done_B).

    slots: the most that rows will need; the cache starts smaller, and before each call it must have room for the call's tokens
    (`with_room`). chunk: tokens per call of decode. Both return (state, (Chosen of [n, B], None)); None: all tokens are kept,
    unlike in sampling/speculative.py. Raises RunError if `sampling` names tokens that do not exist or are never drawn.
    """
    allowed_V = lg.drawable(sampling, model.config.vocab_size, vocab_size, symbols)
    ends = np.array(lg.endings(sampling, symbols))

    @jax.jit
    def first(params, tokens_PT, lengths_P, keys_B):
        at_first = bucket(tokens_PT.shape[1] + chunk, slots)
        state, chosen = start(model, sampling, allowed_V, params, tokens_PT, lengths_P, keys_B, at_first)
        return state, (replicated(jax.tree.map(lambda x: x[None], chosen)), None)

    @functools.partial(jax.jit, donate_argnums=1)
    def decode(params, state: State, done_B):
        def one(carry, _):
            state, done_B = carry
            # A finished row is still computed but writes nothing: its token counts as padding.
            alive_B1 = (~done_B & (state.positions_B < slots)).astype(jnp.int32)[:, None]
            hidden_B1D, cache, _ = model.apply(
                {"params": params}, state.token_B[:, None], state.positions_B[:, None], alive_B1, state.cache
            )
            logits_BV = drawable_logits(model, params, hidden_B1D, allowed_V)[:, 0]
            positions_B = state.positions_B + 1
            token_B = lg.choose(logits_BV, lg.at_positions(state.keys_B, positions_B), sampling, state.seen)
            done_B |= jnp.isin(token_B, ends)
            state = State(cache, token_B, positions_B, state.keys_B, lg.also_seen(state.seen, token_B))
            return (state, done_B), lg.told(logits_BV, token_B, sampling)

        (state, _), chosen = jax.lax.scan(one, (state, done_B), None, length=chunk)
        return state, (replicated(chosen), None)

    return first, decode
