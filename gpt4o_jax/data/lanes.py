"""Rows of a corpus too large to tokenise beforehand: documents are tokenised when a row asks for them.

Documents are grouped in chunks of 256, and chunk c belongs to lane c % N, N = data.lanes. A lane is an endless token stream: in
each epoch its chunks come in a new random order, and so do the documents within each chunk, laid end to end. Row n of the run is
row n // N of lane n % N, where row r holds the T tokens from r * T on, and the next one.

So a row depends only on (seed, n), as in data/rows.py. What is kept on disk only saves work: the number of tokens in each chunk,
8 bytes per 256 documents, written to data.cache_dir as it becomes known, and to the run with each checkpoint. With these counts
any position is found immediately, and starting there tokenises part of one chunk per lane; without them, everything before it is
tokenised again.

Why chunks: files are read 256 documents at a time, and the index stays small. The price is that documents are shuffled by chunk
and within chunks, not individually. Why chunks are dealt out in turn, not as one range per lane: lanes finish an epoch within a
chunk of each other, and a corpus sorted by subject gives no lane a subject of its own. If N is train.batch_size or a multiple of
it, each process of a job reads only the chunks of its own rows; otherwise every process reads everything.

Memory: up to two chunks per lane, as text or tokens, and what the source holds: for text files, the two read last.
"""

import bisect
import concurrent.futures
import functools
import os
import threading
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gpt4o_jax.data import sources
from gpt4o_jax.data.records import Blocks
from gpt4o_jax.data.rows import random_bits, shuffled
from gpt4o_jax.data.token_cache import token_dtype
from gpt4o_jax.data.tokenizer import Tokenizer
from gpt4o_jax.errors import ExitCode, RunError, data_error
from gpt4o_jax.paths import appearing_whole

CHUNK = 256  # documents
HOLDOUT_BYTES = 1 << 24  # a final evaluation reads all of the hold-out
_LARGEST_BLOCK = 1 << 14  # documents in a block, which the source reads whole for every chunk in it


