"""Speculative decoding: a cheap draft proposes k tokens, the model verifies all of them in one pass.

The text has the model's own distribution, whatever the draft proposes (Leviathan et al., arXiv:2211.17192). At temperature 0, or
if the draft looks tokens up, it is the same text as without a draft, up to the rounding of logits. A rejected token is
overwritten in the cache by the next one at its position; until then its position is after every query.

B rows, k drafted tokens, j = k + 1 tokens per round, P prompts, T prompt positions, S cache slots, D model width, V vocabulary, n
tokens per decode call
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt4o_jax.data.tokenizer import Symbols
from gpt4o_jax.errors import RunError
from gpt4o_jax.model.cache import SPARE, take_rows
from gpt4o_jax.model.gpt import GPT
from gpt4o_jax.parallel import replicated
from gpt4o_jax.sampling import decode as plain
from gpt4o_jax.sampling import logits as lg
from gpt4o_jax.sampling.decode import State
from gpt4o_jax.sampling.logits import Sampling, Seen

MOST_TOKENS = SPARE  # of a draft, per round: sliding-window caches can roll back no more
PROPOSE, JUDGE, REPLACE = 1, 2, 3  # folded into the key of a position: proposal and verdict must be independent
NGRAM = 3  # most tokens that a look-up compares


@dataclasses.dataclass(frozen=True, eq=False)
class Draft:
    """Proposes `tokens` tokens per round: another model with the same tokenizer, or, without one, the row itself: what
    followed the latest earlier occurrence of its last tokens (prompt lookup, github.com/apoorvumang).

    Raises RunError if `tokens` is out of range.
    """

    tokens: int = 4
    model: GPT | None = None
    params: Any = None

    def __post_init__(self):
        if not 1 <= self.tokens <= MOST_TOKENS:
            raise RunError(f"draft: tokens={self.tokens}: expected an integer from 1 to {MOST_TOKENS}")


class _Drafter(NamedTuple):
    """The functions of a draft; its memory is a cache, or the tokens of every row."""

    start: Callable  # (weights, tokens_PT, lengths_P, prompt_B) -> memory
    propose: Callable  # (weights, memory, State, done_B) -> memory, drafts_Bk, log-probabilities [B, k, V] or None
    record: Callable  # (memory, tokens_Bj, positions_Bj, kept_Bj) -> memory


def check(draft: Draft, model: GPT, longest: int, vocab_size: int | None) -> None:
    """Raises RunError if the draft cannot propose for this model, in rows of up to `longest` tokens."""
    if draft.model is None:
        return
    theirs, ours = draft.model.config, model.config
    if theirs.context_length < longest:
        raise RunError(
            f"draft: its context_length is {theirs.context_length}, but rows may grow to {longest} tokens;"
            f" nearest: {longest - theirs.context_length} new tokens fewer, or a draft trained on longer rows"
        )
    if (vocab_size or max(theirs.vocab_size, ours.vocab_size)) > min(theirs.vocab_size, ours.vocab_size):
        raise RunError(f"draft: it has {theirs.vocab_size} tokens, the model {ours.vocab_size}; expected the same tokenizer")


def functions(model: GPT, sampling: Sampling, slots: int, vocab_size: int | None, symbols: Symbols, draft: Draft):
    """(start, decode) as in sampling/decode.py, but with weights = (params, draft.params), and with kept_nB in place of None:
    tokens for which it is False are to be skipped."""
    return _functions(model, sampling, slots, vocab_size, symbols, draft.tokens, draft.model)


@functools.lru_cache(maxsize=8)
def _functions(model: GPT, sampling: Sampling, slots: int, vocab_size, symbols: Symbols, k: int, draft_model: GPT | None):
    allowed_V = lg.drawable(sampling, model.config.vocab_size, vocab_size, symbols)
    ends = np.array(lg.endings(sampling, symbols))
    if draft_model is None:
        drafter = _look_up(slots, k)
    else:
        theirs = lg.drawable(sampling, draft_model.config.vocab_size, vocab_size, symbols)
        drafter = _model(draft_model, theirs, sampling, slots, k, allowed_V.size)

    @jax.jit
    def first(weights, tokens_PT, lengths_P, keys_B):
        state, chosen = plain.start(model, sampling, allowed_V, weights[0], tokens_PT, lengths_P, keys_B, slots)
        prompt_B = jnp.repeat(jnp.arange(len(lengths_P)), len(keys_B) // len(lengths_P))
        memory = drafter.start(weights, tokens_PT, lengths_P, prompt_B)
        there_B1 = jnp.ones((len(keys_B), 1), bool)
        memory = drafter.record(memory, state.token_B[:, None], state.positions_B[:, None], there_B1)
        return (state, memory), replicated((jax.tree.map(lambda x: x[None], chosen), there_B1.T))

    def one_round(weights, state: State, memory, done_B):
        memory, drafts_Bk, logq_BkV = drafter.propose(weights, memory, state, done_B)
        inputs_Bj = jnp.concatenate([state.token_B[:, None], drafts_Bk], axis=1)
        positions_Bj = state.positions_B[:, None] + jnp.arange(k + 1)
        alive_Bj = (~done_B[:, None] & (positions_Bj < slots)).astype(jnp.int32)
        places_Bj = jnp.minimum(positions_Bj, slots - 1)  # those outside the cache count as padding
        hidden_BjD, cache, _ = model.apply({"params": weights[0]}, inputs_Bj, places_Bj, alive_Bj, state.cache)
        logits_BjV = plain.drawable_logits(model, weights[0], hidden_BjD, allowed_V)
        keys_Bj = jax.vmap(lg.at_positions, in_axes=(None, 1), out_axes=1)(state.keys_B, positions_Bj + 1)
        seen = _seen_by_each(state.seen, drafts_Bk)
        if logq_BkV is None:
            draw = lambda logits_V, key, seen: lg.choose(logits_V[None], key[None], sampling, _one(seen))[0]
            tokens_Bj = jax.vmap(jax.vmap(draw))(logits_BjV, keys_Bj, seen)
            accepted_B = matching(tokens_Bj, drafts_Bk)
        else:
            logs = lambda logits_V, seen: lg.log_distribution(logits_V[None], sampling, _one(seen))[0]
            logp_BjV = jax.vmap(jax.vmap(logs))(logits_BjV, seen)
            tokens_Bj, accepted_B = accept(logp_BjV, logq_BkV, drafts_Bk, keys_Bj)
        kept_Bj = jnp.arange(k + 1) <= accepted_B[:, None]
        done_B |= jnp.any(jnp.isin(tokens_Bj, ends) & kept_Bj, axis=1)
        seen = state.seen
        if seen is not None:
            rows_B1 = jnp.arange(len(done_B))[:, None]
            seen = seen._replace(generated_BV=seen.generated_BV.at[rows_B1, tokens_Bj].add(kept_Bj.astype(jnp.int32)))
        last_B = jnp.take_along_axis(tokens_Bj, accepted_B[:, None], axis=1)[:, 0]
        memory = drafter.record(memory, tokens_Bj, positions_Bj + 1, kept_Bj)
        state = State(cache, last_B, state.positions_B + accepted_B + 1, state.keys_B, seen)
        return state, memory, done_B, (lg.told(logits_BjV, tokens_Bj, sampling), kept_Bj)

    @functools.partial(jax.jit, donate_argnums=1)
    def decode(weights, state, done_B):
        def body(carry, _):
            *carry, out = one_round(weights, *carry)
            return carry, out

        rounds = max(1, plain.DECODE_CHUNK // (k + 1))
        (state, memory, _), out = jax.lax.scan(body, [*state, done_B], None, length=rounds)
        in_order = lambda x: jnp.moveaxis(x, 1, 2).reshape(rounds * (k + 1), x.shape[1], *x.shape[3:])
        return (state, memory), replicated(jax.tree.map(in_order, out))

    return first, decode


def _seen_by_each(seen: Seen | None, drafts_Bk) -> Seen | None:
    """What came before each token of a round if the drafts before it are accepted: Seen of [B, j, V]."""
    if seen is None:
        return None
    V = seen.generated_BV.shape[1]
    drafted_BkV = jnp.cumsum(jax.nn.one_hot(drafts_Bk, V, dtype=jnp.int32), axis=1)
    drafted_BjV = jnp.pad(drafted_BkV, ((0, 0), (1, 0), (0, 0)))
    prompt_BjV = jnp.broadcast_to(seen.prompt_BV[:, None], drafted_BjV.shape)
    return Seen(prompt_BjV, seen.generated_BV[:, None] + drafted_BjV)


def _one(seen: Seen | None) -> Seen | None:
    return jax.tree.map(lambda x: x[None], seen)


def matching(tokens_Bj: jax.Array, drafts_Bk: jax.Array) -> jax.Array:
    """How many drafts equal the tokens that the model drew itself, before the first that does not. int32 [B].

    For drafts that are not samples: keeping the model's own tokens up to there and the next one is exact for any draft.
    """
    return jnp.sum(jnp.cumprod(tokens_Bj[:, :-1] == drafts_Bk, axis=1), axis=1)


def accept(logp_BjV: jax.Array, logq_BkV: jax.Array, drafts_Bk: jax.Array, keys_Bj: jax.Array):
    """Accepts or rejects drafts drawn from q, given log p and log q: (tokens_Bj, how many drafts are accepted, int32 [B]).

    Draft x is accepted with probability min(1, p(x) / q(x)). In place of the first rejected one, a token is drawn from
    max(p - q, 0), normalised; if all are accepted, one more from p. Tokens after that are meaningless.
    Source: arXiv:2211.17192, section 2.3 and appendix A.1.
    """
    k = drafts_Bk.shape[1]
    p_BjV, q_BkV = jnp.exp(logp_BjV), jnp.exp(logq_BkV)
    of_draft = lambda x_BkV: jnp.take_along_axis(x_BkV, drafts_Bk[..., None], axis=-1)[..., 0]
    chance = lambda key: jax.random.uniform(jax.random.fold_in(key, JUDGE))
    chance_Bk = jax.vmap(jax.vmap(chance))(keys_Bj[:, :k])
    accepted_B = jnp.sum(jnp.cumprod(chance_Bk * of_draft(q_BkV) < of_draft(p_BjV[:, :k]), axis=1), axis=1)
    left_BkV = jnp.maximum(p_BjV[:, :k] - q_BkV, 0)
    # If rounding leaves nothing, p and q are equal.
    left_BkV = jnp.where(jnp.sum(left_BkV, axis=-1, keepdims=True) > 0, left_BkV, p_BjV[:, :k])
    left_BjV = jnp.concatenate([left_BkV, p_BjV[:, k:]], axis=1)
    at = lambda x_Bj: jax.vmap(lambda x_j, i: x_j[i])(x_Bj, accepted_B)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(at(keys_Bj), REPLACE)
    next_B = jax.vmap(jax.random.categorical)(keys_B, jnp.log(at(left_BjV)))
    tokens_Bj = jnp.pad(drafts_Bk, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(k + 1) == accepted_B[:, None], next_B[:, None], tokens_Bj), accepted_B


def _model(draft: GPT, allowed_V, sampling: Sampling, slots: int, k: int, vocab: int) -> _Drafter:
    """Drafts from another model, drawn like the model's own tokens, penalties and filters included."""

    def start(weights, tokens_PT, lengths_P, prompt_B):
        return take_rows(plain.prefill(draft, weights[1], tokens_PT, lengths_P, slots)[0], prompt_B)

    def propose(weights, cache, state: State, done_B):
        def one(carry, i):
            cache, token_B, seen = carry
            positions_B = state.positions_B + i
            alive_B1 = (~done_B & (positions_B < slots)).astype(jnp.int32)[:, None]
            places_B1 = jnp.minimum(positions_B, slots - 1)[:, None]
            hidden_B1D, cache, _ = draft.apply({"params": weights[1]}, token_B[:, None], places_B1, alive_B1, cache)
            logits_BV = plain.drawable_logits(draft, weights[1], hidden_B1D, allowed_V)[:, 0, :vocab]
            missing = vocab - logits_BV.shape[1]  # rows that only pad the model's vocabulary
            logits_BV = jnp.pad(logits_BV, ((0, 0), (0, missing)), constant_values=-jnp.inf)
            # A position that is drafted again reuses its key: nothing that was kept has depended on it.
            keys_B = lg.at_positions(state.keys_B, positions_B + 1)
            keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, PROPOSE)
            token_B = lg.choose(logits_BV, keys_B, sampling, seen)
            logq_BV = None if sampling.temperature == 0 else lg.log_distribution(logits_BV, sampling, seen)
            return (cache, token_B, lg.also_seen(seen, token_B)), (token_B, logq_BV)

        # One more than is used, to put the last draft into the cache: it may be accepted.
        (cache, *_), (drafts_jB, logq_jBV) = jax.lax.scan(one, (cache, state.token_B, state.seen), jnp.arange(k + 1))
        return cache, drafts_jB[:k].T, None if logq_jBV is None else jnp.moveaxis(logq_jBV[:k], 0, 1)

    return _Drafter(start, propose, lambda cache, *_: cache)


