"""Text generation, token ids in and out: the loop around the compiled steps (sampling/decode.py).

P prompts, B rows, T prompt positions, S cache slots, n tokens per decode call
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from gpt4o_jax.data.tokenizer import Symbols
from gpt4o_jax.errors import RunError
from gpt4o_jax.model.gpt import GPT
from gpt4o_jax.sampling import decode as plain
from gpt4o_jax.sampling import speculative
from gpt4o_jax.sampling.logits import Chosen, Sampling, row_keys
from gpt4o_jax.sampling.speculative import Draft


@dataclasses.dataclass
class Completion:
    """The continuation of one row."""

    ids: list[int]  # new tokens, without the one that ended it
    logprobs: list[float]  # of each token in `ids`, under the model at temperature 1
    finished: str  # "stop", "eos" or "length"
    end: int | None = None  # the token that ended it; None if its text or length did
    # For each token the sampling.top_logprobs most probable (id, logprob), fewer if fewer can be drawn.
    top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    passes: int = 0  # of the model, prefill included; tokens per pass measure the gain from a draft


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
    num_samples: int = 1,
    draft: Draft | None = None,
) -> list[Completion]:
    """Continues every prompt `num_samples` times; prompts may differ in length. Needs an active mesh.

    prompts: token ids, as from Tokenizer.prompt. Each is prefilled once; sample j of prompt p is row p * num_samples + j. A row's
    tokens depend on its prompt, its number and `seed`, not on the other rows. should_stop(row, ids so far) -> how many ids to
    keep, which ends the row, or None; on_tokens(row, new ids) is called as they are generated. A row also ends at an eos of
    `symbols`, at sampling.stop_ids, after max_new_tokens, and where the context is full. Other control symbols are never drawn,
    nor are ids from `vocab_size` on (None: the model's), for models with more rows than the tokenizer has pieces. draft: proposes
    tokens, of which the model verifies several in one pass (sampling/speculative.py). Raises RunError if a prompt is empty or
    leaves no room in the context, `sampling` names tokens that do not exist or are never drawn, or the draft does not fit the
    model.
    """
    room_P, tokens_PT, lengths_P, slots = layout(model, prompts, max_new_tokens, symbols.pad)
    room_B = np.repeat(room_P, num_samples)
    B = len(room_B)
    if draft is None:
        weights, per_pass = params, 1
        chunk = min(plain.DECODE_CHUNK, max(1, int(max(room_P)) - 1))  # short answers do not need a full decode call
        first, decode = plain.functions(model, sampling, slots, vocab_size, symbols, chunk)
    else:
        speculative.check(draft, model, int(max(lengths_P + room_P)), vocab_size)
        weights, per_pass = (params, draft.params), draft.tokens + 1
        first, decode = speculative.functions(model, sampling, slots, vocab_size, symbols, draft)
    state, out = first(weights, tokens_PT, lengths_P, row_keys(seed, np.arange(B)))
    rows = [Completion([], [], "") for _ in range(B)]
    while True:
        chosen, kept_nB = jax.device_get(out)
        for row in range(B):
            places = np.arange(len(chosen.token_B)) if kept_nB is None else np.flatnonzero(kept_nB[:, row])
            tokens = jax.tree.map(lambda x: x[places, row].tolist(), chosen)
            begins = (places % per_pass == 0).tolist()
            extend(rows[row], row, begins, tokens, room_B[row], symbols.eos, sampling.stop_ids, should_stop, on_tokens)
        if all(r.finished for r in rows):
            return rows
        if draft is None:
            longest = max(lengths_P[row // num_samples] + len(r.ids) for row, r in enumerate(rows) if not r.finished)
            state = plain.with_room(model, state, plain.bucket(longest + chunk, slots))
        state, out = decode(weights, state, np.array([bool(r.finished) for r in rows]))


def layout(model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int, pad: int):
    """(most new tokens of each prompt [P], prompts padded to [P, T], their lengths [P], cache slots).

    Raises RunError if a prompt is empty, or leaves no room in the context.
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
    lengths_P = np.array([len(p) for p in prompts], np.int32)
    # Separate for each row: neighbours do not matter. max_new_tokens may be larger than int32.
    room_P = np.minimum(min(max_new_tokens, limit), limit - lengths_P)
    T = plain.bucket(longest, limit)
    tokens_PT = np.stack([np.pad(np.asarray(p, np.int32), (0, T - len(p)), constant_values=pad) for p in prompts])
    return room_P, tokens_PT, lengths_P, plain.bucket(int(max(lengths_P + room_P)), limit)


def extend(
    c: Completion, row: int, begins: list[bool], tokens: Chosen, max_new_tokens: int, eos, stop_ids, should_stop, on_tokens
):
    """Appends a row's new tokens up to its end, and records how it ended if it did. begins: which of them begin a pass."""
    if c.finished:
        return
    new = 0
    for begins_pass, token, logprob, *top in zip(begins, *tokens, strict=True):
        c.passes += begins_pass
        if token in eos or token in stop_ids:
            c.finished, c.end = "eos" if token in eos else "stop", token
            break
        c.ids.append(token)
        c.logprobs.append(logprob)
        if top[0]:
            c.top.append([(i, p) for i, p in zip(*top, strict=True) if p != -math.inf])
        new += 1
        keep = should_stop(row, c.ids)
        if keep is not None:
            new -= len(c.ids) - keep
            del c.ids[keep:], c.logprobs[keep:], c.top[keep:]
            c.finished = "stop"
            break
        if len(c.ids) >= max_new_tokens:
            c.finished = "length"
            break
    if new > 0:
        on_tokens(row, c.ids[-new:])
