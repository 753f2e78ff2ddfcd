"""The batches of a run: the same bytes from every source, at every position, for any prefetch, workers and processes."""

import threading

import jax
import numpy as np
import pytest

from gpt4o_jax.config import freeze
from gpt4o_jax.data import corpus
from gpt4o_jax.data.batches import build, dispatches
from gpt4o_jax.data.rows import ROWS
from gpt4o_jax.errors import RunError

T, K, B = 32, 2, 4


SOURCES = ("text", "jsonl", "parquet", "tfds", "conversations", "mixture", "world", "python_docs")
PATHS = {"text": "*.txt", "jsonl": "x.jsonl", "parquet": "x.parquet", "conversations": "chats.jsonl"}


@pytest.fixture(scope="module")
def rows_of(folder):
    def make(source, kind):
        data = {"source": source, "path": str(folder / PATHS.get(source, "")), "tfds_dir": str(folder / "tfds")}
        if source == "tfds":
            data["path"] = "numbered_texts:train"
        if source == "mixture":
            members = (f"text:{folder}/*.txt=0.3", f"parquet:{folder}/x.parquet=0.5", f"conversations:{folder}/chats.jsonl=0.2")
            data |= {"path": "", "mixture": members}
        if source == "world":
            data |= {"path": "numbers", "world_items": 300}
        if source == "python_docs":
            data["path"] = ""
        data |= {"separator": "\n", "rows": kind, "shingle_bytes": 0, "cache_dir": str(folder / "cache")}
        config = freeze({"seed": 5, "model": {"context_length": T}, "tokenizer": {"kind": "byte"}, "data": data})
        return corpus.training_rows(config, corpus.prepare(config))

    return make


def stream(rows, first, last, prefetch=2, workers=1):
    return list(dispatches(rows, first, last, K, B, prefetch, workers=workers))


def built(rows, step):
    """The batch of one dispatch, built directly."""
    return build(rows, [range(s * B, s * B + B) for s in range(step, step + K)])


def assert_same(a, b):
    assert [step for step, _ in a] == [step for step, _ in b] and a
    for (_, x), (_, y) in zip(a, b, strict=True):
        assert [(leaf.dtype, leaf.tobytes()) for leaf in jax.tree.leaves(x)] == [
            (leaf.dtype, leaf.tobytes()) for leaf in jax.tree.leaves(y)
        ]


def positions(rows):
    """Steps at the start, in the middle of a document, around the end of an epoch, and far out."""
    epoch = rows.tokens_per_epoch // T // B // K * K  # the last dispatch to begin within the first epoch
    return [0, K, 3 * K, epoch - K, epoch, epoch + K, 10**6]


# ---------------------------------------------------------------- any position


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("source", SOURCES)
def test_the_rest_is_the_same_from_any_position(rows_of, source, kind):
    rows = rows_of(source, kind)
    for first in positions(rows):
        whole = stream(rows, max(first - 3 * K, 0), first + 3 * K)
        for prefetch in (1, 5):
            rest = stream(rows_of(source, kind), first, first + 3 * K, prefetch)
            assert_same(rest, whole[-3:])


@pytest.mark.parametrize("kind", ROWS)
def test_the_kind_of_file_does_not_matter(rows_of, kind):
    expected = stream(rows_of("text", kind), 0, 20)
    for source in ("jsonl", "parquet", "tfds"):
        assert_same(stream(rows_of(source, kind), 0, 20), expected)


# ---------------------------------------------------------------- any number of workers, any number of processes


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("source", SOURCES)
def test_any_number_of_workers_builds_the_same(rows_of, source, kind):
    rows = rows_of(source, kind)
    for first in positions(rows):
        expected = [(step + K, built(rows, step)) for step in range(first, first + 10 * K, K)]
        for workers, prefetch in ((0, 1), (0, 7), (1, 1), (1, 5), (4, 4), (4, 12)):
            assert_same(stream(rows_of(source, kind), first, first + 10 * K, prefetch, workers), expected)


def test_without_workers_each_batch_is_built_where_it_is_asked_for(rows_of):
    """By the calling thread, and none in advance."""
    rows, asked = rows_of("text", "packed"), []

    class Noting:
        T = rows.T

        def __getitem__(self, i):
            asked.append((i, threading.current_thread()))
            return rows[i]

    batches = dispatches(Noting(), 0, 6, K, B, prefetch=3, workers=0)
    for count in (1, 2, 3):
        next(batches)
        assert asked == [(i, threading.current_thread()) for i in range(count * K * B)]


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("source", SOURCES)
def test_processes_of_a_pod_build_parts_of_the_same_batch(rows_of, source, kind):
    """Contiguous or interleaved rows: which process builds a row does not change its content."""
    rows = rows_of(source, kind)
    for first in (0, 7, 10**6):
        expected = stream(rows, first, first + 3 * K)
        for processes in (1, 2, 4):
            for shares in ([list(range(p, B, processes)) for p in range(processes)], np.split(np.arange(B), processes)):
                parts = [list(dispatches(rows_of(source, kind), first, first + 3 * K, K, B, 2, places=own)) for own in shares]
                order = np.argsort(np.concatenate(shares))
                join = lambda *leaves, order=order: np.concatenate(leaves, axis=1)[:, order]
                together = [(same[0][0], jax.tree.map(join, *(b for _, b in same))) for same in zip(*parts, strict=True)]
                assert_same(together, expected)


def test_workers_without_work_are_refused():
    with pytest.raises(RunError, match=r"nearest: data\.prefetch=4"):
        freeze({"data": {"workers": 4, "prefetch": 2}})