def _look_up(slots: int, k: int) -> _Drafter:
    """Drafts from the row's own text."""

    def start(weights, tokens_PT, lengths_P, prompt_B):
        return jnp.pad(tokens_PT, ((0, 0), (0, slots - tokens_PT.shape[1])))[prompt_B]

    def record(text_BS, tokens_Bj, positions_Bj, kept_Bj):
        rows_B1 = jnp.arange(len(text_BS))[:, None]
        return text_BS.at[rows_B1, jnp.where(kept_Bj, positions_Bj, slots)].set(tokens_Bj, mode="drop")

    propose = lambda weights, text_BS, state, done_B: (text_BS, look_up(text_BS, state.positions_B, k), None)
    return _Drafter(start, propose, record)


def look_up(text_BS: jax.Array, last_B: jax.Array, k: int) -> jax.Array:
    """What followed the latest of the longest matches (up to NGRAM tokens) with the tokens up to position last_B. [B, k].

    A match that overlaps the end is continued periodically. If nothing matches, the tokens are meaningless.
    """
    slot_S, last_B1 = jnp.arange(text_BS.shape[1]), last_B[:, None]
    same_BS = slot_S < last_B1
    length_BS = jnp.zeros(text_BS.shape, jnp.int32)
    for back in range(NGRAM):
        token_B1 = jnp.take_along_axis(text_BS, jnp.maximum(last_B1 - back, 0), axis=1)
        same_BS &= (jnp.roll(text_BS, back, axis=1) == token_B1) & (slot_S >= back)
        length_BS += same_BS
    ended_B1 = jnp.argmax(length_BS * slot_S.size + slot_S * (length_BS > 0), axis=1)[:, None]
    period_B1 = jnp.maximum(last_B1 - ended_B1, 1)
    return jnp.take_along_axis(text_BS, ended_B1 + 1 + jnp.arange(k) % period_B1, axis=1)
