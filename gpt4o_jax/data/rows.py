"""Row i of step s as a pure function of (seed, s, i).

The step is thus the only state of the data pipeline: resuming is exact at any position, and seeking costs nothing.

T row length in tokens (a row also holds the next token, as the last target)
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

import numpy as np

from gpt4o_jax.data import packing
from gpt4o_jax.data.token_cache import TokenCache
from gpt4o_jax.errors import data_error


def random_bits(seed: int, index) -> np.ndarray:
    """uint64, 64 random bits per index: SplitMix64 (Steele, Lea, Flood 2014). Equal on every machine and NumPy version."""
    with np.errstate(over="ignore"):
        z = np.asarray(index, np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        for _ in range(2):  # twice, so that neighbouring seeds and indices give unrelated bits
            z = z + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return z


def shuffled(seed: int, epoch: int, n: int) -> np.ndarray:
    """The numbers 0 to n - 1 in the random order of an epoch, int64 [n]."""
    return np.argsort(random_bits(seed, epoch * n + np.arange(n)), kind="stable")


# int32 arrays [T + 1]: tokens; the number of each one's document, from 1 (0: padding); and, if the loss leaves out part of the
# text, whether it counts each.
Row = tuple[np.ndarray, ...]


def _row(cache: TokenCache, T: int, pieces: Iterable[tuple[int, int]]) -> Row:
    """A row of T + 1 places: for each piece tokens begin to end of the cache, as a separate document; then padding."""
    row = np.zeros((2 if cache.counts is None else 3, T + 1), np.int32)
    at = 0
    for number, (begin, end) in enumerate(pieces, start=1):
        here = slice(at, at + end - begin)
        row[0, here] = cache.tokens[begin:end]
        row[1, here] = number
        if cache.counts is not None:
            row[2, here] = cache.counts[begin:end]
        at = here.stop
    return tuple(row)


class WindowRows:
    """Random contiguous windows of the whole token stream, as in nanoGPT. Raises RunError if it is shorter than a row."""

    fill = 1.0  # share of a row's places that hold a token

    def __init__(self, cache: TokenCache, T: int, seed: int):
        if len(cache.tokens) < T + 1:
            raise data_error(_too_little(cache, T))
        self.cache, self.T, self.seed = cache, T, seed
        self.tokens_per_epoch = len(cache.tokens)

    def __getitem__(self, row: int) -> Row:
        """Row number `row` of the run. All of it is document 1."""
        starts = len(self.cache.tokens) - self.T
        start = int(random_bits(self.seed, row) % np.uint64(starts))
        return _row(self.cache, self.T, [(start, start + self.T + 1)])


class PackedRows:
    """Each epoch: documents in a new random order, laid end to end, cut every T tokens.

    Only the last, incomplete row of an epoch is dropped. Raises RunError if the text is shorter than a row.
    """

    fill = 1.0

    def __init__(self, cache: TokenCache, T: int, seed: int):
        self.cache, self.T, self.seed = cache, T, seed
        self.rows_per_epoch = (len(cache.tokens) - 1) // T
        if self.rows_per_epoch < 1:
            raise data_error(_too_little(cache, T))
        self.tokens_per_epoch = self.rows_per_epoch * T
        self._epoch = functools.lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(document numbers in this epoch's order, where each starts in this epoch's stream)."""
        order = shuffled(self.seed, epoch, self.cache.documents)
        lengths = np.diff(self.cache.offsets)[order]
        return order, np.concatenate([[0], np.cumsum(lengths)])

    def __getitem__(self, row: int) -> Row:
        """Row number `row` of the run."""
        epoch, row = divmod(row, self.rows_per_epoch)
        order, starts = self._epoch(epoch)
        at, end = row * self.T, row * self.T + self.T + 1
        pieces, place = [], int(np.searchsorted(starts, at, side="right")) - 1
        while at < end:
            ahead = self.cache.offsets[order[place]] - starts[place]  # offset from this epoch's stream to the cache
            until = min(end, starts[place + 1])
            pieces.append((at + ahead, until + ahead))
            at, place = until, place + 1
        return _row(self.cache, self.T, pieces)


