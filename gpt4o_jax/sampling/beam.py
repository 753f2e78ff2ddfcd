"""Beam search: keeps the `beams` most probable unfinished texts of each prompt.

P prompts, K beams per prompt, M hypotheses kept, C candidates per step, S token slots, V vocabulary
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt4o_jax.data.tokenizer import Symbols
from gpt4o_jax.errors import RunError
from gpt4o_jax.model.cache import take_rows
from gpt4o_jax.model.gpt import GPT
from gpt4o_jax.parallel import replicated
from gpt4o_jax.sampling import logits as lg
from gpt4o_jax.sampling.decode import drawable_logits, prefill
from gpt4o_jax.sampling.generate import layout
from gpt4o_jax.sampling.logits import Sampling


@dataclasses.dataclass
class Hypothesis:
    """A finished continuation."""

    ids: list[int]  # new tokens, without the one that ended it
    logprob: float  # of these and the token that ended it
    score: float  # logprob / (number of these tokens) ** length_penalty
    finished: str  # "eos", "stop" or "length"


class _Texts(NamedTuple):
    """Texts of each prompt: live beams or hypotheses."""

    tokens_PKS: jax.Array
    length_PK: jax.Array  # tokens that count, including the one that ended it
    logprob_PK: jax.Array  # -inf where there is none
    score_PK: jax.Array


def beam_search(
    model: GPT,
    params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    beams: int,
    n_best: int = 1,
    length_penalty: float = 1.0,
    stop_ids: Sequence[int] = (),
    vocab_size: int | None = None,
    symbols: Symbols = Symbols(),
) -> list[list[Hypothesis]]:
    """The n_best hypotheses of each prompt, best first. Needs an active mesh. For prompts and symbols see `generate`.

    Each step ranks all continuations of the live beams by log-probability. Those among the `beams` best that end become
    hypotheses; the `beams` best of the others go on, and become hypotheses when they reach max_new_tokens or the end of the
    context. A hypothesis of n tokens, <eos> included, scores logprob / n ** length_penalty, as in Hugging Face: 0 ranks by
    probability, larger values favour longer texts (GNMT's formula, arXiv:1609.08144, without its constant 5). The search ends
    when no live beam can still reach the score of the n-th best hypothesis, so ending early never changes the result. Raises
    RunError if a number is out of range or a prompt does not fit.
    """
    if not 1 <= n_best <= beams:
        raise RunError(f"beam search: n_best={n_best}: expected an integer from 1 to beams={beams}")
    if not -10 <= length_penalty <= 10:
        raise RunError(f"beam search: length_penalty={length_penalty}: expected a number from -10 to 10")
    room_P, tokens_PT, lengths_P, slots = layout(model, prompts, max_new_tokens, symbols.pad)
    ends = Sampling(stop_ids=tuple(stop_ids))
    search = _search(model, beams, n_best, ends, slots, vocab_size, symbols)
    found = jax.device_get(search(params, tokens_PT, lengths_P, room_P.astype(np.int32), np.float32(length_penalty)))
    return [
        [
            _hypothesis(ids[:length].tolist(), float(logprob), float(score), ends, symbols)
            for ids, length, logprob, score in zip(*of_prompt, strict=True)
            if np.isfinite(logprob)
        ]
        for of_prompt in zip(*found, strict=True)
    ]


def _hypothesis(ids: list[int], logprob: float, score: float, ends: Sampling, symbols: Symbols) -> Hypothesis:
    if ids[-1] in lg.endings(ends, symbols):
        return Hypothesis(ids[:-1], logprob, score, "eos" if ids[-1] in symbols.eos else "stop")
    return Hypothesis(ids, logprob, score, "length")


@functools.lru_cache(maxsize=8)
def _search(model: GPT, K: int, M: int, sampling: Sampling, slots: int, vocab_size: int | None, symbols: Symbols):
    """The whole search, jitted: (params, tokens_PT, lengths_P, room_P, length_penalty) -> _Texts of M hypotheses."""
    allowed_V = lg.drawable(sampling, model.config.vocab_size, vocab_size, symbols)
    ends = np.array(lg.endings(sampling, symbols))
    V = allowed_V.size
    C = min(K * (len(ends) + 1), K * V)  # enough for K that go on, however many end

    def logprobs(params, hidden_BD):
        return jax.nn.log_softmax(drawable_logits(model, params, hidden_BD[:, None], allowed_V)[:, 0], axis=-1)

    def none(P, n):
        nothing = jnp.full((P, n), -jnp.inf)
        return _Texts(jnp.zeros((P, n, slots), jnp.int32), jnp.zeros((P, n), jnp.int32), nothing, nothing)

    @jax.jit
    def search(params, tokens_PT, lengths_P, room_P, length_penalty):
        P = len(lengths_P)
        score = lambda logprob, length: logprob / jnp.asarray(length, jnp.float32) ** length_penalty

        def step(carry):
            t, done_P, cache, live, best, logprob_PKV = carry
            total_PC, at_PC = jax.lax.top_k((live.logprob_PK[..., None] + logprob_PKV).reshape(P, K * V), C)
            parent_PC, token_PC = at_PC // V, (at_PC % V).astype(jnp.int32)
            ended_PC = jnp.isin(token_PC, ends)
            tokens_PCS = jnp.take_along_axis(live.tokens_PKS, parent_PC[..., None], axis=1).at[:, :, t].set(token_PC)
            length_PC = jnp.full((P, C), t + 1)
            all_of = _Texts(tokens_PCS, length_PC, total_PC, score(total_PC, length_PC))

            live, chosen_PK = _best(all_of, jnp.where(ended_PC, -jnp.inf, total_PC), K)
            full_P1 = (t + 1 >= room_P)[:, None]
            enter_PC = ended_PC & (jnp.arange(C) < K) & ~done_P[:, None]
            enter = [best.score_PK, jnp.where(enter_PC, all_of.score_PK, -jnp.inf)]
            enter.append(jnp.where(full_P1 & ~done_P[:, None], live.score_PK, -jnp.inf))
            together = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), best, all_of, live)
            best, _ = _best(together, jnp.concatenate(enter, axis=1), M)

            # Log-probabilities only fall: at best a beam ends now, or, if length is favoured, at full length without loss.
            length_P = jnp.where(length_penalty > 0, room_P, jnp.minimum(t + 2, room_P))
            within_reach_P = score(jnp.max(live.logprob_PK, axis=1), length_P)
            done_P = done_P | full_P1[:, 0] | (best.score_PK[:, -1] >= within_reach_P)

            parent_PK = jnp.take_along_axis(parent_PC, chosen_PK, axis=1)
            cache = take_rows(cache, (jnp.arange(P)[:, None] * K + parent_PK).reshape(-1))
            token_B1 = jnp.take_along_axis(token_PC, chosen_PK, axis=1).reshape(-1, 1)
            positions_B1 = jnp.minimum(jnp.repeat(lengths_P + t, K), slots - 1)[:, None]
            alive_B1 = jnp.repeat(~done_P, K).astype(jnp.int32)[:, None]
            hidden_B1D, cache, _ = model.apply({"params": params}, token_B1, positions_B1, alive_B1, cache)
            return t + 1, done_P, cache, live, best, logprobs(params, hidden_B1D[:, 0]).reshape(P, K, V)

        cache, last_PD = prefill(model, params, tokens_PT, lengths_P, slots)
        cache = take_rows(cache, jnp.repeat(jnp.arange(P), K))
        first = jnp.where(jnp.arange(K) == 0, 0.0, -jnp.inf)  # all beams of a prompt start from one
        live = none(P, K)._replace(logprob_PK=jnp.broadcast_to(first, (P, K)))
        logprob_PKV = jnp.broadcast_to(logprobs(params, last_PD)[:, None], (P, K, V))
        carry = (jnp.int32(0), jnp.zeros(P, bool), cache, live, none(P, M), logprob_PKV)
        return replicated(jax.lax.while_loop(lambda carry: ~jnp.all(carry[1]), step, carry)[4])

    return search


def _best(texts: _Texts, rank_PC: jax.Array, n: int) -> tuple[_Texts, jax.Array]:
    """The n highest-ranked texts and their indices [P, n]; a rank of -inf removes a text."""
    rank_Pn, chosen_Pn = jax.lax.top_k(rank_PC, n)
    take = lambda x: jnp.take_along_axis(x, chosen_Pn.reshape(chosen_Pn.shape + (1,) * (x.ndim - 2)), axis=1)
    texts = jax.tree.map(take, texts)
    gone_Pn = jnp.isneginf(rank_Pn)
    nothing = lambda x: jnp.where(gone_Pn, -jnp.inf, x)
    return texts._replace(logprob_PK=nothing(texts.logprob_PK), score_PK=nothing(texts.score_PK)), chosen_Pn
