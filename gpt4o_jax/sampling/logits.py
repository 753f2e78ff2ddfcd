"""From logits to a token: pure functions on logits_BV.

In this order: exclude control symbols, add biases, apply penalties (repetition, then frequency and presence), divide by
temperature, filter by top_k, top_p and min_p. Reported log-probabilities are the model's own: after the first step, before
the others.

B rows, T prompt positions, V vocabulary, N most probable tokens reported
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt4o_jax.data.tokenizer import Symbols
from gpt4o_jax.errors import RunError
from gpt4o_jax.sampling.settings import Sampling


class Seen(NamedTuple):
    """The previous tokens, as penalties count them."""

    prompt_BV: jax.Array  # bool, whether a token is in the prompt
    generated_BV: jax.Array  # int32, how many times it was generated


class Chosen(NamedTuple):
    """A token for each row and its log-probability at temperature 1, before biases, penalties and filters."""

    token_B: jax.Array
    logprob_B: jax.Array
    top_BN: jax.Array  # ids of the most probable tokens, best first
    top_logprob_BN: jax.Array


def endings(s: Sampling, symbols: Symbols) -> tuple[int, ...]:
    """The tokens that end a row."""
    return tuple(sorted({*symbols.eos, *s.stop_ids}))


def drawable(s: Sampling, rows: int, vocab_size: int | None, symbols: Symbols) -> np.ndarray:
    """Which of a model's `rows` tokens may be chosen: those the tokenizer has pieces for, and those that end a row.

    bool [rows]. Raises RunError if `s` names a token that does not exist, or biases one that is never drawn.
    """
    size = vocab_size or rows
    for token in s.stop_ids:
        if token >= size:
            raise RunError(f"sampling: stop_ids token {token} does not exist: the vocabulary has {size} tokens")
    allowed_V = np.arange(rows) < size
    allowed_V[list(symbols.control)] = False
    allowed_V[list(endings(s, symbols))] = True
    for token, _ in s.logit_bias:
        if token >= size:
            raise RunError(f"sampling: logit_bias token {token} does not exist: the vocabulary has {size} tokens")
        if not allowed_V[token]:
            raise RunError(f"sampling: logit_bias token {token} is a control symbol, which is never drawn; leave it out")
    return allowed_V


def row_keys(seed: int, rows) -> jax.Array:
    """One key per row number. With a position folded in, it draws the token at that position: a row depends only on its
    prompt, its number and the seed, not on other rows or on how many steps a call computes."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.asarray(rows))


