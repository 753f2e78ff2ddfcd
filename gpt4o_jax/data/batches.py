"""What the model eats: one small Batch, and the stream of them.

K steps in one dispatch, B rows, T positions
"""

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Sequence

import jax
import numpy as np

from gpt4o_jax.data.rows import Row
from gpt4o_jax.data.tokenizer import Symbols


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Batch:
    """Arrays [..., B, T]. Positions count within a document, segments number the documents of a row (0: padding)."""

    tokens: jax.Array  # int32, inputs
    targets: jax.Array  # int32, the token after each input
    weights: jax.Array  # float32, 1 where the loss counts
    positions: jax.Array  # int32
    segments: jax.Array  # int32
    beside: dict[str, jax.Array] = dataclasses.field(default_factory=dict)  # float32, what an objective reads of each target


def make_batch(rows: list[Row], symbols: Symbols = Symbols()) -> Batch:
    """Rows of data/rows.py -> a Batch [B, T]. Attention and loss never cross documents."""
    tokens, segments = (np.stack([row[i] for row in rows]) for i in (0, 1))
    index = np.arange(tokens.shape[1])
    begins = np.diff(segments, axis=1, prepend=0) != 0
    positions = index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    # A window over a stream of documents may hold <bos> inside: nobody is asked to predict it. Where one symbol is both
    # <bos> and <eos> (GPT-2), it is <bos> behind another.
    begins = tokens[:, 1:] == symbols.bos
    if symbols.bos in symbols.eos:
        begins &= tokens[:, :-1] == symbols.bos
    counts = np.stack([row[2] if len(row) > 2 else np.ones_like(row[0]) for row in rows])[:, 1:] > 0
    weights = (same & ~begins & counts).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, positions[:, :-1].astype(np.int32), segments[:, :-1])


def stack(batches: list[Batch]) -> Batch:
    return jax.tree.map(lambda *x: np.stack(x), *batches)


def build(rows, numbers: Sequence[Sequence[int | None]], symbols: Symbols = Symbols(), make=make_batch) -> Batch:
    """Batch [K, B, T] of the rows with these numbers, for each of K steps; None: an empty row. make: of rows, a step's Batch.

    A row depends on its number alone, so a process of several may build its part of each step's.
    """
    return stack([make(_rows_of(rows, step), symbols) for step in numbers])


def _rows_of(rows, numbers: Sequence[int | None]) -> list[Row]:
    empty = (np.zeros(rows.T + 1, np.int32),) * 2
    return [empty if n is None else rows[n] for n in numbers]


def dispatches(
    rows,
    first_step: int,
    last_step: int,
    K: int,
    B: int,
    prefetch: int,
    numbers=None,
    workers: int = 1,
    symbols=Symbols(),
    places: Sequence[int] | None = None,
    make=make_batch,
):
    """Yields (step after the dispatch, Batch [K, B, T]) from first_step to last_step, the same for any prefetch and workers.

    rows: a row function of data/rows.py. numbers: step -> which of its rows stand in the B places, None for an empty one
    (length.row_numbers); without it row i of step s is rows[s * B + i]. places: those of the B that this process builds
    (parallel.places), in order; the batches then hold no others. None: all. make: as for `build`.
    Up to `prefetch` dispatches are built ahead, by `workers` threads; with 0 of them each is built by who asks for it. Threads,
    not processes: a row takes microseconds to build, and sending it from one process to another takes longer; where it is
    tokenised first, SentencePiece lets others run.
    """
    numbers = numbers or (lambda s: range(s * B, s * B + B))

    def share(step: int) -> list[int | None]:
        among = numbers(step)
        return [among[p] for p in (range(B) if places is None else places)]

    def built(step: int) -> Batch:
        return build(rows, [share(s) for s in range(step, step + K)], symbols, make)

    starts = iter(range(first_step, last_step, K))
    if not workers:
        for step in starts:
            yield step + K, built(step)
        return
    pool = concurrent.futures.ThreadPoolExecutor(workers, "batches")
    submit = lambda step: (step, pool.submit(built, step))
    try:
        waiting = [submit(step) for step in itertools.islice(starts, prefetch)]
        while waiting:
            step, future = waiting.pop(0)
            yield step + K, future.result()
            waiting += map(submit, itertools.islice(starts, 1))
    finally:
        pool.shutdown(cancel_futures=True)
