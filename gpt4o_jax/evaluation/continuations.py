"""The probability of one text after another, which every multiple-choice task asks for.

B pairs per call, T positions
"""

from collections.abc import Sequence

import jax
import numpy as np

from gpt4o_jax.data.tokenizer import Tokenizer
from gpt4o_jax.errors import RunError
from gpt4o_jax.evaluation.perplexity import scorer, window_batch
from gpt4o_jax.model.gpt import GPT
from gpt4o_jax.sampling.decode import bucket

Pair = tuple[list[int], list[int]]  # ids of a context (never empty) and of what follows it


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Ids of both. Spaces at the end of the context move to the continuation, since words are tokenised with their space.

    Both are tokenised together and split after as many tokens as the context alone has, as in lm-evaluation-harness; a token with
    the end of the context and all of the continuation belongs to the continuation. Without a context, the continuation follows
    bos. Raises RunError if the continuation is empty.
    """
    if not continuation:
        raise RunError(f"an empty continuation, after {context[-40:]!r}: it has no probability; expected at least one character")
    if not context:
        return [tokenizer.symbols.bos], tokenizer.encode(continuation)
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    if not context:
        return [tokenizer.symbols.bos], tokenizer.encode(continuation)
    whole, head = tokenizer.prompt(context + continuation), tokenizer.prompt(context)
    cut = min(len(head), len(whole) - 1)
    return (whole[:cut], whole[cut:]) if cut else ([tokenizer.symbols.bos], whole)


def score(model: GPT, params, pairs: Sequence[Pair], batch_size: int = 16, loss_chunk: int = 512) -> list[tuple[float, bool]]:
    """(log-probability of the continuation in nats, whether each of its tokens was the most probable), for each pair.

    Needs an active mesh. Pairs are sorted by length and padded to a few lengths, so that few shapes are compiled. Of a
    context that does not fit, the end is kept. Raises RunError if a continuation does not fit.
    """
    limit = model.config.context_length
    for _, continuation in pairs:
        if len(continuation) > limit:
            raise RunError(f"a continuation of {len(continuation)} tokens does not fit model.context_length={limit}")
    rows = [(context + continuation)[-(limit + 1) :] for context, continuation in pairs]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    scored = scorer(model, loss_chunk)
    results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        T = bucket(max(len(rows[chosen[-1]]) - 1, 1), limit)
        windows = [_window(rows[i], len(pairs[i][1]), T) for i in chosen]
        windows += [(np.zeros(T + 1, np.int32), 0, 0)] * (batch_size - len(windows))
        nats_B, correct_B = jax.device_get(scored(params, window_batch(windows, T)))
        for i, nats, correct in zip(chosen, nats_B, correct_B, strict=False):
            results[i] = -float(nats), int(correct) == len(pairs[i][1])
    return results


def _window(row: list[int], targets: int, T: int) -> tuple[np.ndarray, int, int]:
    return np.pad(np.array(row, np.int32), (0, T + 1 - len(row))), len(row), len(row) - 1 - targets


def rolling(ids: list[int], first: int, T: int) -> list[Pair]:
    """A text of any length as pairs that together score each token once: the first window follows the id `first`, each later
    one as much of the text before it as fits into T positions (lm-evaluation-harness, get_rolling_token_windows).
    """
    pairs = []
    whole = [first, *ids]
    for begin in range(0, len(ids), T):
        end = min(begin + T, len(ids))
        pairs.append((whole[max(end - T, 0) : begin + 1], ids[begin:end]))
    return pairs
