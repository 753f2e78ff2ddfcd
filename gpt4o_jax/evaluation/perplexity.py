"""How well a model predicts text: loss, perplexity, bits per byte, accuracy.

B windows in a call, T positions, C of them at a time, n times
"""

import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from gpt4o_jax.data.batches import Batch
from gpt4o_jax.data.token_cache import TokenCache
from gpt4o_jax.data.tokenizer import Tokenizer, byte_lengths
from gpt4o_jax.errors import RunError
from gpt4o_jax.model.cache import empty_cache
from gpt4o_jax.model.gpt import GPT
from gpt4o_jax.model.vocabulary import head_scores
from gpt4o_jax.parallel import constrain

CACHED_TOKENS = 64  # that go through the cache at once


def cached_documents(cache: TokenCache, tokenizer: Tokenizer) -> Iterable[np.ndarray]:
    """Each document of a token cache as ids from <bos> on, without <eos>."""
    for d in range(cache.documents):
        ids = np.asarray(cache.document(d), np.int32)
        yield ids[:-1] if ids[-1] == tokenizer.symbols.eos[0] else ids


def text_document(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """A text as ids from <bos> on."""
    return np.array(tokenizer.document(text)[:-1], np.int32)


def windows(ids: np.ndarray, T: int, stride: int):
    """Cuts a document into windows of T inputs that start every `stride`; each target is scored once.

    Yields (inputs and last target [T + 1] padded with 0, how many are real, targets scored from).
    """
    scored = 0  # targets ids[1 : 1 + scored] are done
    for begin in range(0, max(len(ids) - 1, 0), stride):
        part = ids[begin : begin + T + 1]
        yield np.pad(part, (0, T + 1 - len(part))), len(part), scored - begin
        scored = begin + len(part) - 1
        if scored == len(ids) - 1:
            return


@functools.lru_cache(maxsize=4)
def scorer(model: GPT, loss_chunk: int, through_cache: bool = False):
    """jit: (params, Batch) -> summed (nats, correct) over weighted targets. For through_cache see `evaluate`."""

    def score(params, batch: Batch):
        inputs = (batch.tokens, batch.positions, batch.segments)
        if through_cache:
            hidden_BTD = _through_cache(model, params, inputs)
        else:
            hidden_BTD, _, _ = model.apply({"params": params}, *inputs)
        nll_BT, first_BT = head_scores(model.config, model.compute, params, hidden_BTD, batch.targets, loss_chunk)
        sums = jnp.sum(nll_BT * batch.weights, axis=1), jnp.sum(first_BT * batch.weights, axis=1)
        return tuple(constrain(x_B, None) for x_B in sums)  # whole everywhere: each process of several reads them

    return jax.jit(score)


def _through_cache(model: GPT, params, inputs):
    """The hidden states [B, T, D] of (tokens_BT, positions_BT, segments_BT), each token reading those before it from a cache."""
    B, T = inputs[0].shape
    C = min(T, CACHED_TOKENS)
    in_chunks = lambda x_BT: jnp.moveaxis(jnp.pad(x_BT, ((0, 0), (0, -T % C))).reshape(B, -1, C), 1, 0)  # segment 0 is padding

    def one(cache, inputs):
        hidden_BCD, cache, _ = model.apply({"params": params}, *inputs, cache)
        return cache, hidden_BCD

    cache = empty_cache(model.config, B, T, model.compute.kv_cache)
    _, hidden_nBCD = jax.lax.scan(one, cache, tuple(map(in_chunks, inputs)))
    return jnp.moveaxis(hidden_nBCD, 0, 1).reshape(B, -1, hidden_nBCD.shape[-1])[:, :T]


def evaluate(
    model: GPT,
    params,
    documents: Iterable[np.ndarray],
    tokenizer: Tokenizer,
    stride: int | None = None,
    batch_size: int = 16,
    loss_chunk: int = 512,
    max_tokens: int | None = None,
    through_cache: bool = False,
) -> dict[str, float]:
    """Scores documents (ids from <bos> on); needs the mesh in force.

    Windows of T = context_length, starting every `stride` tokens (None: T / 2), so that every
    target but a document's first few sees at least T - stride tokens of context. Every text
    token counts once, <bos> and <eos> never; bytes are the UTF-8 bytes of the scored tokens.
    through_cache: as generation reads a prompt, keys and values as the model's cache keeps them.
    Returns loss (nats a token), perplexity, bits_per_byte, accuracy, tokens, bytes. Raises RunError
    where stride > T.
    """
    T = model.config.context_length
    stride = stride or max(T // 2, 1)
    if stride > T:
        raise RunError(f"eval.stride={stride} is longer than model.context_length={T}: tokens would be left out; nearest: {T}")
    score = scorer(model, loss_chunk, through_cache)
    lengths_V = byte_lengths(tokenizer)
    nats = correct = 0.0
    tokens = text_bytes = 0
    waiting: list[tuple] = []

    def flush():
        nonlocal nats, correct
        if waiting:
            rows = waiting + [(np.zeros(T + 1, np.int32), 0, 0)] * (batch_size - len(waiting))
            sums = jax.device_get(score(params, window_batch(rows, T)))
            nats += float(np.sum(sums[0], dtype=np.float64))
            correct += float(np.sum(sums[1], dtype=np.float64))
            waiting.clear()

    for ids in documents:
        if max_tokens is not None and tokens >= max_tokens:
            break
        tokens += len(ids) - 1
        text_bytes += int(lengths_V[ids[1:]].sum())
        for window in windows(ids, T, stride):
            waiting.append(window)
            if len(waiting) == batch_size:
                flush()
    flush()
    loss = nats / max(tokens, 1)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / max(text_bytes, 1),
        "accuracy": correct / max(tokens, 1),
        "tokens": tokens,
        "bytes": text_bytes,
    }


def window_batch(rows: list[tuple], T: int) -> Batch:
    """Batch [B, T] of what `windows` yields: (T + 1 tokens, how many are real, targets scored from)."""
    ids = np.stack([r[0] for r in rows]).astype(np.int32)
    index = np.arange(T)
    real = np.array([r[1] for r in rows])[:, None]
    scored_from = np.array([r[2] for r in rows])[:, None]
    return Batch(
        tokens=ids[:, :-1],
        targets=ids[:, 1:],
        weights=((index >= scored_from) & (index < real - 1)).astype(np.float32),
        positions=np.broadcast_to(index.astype(np.int32), ids[:, 1:].shape),
        segments=(index < real).astype(np.int32),
    )