class FirstFitRows:
    """Whole documents, packed into rows by first fit; each epoch has the same rows in a new random order.

    Only documents of more than T + 1 tokens are cut; a conversation that long loses its end, since an answer without its question
    teaches nothing. Free places are padding: token 0, segment 0. Raises RunError if there is nothing to train on.
    """

    def __init__(self, cache: TokenCache, T: int, seed: int):
        if not cache.documents:
            raise data_error(_too_little(cache, T))
        self.cache, self.T, self.seed = cache, T, seed
        document, first, length = packing.pieces(np.diff(cache.offsets), T)
        if cache.counts is not None:
            document, first, length = _answered(cache, T, document, first, length)
        row, self.rows_per_epoch = packing.first_fit(length, T + 1)
        order = np.argsort(row, kind="stable")
        self._begin = (cache.offsets[document] + first)[order]
        self._length = length[order]
        self._row_starts = np.searchsorted(row[order], np.arange(self.rows_per_epoch + 1))
        self.tokens_per_epoch = self.rows_per_epoch * T
        self.fill = float(length.sum() / (self.rows_per_epoch * (T + 1)))
        self._epoch = functools.lru_cache(maxsize=2)(lambda epoch: shuffled(seed, epoch, self.rows_per_epoch))

    def __getitem__(self, row: int) -> Row:
        """Row number `row` of the run."""
        epoch, row = divmod(row, self.rows_per_epoch)
        row = self._epoch(epoch)[row]
        mine = slice(self._row_starts[row], self._row_starts[row + 1])
        return _row(self.cache, self.T, zip(self._begin[mine], self._begin[mine] + self._length[mine], strict=True))


def _answered(cache: TokenCache, T: int, document, first, length):
    """The pieces that begin a conversation and contain something the loss counts. Raises RunError if there are none."""
    ends = cache.offsets[document] + first + length
    counted = np.concatenate([[0], np.cumsum(cache.counts, dtype=np.int64)])
    keep = (first == 0) & (counted[ends] > counted[cache.offsets[document]])
    if not keep.any():
        raise data_error(
            f"no conversation has anything for the loss within its first {T + 1} tokens: an answer must begin within"
            f" model.context_length={T}; use a longer context, or data.loss_on=all"
        )
    return document[keep], first[keep], length[keep]


class MixtureRows:
    """Rows of several members in the ratio of their shares, each member in its own order and without gaps.

    Each member in turn takes its share of the remaining indices, evenly spaced (a Beatty sequence, whose counting function
    is a floor), so member and row within it follow from the index alone, in exact arithmetic.
    """

    def __init__(self, members: Sequence, shares: Sequence[Fraction], seed: int):
        """members: row functions; shares: of the rows, adding up to 1."""
        self.members, self.T = members, members[0].T
        self.fill = sum(float(share) * m.fill for m, share in zip(members, shares, strict=True))
        left = [sum(shares[i:]) for i in range(len(shares))]
        self._steps = [
            (share / rest, Fraction(int(random_bits(seed, i)), 2**64))
            for i, (share, rest) in enumerate(zip(shares, left, strict=True))
        ]

    @property
    def tokens_per_epoch(self) -> int:
        """The sum over all members."""
        return sum(m.tokens_per_epoch for m in self.members)

    def locate(self, row: int) -> tuple[int, int]:
        """(index of the member, row number within it)."""
        for member, (share, phase) in enumerate(self._steps):
            before = math.floor(row * share + phase)
            if math.floor((row + 1) * share + phase) > before:
                return member, before
            row -= before
        raise AssertionError("the last member takes all that is left")

    def __getitem__(self, row: int) -> Row:
        """Row number `row` of the run."""
        member, row = self.locate(row)
        return self.members[member][row]


def make_rows(make: Callable, texts: Sequence, shares: Sequence[Fraction], T: int, seed: int):
    """The row function of a run: over one source, or over several in the ratio of their shares.

    make(text, T, seed): the row function of one source, such as one of ROWS over a token cache.
    """
    members = [make(text, T, seed + (i << 31)) for i, text in enumerate(texts)]  # seeds of runs are below 2^31
    return MixtureRows(members, shares, seed) if len(members) > 1 else members[0]


def _too_little(cache: TokenCache, T: int) -> str:
    return (
        f"training text has {len(cache.tokens)} tokens, but one row of model.context_length={T} needs {T + 1};"
        " use more text or a shorter context"
    )


ROWS = {"windows": WindowRows, "packed": PackedRows, "first_fit": FirstFitRows}