class Chunks:
    """The training documents of a source, in chunks of CHUNK source documents without held-out and blank ones."""

    def __init__(self, documents: Sequence[str], fraction: float, tokenizer: Tokenizer, folder: Path):
        """fraction: share of the documents that is held out. folder: keeps the token counts of the chunks.

        Raises RunError if the source reads too many documents at once, or the counts are damaged or cannot be written.
        """
        if isinstance(documents, Blocks) and documents.largest > _LARGEST_BLOCK:
            raise data_error(
                f"data.lanes: {documents.largest} documents of a file can only be read together, and would be for every {CHUNK};"
                f" write at most {_LARGEST_BLOCK}, better 1000, a Parquet row group or text file, or set data.lanes=0"
            )
        self.name = folder.name
        self._source, self._fraction, self.tokenizer = documents, fraction, tokenizer
        self._known = _open_index(folder, -(-len(documents) // CHUNK))  # tokens of each chunk, plus one; 0: not known
        self._reading = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def texts(self, chunk: int) -> list[str]:
        """Raises RunError for a record that cannot be read, perhaps in the middle of a run: finding such records beforehand would
        read the whole corpus at every start. `data report` does, once.
        """
        with self._reading:  # otherwise threads would evict each other's files from the source's memory
            try:
                texts = _texts(self._source, chunk)
            except RunError as e:
                raise RunError(
                    f"{e} (data.lanes reads records when they are needed; `data report` checks all of them. A run that has begun"
                    " cannot go on with a repaired text: start a new one from its weights, with --config.init.from)",
                    e.code,
                ) from None
        return [d for d in texts if not sources.is_held(d, self._fraction)]

    def known(self, chunk: int) -> int | None:
        """Number of tokens in a chunk; None if not counted yet."""
        return int(self._known[chunk]) - 1 if self._known[chunk] else None

    def learn(self, chunk: int, tokens: int) -> None:
        self._known[chunk] = tokens + 1

    def keep(self, folder, process: int) -> None:
        """Writes the known counts to a folder of the run (any epath), for machines with another data.cache_dir."""
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{self.name}.{process}.tmp"
        temporary.write_bytes(zlib.compress(self._known.tobytes()))
        temporary.replace(folder / f"{self.name}.{process}")

    def take(self, folder) -> None:
        """Reads the counts that `keep` wrote in all processes."""
        for path in sorted(folder.glob(f"{self.name}.*")) if folder.exists() else ():
            try:
                stored = np.frombuffer(zlib.decompress(path.read_bytes()), np.int64)
                np.maximum(self._known, stored, out=self._known)  # counts that both know are equal
            except (ValueError, zlib.error):  # truncated while it was written: counted again
                continue

    @functools.cached_property
    def token_count(self) -> int:
        """Tokens in all chunks; counts those not known yet, on all cores."""
        missing, cores = np.flatnonzero(np.asarray(self._known) == 0), os.cpu_count() or 1

        def count(part: np.ndarray) -> None:
            for chunk in part.tolist():
                self.learn(chunk, sum(len(self.tokenizer.document(text)) for text in self.texts(chunk)))

        with concurrent.futures.ThreadPoolExecutor(cores) as pool:  # SentencePiece releases the GIL
            list(pool.map(count, (missing[i::cores] for i in range(cores))))
        return int(np.sum(self._known)) - len(self)

    @functools.cached_property
    def _sizes(self) -> tuple[int, int]:
        sizes = [len(text.encode()) for chunk in range(len(self)) for text in self.texts(chunk)]
        return len(sizes), sum(sizes)

    @property
    def documents(self) -> int:
        """Number of training documents; reads them all."""
        return self._sizes[0]

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all training documents; reads them all."""
        return self._sizes[1]


class LaneRows:
    """The rows of N lanes, in turn. Raises RunError if there are fewer chunks than lanes."""

    fill = 1.0  # share of a row's places that hold a token

    def __init__(self, chunks: Chunks, T: int, seed: int, lanes: int):
        if lanes > len(chunks):
            raise data_error(
                f"data.lanes={lanes}: the source has {len(chunks)} chunk(s) of up to {CHUNK} documents, and a lane needs one;"
                f" nearest: data.lanes={len(chunks)}, or 0"
            )
        self.chunks, self.T = chunks, T
        self._lanes = [_Lane(chunks, range(lane, len(chunks), lanes), seed, T) for lane in range(lanes)]

    @property
    def tokens_per_epoch(self) -> int:
        """Of all lanes together, a multiple of T; counts the whole corpus if that has not been done yet."""
        return self.chunks.token_count // self.T * self.T

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Row number `row` of the run: (T + 1 tokens, the number of each one's document in the row, from 1), both int32."""
        row, lane = divmod(row, len(self._lanes))
        return self._lanes[lane][row]


class _Lane:
    """An endless stream of tokens. A place is the number of a chunk in it, counted across epochs."""

    def __init__(self, chunks: Chunks, mine: range, seed: int, T: int):
        self._chunks, self._mine, self._seed, self._T = chunks, mine, seed, T
        self._first = array("q", [0])  # tokens before each chunk of the first epoch, as far as known
        self._lock = threading.Lock()
        self._order = functools.lru_cache(maxsize=2)(self._order)
        self._starts = functools.lru_cache(maxsize=2)(self._starts)
        self._open = functools.lru_cache(maxsize=2)(self._open)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        at, end = row * self._T, row * self._T + self._T + 1
        tokens, segments = [], []
        with self._lock:
            while at < end:
                place, start = self._locate(at)
                for ids in self._open(place).between(at - start, end - start):
                    tokens.append(ids)
                    segments.append(np.full(len(ids), len(tokens), np.int32))
                    at += len(ids)
        return np.concatenate(tokens).astype(np.int32), np.concatenate(segments)

    def _locate(self, at: int) -> tuple[int, int]:
        """(place, tokens before it) of the chunk that holds token `at`."""
        n, first = len(self._mine), self._first
        while len(first) <= n and first[-1] <= at:
            place = len(first) - 1
            chunk = self._chunk(place)
            count = self._chunks.known(chunk)
            if count is None:
                opened = self._open(place)
                if opened.reaches(at - first[-1]):
                    return place, first[-1]
                count = opened.tokens
                self._chunks.learn(chunk, count)
            first.append(first[-1] + count)
        if at < first[-1]:
            place = bisect.bisect_right(first, at) - 1
            return place, first[place]
        if not first[-1]:
            raise data_error(f"data.lanes: no training text in chunks {list(self._mine[:3])}, ... of one lane; use fewer lanes")
        epoch, rest = divmod(at, first[-1])
        starts = self._starts(epoch)
        place = int(np.searchsorted(starts, rest, side="right")) - 1
        return epoch * n + place, epoch * first[-1] + int(starts[place])

    def _order(self, epoch: int) -> np.ndarray:
        return shuffled(_seed(self._seed, self._mine.start), epoch, len(self._mine))

    def _chunk(self, place: int) -> int:
        epoch, place = divmod(place, len(self._mine))
        return self._mine[self._order(epoch)[place]]

    def _starts(self, epoch: int) -> np.ndarray:
        """Tokens before each chunk of an epoch; all counts are known by then."""
        counts = [self._chunks.known(self._mine[i]) for i in self._order(epoch)]
        return np.cumsum([0, *counts[:-1]])

    def _open(self, place: int) -> "_Opened":
        chunk, epoch = self._chunk(place), place // len(self._mine)
        texts = self._chunks.texts(chunk)
        order = shuffled(_seed(self._seed, len(self._chunks) + chunk), epoch, len(texts))
        return _Opened([texts[i] for i in order], self._chunks.tokenizer)


class _Opened:
    """The documents of a chunk in the order of an epoch, tokenised on demand."""

    def __init__(self, texts: list[str], tokenizer: Tokenizer):
        self._left, self._tokenizer, self._dtype = texts[::-1], tokenizer, token_dtype(tokenizer)
        self._ids: list[np.ndarray] = []
        self._starts = [0]

    @property
    def tokens(self) -> int:
        """Number of tokens in the documents tokenised so far."""
        return self._starts[-1]

    def reaches(self, at: int) -> bool:
        """Whether the chunk has a token number `at`; if so, tokenises up to it."""
        while self.tokens <= at and self._left:
            self._ids.append(np.array(self._tokenizer.document(self._left.pop()), self._dtype))
            self._starts.append(self.tokens + len(self._ids[-1]))
        return at < self.tokens

    def between(self, begin: int, end: int) -> Iterator[np.ndarray]:
        """Tokens begin to end, or to the chunk's last, one array per document."""
        self.reaches(end - 1)
        for d in range(bisect.bisect_right(self._starts, begin) - 1, len(self._ids)):
            start = self._starts[d]
            if start >= end:
                return
            yield self._ids[d][max(begin - start, 0) : end - start]


def _seed(seed: int, index: int) -> int:
    """A separate seed for each lane and each chunk."""
    return int(random_bits(seed, index)) >> 1


# ---------------------------------------------------------------- hold-out, and text for a tokenizer


def held_out(documents: Sequence[str], fraction: float) -> list[str]:
    """The held-out documents, in order: all of them, or those of randomly chosen chunks until there are HOLDOUT_BYTES.

    Training leaves out the others too: whether a document is held out depends only on its text.
    """
    return _gather(documents, lambda d: sources.is_held(d, fraction), HOLDOUT_BYTES)


def sample(documents: Sequence[str], fraction: float, limit: int) -> list[str]:
    """Training documents, in order: all of them, or those of randomly chosen chunks until there are `limit` bytes."""
    return _gather(documents, lambda d: not sources.is_held(d, fraction), limit)


def _gather(documents: Sequence[str], wanted: Callable[[str], bool], limit: int) -> list[str]:
    found, size = {}, 0
    for chunk in shuffled(0, 0, -(-len(documents) // CHUNK)).tolist():
        if size >= limit:
            break
        found[chunk] = [d for d in _texts(documents, chunk) if wanted(d)]
        size += sum(len(d.encode()) for d in found[chunk])
    return [d for chunk in sorted(found) for d in found[chunk]]


def _texts(documents: Sequence[str], chunk: int) -> list[str]:
    """The documents of a chunk, without blank ones."""
    texts = (documents[i] for i in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(documents))))
    return [d for d in texts if d.strip()]


# ---------------------------------------------------------------- the index


def _open_index(folder: Path, chunks: int) -> np.ndarray:
    """int64 [chunks], memory-mapped and shared between processes, which all write the same values."""
    path = folder / "chunks.bin"
    try:
        if not path.exists():
            with appearing_whole(path) as beside:
                beside.write_bytes(bytes(8 * chunks))  # not sparse: a full disk is reported here, not in the middle of training
        if path.stat().st_size != 8 * chunks:
            raise data_error(f"{path}: damaged ({path.stat().st_size} bytes, expected {8 * chunks}); delete that folder")
        return np.memmap(path, np.int64, "r+", shape=(chunks,))
    except OSError as e:
        raise RunError(
            f"{path}: cannot write ({e.strerror or e}); free space or set --config.data.cache_dir", ExitCode.STORAGE
        ) from None
