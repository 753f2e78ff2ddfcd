"""Row i of step s as a pure function of (seed, s, i).

That is the whole state of the data pipeline: whoever knows the step knows every row, so
resuming is exact at any position and seeking costs nothing.

T row length in tokens (a row also holds the token after its last, as a target)
"""

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

from gpt4o_jax.data import packing
from gpt4o_jax.data.token_cache import TokenCache
from gpt4o_jax.errors import data_error


def random_bits(seed: int, index) -> np.ndarray:
    """64 random bits for each index: SplitMix64 (Steele, Lea, Flood 2014). The same on every machine and NumPy."""
    with np.errstate(over="ignore"):
        z = np.asarray(index, np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        for _ in range(2):  # twice: neighbouring seeds and indices must not be related
            z = z + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return z


def shuffled(seed: int, epoch: int, n: int) -> np.ndarray:
    """The numbers 0 to n - 1 in the random order of an epoch."""
    return np.argsort(random_bits(seed, epoch * n + np.arange(n)), kind="stable")


class WindowRows:
    """Random contiguous windows of the whole token stream, as in nanoGPT."""

    fill = 1.0  # share of a row's places that hold a token

    def __init__(self, cache: TokenCache, T: int, seed: int):
        if len(cache.tokens) < T + 1:
            raise data_error(_too_little(cache, T))
        self.cache, self.T, self.seed = cache, T, seed
        self.tokens_per_epoch = len(cache.tokens)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Row number `row` of the run: (T + 1 tokens, and for each the number of its document, from 1)."""
        starts = len(self.cache.tokens) - self.T
        start = int(random_bits(self.seed, row) % np.uint64(starts))
        return np.asarray(self.cache.tokens[start : start + self.T + 1], np.int32), np.ones(self.T + 1, np.int32)


class PackedRows:
    """Each epoch: documents in a new random order, laid end to end, cut every T tokens.

    Nothing is thrown away but the last, incomplete row of an epoch.
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

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Row number `row` of the run: (T + 1 tokens, and for each the number of its document, from 1)."""
        epoch, row = divmod(row, self.rows_per_epoch)
        order, starts = self._epoch(epoch)
        begin, end = row * self.T, row * self.T + self.T + 1
        first = int(np.searchsorted(starts, begin, side="right")) - 1
        tokens, segments, at = [], [], begin
        while at < end:
            document = first + len(tokens)
            here = self.cache.document(order[document])[at - starts[document] : end - starts[document]]
            tokens.append(here)
            segments.append(np.full(len(here), len(tokens), np.int32))
            at += len(here)
        return np.concatenate(tokens).astype(np.int32), np.concatenate(segments)


class FirstFitRows:
    """Whole documents, as many as fit side by side in a row; each epoch the same rows in a new random order.

    Only documents of more than T + 1 tokens are cut. What stays free is padding: token 0, segment 0.
    """

    def __init__(self, cache: TokenCache, T: int, seed: int):
        if not cache.documents:
            raise data_error(_too_little(cache, T))
        self.cache, self.T, self.seed = cache, T, seed
        document, first, length = packing.pieces(np.diff(cache.offsets), T)
        row, self.rows_per_epoch = packing.first_fit(length, T + 1)
        order = np.argsort(row, kind="stable")
        self._begin = (cache.offsets[document] + first)[order]
        self._length = length[order]
        self._row_starts = np.searchsorted(row[order], np.arange(self.rows_per_epoch + 1))
        self.tokens_per_epoch = self.rows_per_epoch * T
        self.fill = float(length.sum() / (self.rows_per_epoch * (T + 1)))
        self._epoch = functools.lru_cache(maxsize=2)(lambda epoch: shuffled(seed, epoch, self.rows_per_epoch))

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Row number `row` of the run: (T + 1 tokens, and for each the number of its document, from 1; 0: padding)."""
        epoch, row = divmod(row, self.rows_per_epoch)
        row = self._epoch(epoch)[row]
        tokens, segments = np.zeros((2, self.T + 1), np.int32)
        at = 0
        pieces = range(self._row_starts[row], self._row_starts[row + 1])
        for number, piece in enumerate(pieces, start=1):
            begin, length = self._begin[piece], self._length[piece]
            tokens[at : at + length] = self.cache.tokens[begin : begin + length]
            segments[at : at + length] = number
            at += length
        return tokens, segments


class MixtureRows:
    """Rows of several members, each in its own order and without gaps, in the ratio of their shares.

    One member after another takes its share of the indices that are left, evenly spaced (a Beatty sequence, whose
    counting function is a floor): member and row within it follow from the index alone, in exact arithmetic.
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
        """An epoch: as many rows as all members have together."""
        return sum(m.tokens_per_epoch for m in self.members)

    def locate(self, row: int) -> tuple[int, int]:
        """(member, number of the row among those of this member)."""
        for member, (share, phase) in enumerate(self._steps):
            before = math.floor(row * share + phase)
            if math.floor((row + 1) * share + phase) > before:
                return member, before
            row -= before
        raise AssertionError("the last member takes all that is left")

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Row number `row` of the run: (T + 1 tokens, and for each the number of its document, from 1)."""
        member, row = self.locate(row)
        return self.members[member][row]


def make_rows(make: Callable, texts: Sequence, shares: Sequence[Fraction], T: int, seed: int):
    """The row function of a run over one source, or over several in the ratio of their shares.

    make(text, T, seed): the row function of one, such as those of ROWS over a token cache.
    """
    members = [make(text, T, seed + (i << 31)) for i, text in enumerate(texts)]  # seeds of runs end below 2^31
    return MixtureRows(members, shares, seed) if len(members) > 1 else members[0]


def _too_little(cache: TokenCache, T: int) -> str:
    return (
        f"training text has {len(cache.tokens)} tokens, but one row of model.context_length={T} needs {T + 1};"
        " use more text or a shorter context"
    )


ROWS = {"windows": WindowRows, "packed": PackedRows, "first_fit": FirstFitRows}
