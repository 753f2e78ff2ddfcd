"""The Batch type and the batch stream.

K steps per dispatch, B rows, T positions
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
    """Arrays [..., B, T]. Positions count from 0 in each document; segments number a row's documents from 1 (0: padding)."""

    tokens: jax.Array  # int32, inputs
    targets: jax.Array  # int32, the token after each input
    weights: jax.Array  # float32, 1 where the loss counts
    positions: jax.Array  # int32
    segments: jax.Array  # int32
    beside: dict[str, jax.Array] = dataclasses.field(default_factory=dict)  # float32, extra per-target inputs of an objective


def make_batch(rows: list[Row], symbols: Symbols = Symbols()) -> Batch:
    """Rows of data/rows.py, T + 1 places each -> a Batch [B, T]. Attention and loss never cross documents."""
    tokens, segments = (np.stack([row[i] for row in rows]) for i in (0, 1))
    index = np.arange(tokens.shape[1])
    begins = np.diff(segments, axis=1, prepend=0) != 0
    positions = index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    # A window of the token stream may contain <bos>, which is never a target. If one symbol is both <bos> and <eos> (GPT-2),
    # it counts as <bos> when it follows another one.
    begins = tokens[:, 1:] == symbols.bos
    if symbols.bos in symbols.eos:
        begins &= tokens[:, :-1] == symbols.bos
    counts = np.stack([row[2] if len(row) > 2 else np.ones_like(row[0]) for row in rows])[:, 1:] > 0
    weights = (same & ~begins & counts).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, positions[:, :-1].astype(np.int32), segments[:, :-1])


def stack(batches: list[Batch]) -> Batch:
    return jax.tree.map(lambda *x: np.stack(x), *batches)


def build(rows, numbers: Sequence[Sequence[int | None]], symbols: Symbols = Symbols(), make=make_batch) -> Batch:
    """Batch [K, B, T] from the row numbers of each of K steps; None: an empty row. make: (rows, symbols) -> Batch of a step.

    A row depends only on its number, so each process of a job can build just its own rows of every step.
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

    rows: a row function of data/rows.py. numbers: step -> row number at each of the B places, None for an empty place
    (length.row_numbers); by default row i of step s is rows[s * B + i]. places: which of the B places this process builds
    (parallel.places), in order; the batches then contain only those. None: all. make: as for `build`.
    Up to `prefetch` dispatches are built ahead by `workers` threads; with 0 workers each is built when requested. Threads rather
    than processes: building a row takes microseconds, less than sending it between processes; if it is tokenised on the fly,
    SentencePiece releases the GIL.
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
