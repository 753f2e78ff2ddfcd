"""Text generation: one call for the prompts (prefill), then a compiled loop of single steps (decode).

B rows, T prompt positions, S cache slots, V vocabulary, n tokens in one decode call
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpt4o_jax.data.tokenizer import Symbols
from gpt4o_jax.errors import RunError
from gpt4o_jax.model.cache import empty_cache
from gpt4o_jax.model.gpt import GPT, unembed
from gpt4o_jax.sampling.logits import Sampling, choose

DECODE_CHUNK = 16  # tokens between two looks at the results: long enough to hide the dispatch


@dataclasses.dataclass
class Completion:
    """What one row was continued with."""

    ids: list[int]  # new tokens, without the one that ended it
    logprobs: list[float]  # of each token in `ids`, under the model at temperature 1
    finished: str  # "stop", "eos" or "length"


def generate(
    model: GPT,
    params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    should_stop: Callable[[int, list[int]], int | None] = lambda row, ids: None,
    on_tokens: Callable[[int, list[int]], None] = lambda row, ids: None,
    vocab_size: int | None = None,
    symbols: Symbols = Symbols(),
) -> list[Completion]:
    """Continues every prompt; rows may differ in length. Needs the mesh in force.

    prompts: token ids, from <bos> on. A row's tokens depend on its prompt, its number and `seed`,
    not on the other rows. should_stop(row, ids so far) -> how many ids to keep, to end that row;
    on_tokens(row, new ids) is called as they come. Ends a row at an eos of `symbols` too. Control symbols
    other than those are never drawn, nor are ids from `vocab_size` on (None: of the model), for models with
    more rows than the tokenizer has pieces. A row ends where the context is full. Raises RunError
    where a prompt leaves no room in it.
    """
    limit = model.config.context_length
    longest = max(len(p) for p in prompts)
    if not all(len(p) for p in prompts):
        raise RunError("empty prompt: expected at least <bos>")
    if longest >= limit:
        raise RunError(
            f"prompt of {longest} tokens does not fit: the model's context_length is {limit} and one place must be"
            " left for a new token; shorten the prompt"
        )
    room = [min(max_new_tokens, limit - len(p)) for p in prompts]  # each row's own: neighbours do not matter
    B, T = len(prompts), _bucket(longest, limit)
    S = _bucket(max(len(p) + n for p, n in zip(prompts, room, strict=True)), limit)
    lengths_B = np.array([len(p) for p in prompts])
    tokens_BT = np.stack([np.pad(np.asarray(p, np.int32), (0, T - len(p)), constant_values=symbols.pad) for p in prompts])
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(B))

    prefill, decode = _functions(model, sampling, B, T, S, vocab_size or model.config.vocab_size, symbols)
    cache, token_B, logprob_B = prefill(params, tokens_BT, lengths_B, keys_B)
    rows = [Completion([], [], "") for _ in range(B)]
    positions_B = jnp.asarray(lengths_B, jnp.int32)
    chunk = [(jax.device_get(token_B)[None], jax.device_get(logprob_B)[None])]
    while True:
        for tokens_nB, logprobs_nB in chunk:
            for row in range(B):
                _extend(rows[row], row, tokens_nB[:, row], logprobs_nB[:, row], room[row], symbols.eos, should_stop, on_tokens)
        if all(r.finished for r in rows):
            return rows
        done_B = np.array([bool(r.finished) for r in rows])
        cache, token_B, positions_B, out = decode(params, cache, token_B, positions_B, done_B, keys_B)
        chunk = [jax.device_get(out)]


def _extend(c: Completion, row, tokens_n, logprobs_n, max_new_tokens, eos, should_stop, on_tokens):
    if c.finished:
        return
    new = 0
    for token, logprob in zip(tokens_n.tolist(), logprobs_n.tolist(), strict=True):
        if token in eos:
            c.finished = "eos"
            break
        c.ids.append(token)
        c.logprobs.append(logprob)
        new += 1
        keep = should_stop(row, c.ids)
        if keep is not None:
            new -= len(c.ids) - keep
            del c.ids[keep:], c.logprobs[keep:]
            c.finished = "stop"
            break
        if len(c.ids) >= max_new_tokens:
            c.finished = "length"
            break
    if new > 0:
        on_tokens(row, c.ids[-new:])


def _bucket(n: int, limit: int) -> int:
    """n rounded up to 32, 64, 128, ... but at most `limit`: few shapes, few compilations."""
    size = 32
    while size < n:
        size *= 2
    return min(size, limit)


@functools.lru_cache(maxsize=8)
def _functions(model: GPT, sampling: Sampling, B: int, T: int, S: int, vocab_size: int, symbols: Symbols):
    """(prefill, decode), jitted for these shapes."""
    banned = np.zeros(model.config.vocab_size, bool)
    banned[list(symbols.control)] = banned[vocab_size:] = True
    banned[list(symbols.eos)] = False
    eos_E = jnp.array(symbols.eos)

    def pick(params, hidden_BD, keys_B, positions_B):
        logits_BV = unembed(model, params, hidden_BD[:, None])[:, 0]
        logits_BV = jnp.where(banned, -jnp.inf, logits_BV)
        keys_B = jax.vmap(jax.random.fold_in)(keys_B, positions_B)
        token_B = choose(logits_BV, keys_B, sampling)
        logprob_BV = jax.nn.log_softmax(logits_BV, axis=-1)
        return token_B, jnp.take_along_axis(logprob_BV, token_B[:, None], axis=-1)[:, 0]

    @jax.jit
    def prefill(params, tokens_BT, lengths_B, keys_B):
        index_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        segments_BT = (index_BT < lengths_B[:, None]).astype(jnp.int32)
        cache = empty_cache(model.config, B, S)
        hidden_BTD, cache, _ = model.apply({"params": params}, tokens_BT, index_BT, segments_BT, cache)
        last_BD = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
        return cache, *pick(params, last_BD, keys_B, lengths_B)

    @functools.partial(jax.jit, donate_argnums=1)
    def decode(params, cache, token_B, positions_B, done_B, keys_B):
        def one(carry, _):
            cache, token_B, positions_B, done_B = carry
            # A finished row computes along but writes nothing: its token counts as padding.
            alive_B1 = (~done_B & (positions_B < S)).astype(jnp.int32)[:, None]
            hidden_B1D, cache, _ = model.apply({"params": params}, token_B[:, None], positions_B[:, None], alive_B1, cache)
            next_B, logprob_B = pick(params, hidden_B1D[:, 0], keys_B, positions_B + 1)
            done_B |= jnp.isin(next_B, eos_E)
            return (cache, next_B, positions_B + 1, done_B), (next_B, logprob_B)

        carry, out = jax.lax.scan(one, (cache, token_B, positions_B, done_B), None, length=DECODE_CHUNK)
        return *carry[:3], out

    return prefill, decode
