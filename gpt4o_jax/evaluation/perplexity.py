"""How well a model predicts text: loss, perplexity, bits per byte, accuracy.

B windows per call, T positions, C positions per chunk, n chunks, D model width, V vocabulary
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpt4o_jax.data.batches import Batch
from gpt4o_jax.data.corpus import Corpus
from gpt4o_jax.data.token_cache import TokenCache
from gpt4o_jax.data.tokenizer import Tokenizer, byte_lengths
from gpt4o_jax.errors import RunError
from gpt4o_jax.model.cache import empty_cache
from gpt4o_jax.model.gpt import GPT
from gpt4o_jax.model.vocabulary import head_scores
from gpt4o_jax.parallel import replicated

CACHED_TOKENS = 64  # per pass through the cache


# Ids from <bos> on; or, if not all of them count, a pair (ids, whether each counts).
Document = np.ndarray | tuple[np.ndarray, np.ndarray]


def cached_documents(cache: TokenCache, tokenizer: Tokenizer) -> Iterable[Document]:
    """Each document of a token cache, without its final <eos> unless that counts, as the end of an answer does."""
    for d in range(cache.documents):
        ids, counts = np.asarray(cache.document(d), np.int32), cache.counted(d)
        scored = counts is not None and counts[-1]
        end = len(ids) - (ids[-1] == tokenizer.symbols.eos[0] and not scored)
        yield ids[:end] if counts is None else (ids[:end], np.asarray(counts[:end]))


def holdouts(corpus: Corpus) -> dict[str, list[Document]]:
    """Name of each member of a corpus -> its held-out documents."""
    return {m.name: list(cached_documents(m.holdout, corpus.tokenizer)) for m in corpus.members}


def text_document(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Ids of a text, int32, from <bos> on, without <eos>."""
    return np.array(tokenizer.document(text)[:-1], np.int32)


def windows(ids: np.ndarray, T: int, stride: int):
    """Cuts a document into windows of T inputs that start every `stride` tokens; each target is scored once.

    Yields (inputs and last target [T + 1] padded with 0, how many of them are real, index of the first target to score).
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
    """jit: (params, Batch) -> (nats [B], correct [B]), summed over weighted targets. For through_cache see `evaluate`."""

    def score(params, batch: Batch):
        inputs = (batch.tokens, batch.positions, batch.segments)
        if through_cache:
            hidden_BTD = _through_cache(model, params, inputs)
        else:
            hidden_BTD, _, _ = model.apply({"params": params}, *inputs)
        nll_BT, first_BT = head_scores(model.config, model.compute, params, hidden_BTD, batch.targets, loss_chunk)
        return replicated((jnp.sum(nll_BT * batch.weights, axis=1), jnp.sum(first_BT * batch.weights, axis=1)))

    return jax.jit(score)


def _through_cache(model: GPT, params, inputs):
    """The hidden states [B, T, D] of (tokens_BT, positions_BT, segments_BT), computed through a KV cache, C tokens at a time."""
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
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    stride: int | None = None,
    batch_size: int = 16,
    loss_chunk: int = 512,
    max_tokens: int | None = None,
    through_cache: bool = False,
) -> dict[str, float]:
    """Scores documents. Needs an active mesh.

    Windows of T = context_length start every `stride` tokens (None: T / 2), so that every target but a document's first few sees
    at least T - stride tokens of context. Every token is scored once, but for the first (<bos>), a text's <eos>, and in
    conversations those that the loss does not count; bytes are the UTF-8 bytes of the scored tokens. max_tokens: reads no further
    document after this many. through_cache: through a KV cache, with keys and values stored as for generation. Returns loss (nats
    per token), perplexity (per token), bits_per_byte, accuracy (0 to 1), tokens, bytes. Raises RunError if stride > T.
    """
    T = model.config.context_length
    stride = stride or max(T // 2, 1)
    if stride > T:
        raise RunError(f"eval.stride={stride} is longer than model.context_length={T}: tokens would be left out; nearest: {T}")
    score = scorer(model, loss_chunk, through_cache)
    lengths_V = byte_lengths(tokenizer)
    nats = correct = 0.0
    read = tokens = text_bytes = 0
    waiting: list[tuple] = []

    def flush():
        nonlocal nats, correct
        if waiting:
            rows = waiting + [(np.zeros(T + 1, np.int32), 0, 0)] * (batch_size - len(waiting))
            sums = jax.device_get(score(params, window_batch(rows, T)))
            nats += float(np.sum(sums[0], dtype=np.float64))
            correct += float(np.sum(sums[1], dtype=np.float64))
            waiting.clear()

    for document in documents:
        if max_tokens is not None and read >= max_tokens:
            break
        ids, counts = document if isinstance(document, tuple) else (document, np.ones(len(document), np.uint8))
        read += len(ids) - 1
        tokens += int(np.count_nonzero(counts[1:]))
        text_bytes += int(lengths_V[ids[1:]][counts[1:] > 0].sum())
        for window, (counted, *_) in zip(windows(ids, T, stride), windows(counts, T, stride), strict=True):
            waiting.append((*window, counted))
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


def evaluate_each(
    model: GPT, params, groups: Mapping[str, Sequence[Document]], *how, max_tokens: int | None = None, **more
) -> dict[str, float]:
    """evaluate() over all groups of documents; if there are several, also "NAME/bits_per_byte" of each. max_tokens: in all."""
    each = None if max_tokens is None else max(max_tokens // len(groups), 1)
    parts = {name: evaluate(model, params, documents, *how, max_tokens=each, **more) for name, documents in groups.items()}
    if len(parts) == 1:
        return next(iter(parts.values()))
    tokens, text_bytes = (sum(p[key] for p in parts.values()) for key in ("tokens", "bytes"))
    mean = lambda key, over, total: sum(p[key] * p[over] for p in parts.values()) / max(total, 1)
    loss = mean("loss", "tokens", tokens)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": mean("bits_per_byte", "bytes", text_bytes),
        "accuracy": mean("accuracy", "tokens", tokens),
        "tokens": tokens,
        "bytes": text_bytes,
        **{f"{name}/bits_per_byte": p["bits_per_byte"] for name, p in parts.items()},
    }


def window_batch(rows: list[tuple], T: int) -> Batch:
    """Batch [B, T] of rows as `windows` yields them: (T + 1 ids, how many are real, index of the first target to score),
    optionally with whether each id counts [T + 1].
    """
    ids = np.stack([r[0] for r in rows]).astype(np.int32)
    index = np.arange(T)
    real = np.array([r[1] for r in rows])[:, None]
    scored_from = np.array([r[2] for r in rows])[:, None]
    counts = np.stack([r[3] if len(r) > 3 else np.ones(T + 1, np.uint8) for r in rows])[:, 1:] > 0
    return Batch(
        tokens=ids[:, :-1],
        targets=ids[:, 1:],
        weights=((index >= scored_from) & (index < real - 1) & counts).astype(np.float32),
        positions=np.broadcast_to(index.astype(np.int32), ids[:, 1:].shape),
        segments=(index < real).astype(np.int32),
    )