def at_positions(keys_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """The keys of the tokens at these positions."""
    return jax.vmap(jax.random.fold_in)(keys_B, positions_B)


def seen_in_prompt(tokens_BT: jax.Array, valid_BT: jax.Array, vocab: int) -> Seen:
    """Seen before anything is generated. valid_BT: False for padding."""
    rows_B1 = jnp.arange(tokens_BT.shape[0])[:, None]
    prompt_BV = jnp.zeros((tokens_BT.shape[0], vocab), bool)
    prompt_BV = prompt_BV.at[rows_B1, jnp.where(valid_BT, tokens_BT, vocab)].set(True, mode="drop")
    return Seen(prompt_BV, jnp.zeros(prompt_BV.shape, jnp.int32))


def also_seen(seen: Seen | None, token_B: jax.Array) -> Seen | None:
    """Seen after one more token in each row. None stays None."""
    if seen is None:
        return None
    rows_B = jnp.arange(token_B.shape[0])
    return seen._replace(generated_BV=seen.generated_BV.at[rows_B, token_B].add(1))


def penalise(logits_BV: jax.Array, s: Sampling, seen: Seen | None) -> jax.Array:
    """Logits [B, V] with biases added and penalties applied; `seen` is required if s.penalised.

    repetition_penalty (CTRL, arXiv:1909.05858): logits of tokens in prompt or output are divided by it if positive and multiplied
    by it if negative, as in Hugging Face and vLLM. frequency_penalty times the count of a token in the output, and
    presence_penalty if it occurs there, are subtracted: OpenAI's formula, over generated tokens only, as in vLLM.
    """
    if s.logit_bias:
        tokens, biases = zip(*s.logit_bias, strict=True)
        logits_BV = logits_BV.at[:, np.array(tokens)].add(np.array(biases, np.float32))
    if not s.penalised:
        return logits_BV
    if s.repetition_penalty != 1:
        r = s.repetition_penalty
        shrunk_BV = jnp.where(logits_BV > 0, logits_BV / r, logits_BV * r)
        logits_BV = jnp.where(seen.prompt_BV | (seen.generated_BV > 0), shrunk_BV, logits_BV)
    return logits_BV - s.frequency_penalty * seen.generated_BV - s.presence_penalty * (seen.generated_BV > 0)


def filter_logits(logits_BV: jax.Array, s: Sampling) -> jax.Array:
    """Logits [B, V] divided by temperature (above 0), up to a constant per row, with filtered tokens at -inf.

    top_k: keep the k largest (ties: the lower id). top_p: of those, the fewest tokens, most probable first, whose total
    probability reaches p (nucleus sampling, arXiv:1904.09751). min_p: those at least min_p times as probable as the best
    (arXiv:2407.01082). The best token always stays.
    """
    if s.temperature < 1:
        # Near 0 the quotients overflow float32, except the best one's, which is 0. A divisor below `tiny` may count as 0.
        tiny = float(jnp.finfo(jnp.float32).tiny)
        logits_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / max(s.temperature, tiny)
    else:
        logits_BV = logits_BV / s.temperature
    if not (s.top_k or s.top_p < 1 or s.min_p):
        return logits_BV
    order_BV = jnp.argsort(-logits_BV, axis=-1)  # stable
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    rank_V = jnp.arange(logits_BV.shape[-1])
    keep_BV = jnp.broadcast_to(rank_V < (min(s.top_k, rank_V.size) or rank_V.size), sorted_BV.shape)
    p_BV = jax.nn.softmax(jnp.where(keep_BV, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    keep_BV &= (before_BV < s.top_p) & (p_BV >= s.min_p * p_BV[:, :1])
    keep_BV = keep_BV.at[:, 0].set(True)
    keep_BV = jnp.take_along_axis(keep_BV, jnp.argsort(order_BV, axis=-1), axis=-1)
    return jnp.where(keep_BV, logits_BV, -jnp.inf)


def log_distribution(logits_BV: jax.Array, s: Sampling, seen: Seen | None = None) -> jax.Array:
    """Log-probabilities [B, V] that `choose` draws from; at temperature 0 one token has all the probability."""
    logits_BV = penalise(logits_BV, s, seen)
    if s.temperature == 0:
        best_B1 = jnp.argmax(logits_BV, axis=-1)[:, None]
        return jnp.where(jnp.arange(logits_BV.shape[-1]) == best_B1, 0.0, -jnp.inf)
    return jax.nn.log_softmax(filter_logits(logits_BV, s), axis=-1)


def choose(logits_BV: jax.Array, keys_B: jax.Array, s: Sampling, seen: Seen | None = None) -> jax.Array:
    """One token id for each row, drawn with that row's own key. int32 [B]."""
    logits_BV = penalise(logits_BV, s, seen)
    if s.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, filter_logits(logits_BV, s)).astype(jnp.int32)


def told(logits_BV: jax.Array, token_B: jax.Array, s: Sampling) -> Chosen:
    """The tokens with their log-probabilities. Any number of leading axes in place of B."""
    logprob_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    top_logprob_BN, top_BN = jax.lax.top_k(logprob_BV, s.top_logprobs)
    return Chosen(token_B, jnp.take_along_axis(logprob_BV, token_B[..., None], axis=-1)[..., 0], top_BN, top_logprob_BN)
