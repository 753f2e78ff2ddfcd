"""Rows of text tokenised on the fly: the same bytes, whoever reads them and whatever is already known about the text."""

import threading
import tracemalloc
from collections.abc import Sequence

import jax
import numpy as np
import pytest

from gpt4o_jax.config import freeze, to_dict
from gpt4o_jax.data import corpus, lanes, sources
from gpt4o_jax.data.batches import dispatches
from gpt4o_jax.data.rows import shuffled
from gpt4o_jax.data.tokenizer import byte_tokenizer
from gpt4o_jax.errors import ExitCode, RunError, data_error

TEXTS = [f"{i} bottles " + "and another one " * (i % 11) for i in range(150)]  # as in conftest.py
T, K, B, LANES = 32, 2, 4, 3
SOURCES = ("text", "jsonl", "parquet", "tfds", "mixture")
PATHS = {"text": "*.txt", "jsonl": "x.jsonl", "parquet": "x.parquet"}


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "CHUNK", 8)
        yield


@pytest.fixture
def config_of(folder, texts, tmp_path):
    assert texts == TEXTS

    def make(source="text", cache="cache", **knobs):
        data = {"source": source, "path": str(folder / PATHS.get(source, "")), "tfds_dir": str(folder / "tfds")}
        if source == "tfds":
            data["path"] = "numbered_texts:train"
        if source == "mixture":
            data |= {"path": "", "mixture": (f"jsonl:{folder}/x.jsonl=0.3", f"parquet:{folder}/x.parquet=0.7")}
        data |= {"separator": "\n", "shingle_bytes": 0, "cache_dir": str(tmp_path / cache), "lanes": LANES} | knobs
        return freeze({"seed": 5, "model": {"context_length": T}, "tokenizer": {"kind": "byte"}, "data": data})

    return make


def open_rows(config):
    return corpus.training_rows(config, corpus.prepare(config))


def stream(rows, first, last, prefetch=2, workers=1, places=None):
    return list(dispatches(rows, first, last, K, B, prefetch, workers=workers, places=places))


def assert_same(a, b):
    assert [step for step, _ in a] == [step for step, _ in b] and a
    for (_, x), (_, y) in zip(a, b, strict=True):
        assert [(leaf.dtype, leaf.tobytes()) for leaf in jax.tree.leaves(x)] == [
            (leaf.dtype, leaf.tobytes()) for leaf in jax.tree.leaves(y)
        ]


def training_ids():
    """Ids of the training documents of each chunk."""
    encode, kept = byte_tokenizer().document, [t if not sources.is_held(t, 0.05) else None for t in TEXTS]
    return [[encode(t) for t in kept[i : i + 8] if t] for i in range(0, len(TEXTS), 8)]


EPOCH = sum(len(ids) for chunk in training_ids() for ids in chunk) // T // B // K * K  # the start of its last whole dispatch
POSITIONS = [0, K, 3 * K, EPOCH - K, EPOCH, EPOCH + K, 5 * EPOCH + 3 * K]


# ---------------------------------------------------------------- what a row is


def brute_force(n_lanes, epochs, seed=5):
    """For each lane, its epochs end to end: (ids, running document number)."""
    chunks = training_ids()
    for lane in range(n_lanes):
        mine, stream, number = chunks[lane::n_lanes], [], []
        for epoch in range(epochs):
            for c in shuffled(lanes._seed(seed, lane), epoch, len(mine)):
                documents, seed_of = mine[c], lanes._seed(seed, len(chunks) + lane + n_lanes * int(c))
                for d in shuffled(seed_of, epoch, len(documents)):
                    number += [number[-1] + 1 if number else 0] * len(documents[d])
                    stream += documents[d]
        yield np.array(stream), np.array(number)


@pytest.mark.parametrize("n_lanes", [1, 3, 19])
def test_rows_are_the_lanes_cut_into_pieces(config_of, n_lanes):
    rows = open_rows(config_of(lanes=n_lanes))
    for lane, (ids, number) in enumerate(brute_force(n_lanes, epochs=3)):
        for r in range((len(ids) - 1) // T):
            tokens, segments = rows[r * n_lanes + lane]
            here = slice(r * T, r * T + T + 1)
            np.testing.assert_array_equal(tokens, ids[here])
            np.testing.assert_array_equal(segments, number[here] - number[r * T] + 1)
            assert tokens.dtype == segments.dtype == np.int32


@pytest.mark.parametrize("n_lanes", [1, 5])
def test_each_epoch_has_every_document_once_in_another_order(n_lanes):
    orders = set()
    for ids, number in brute_force(n_lanes, epochs=3):
        ends = np.flatnonzero(np.diff(number)) + 1
        documents = [tuple(d) for d in np.split(ids, ends)]
        third = len(documents) // 3
        epochs = [documents[i * third : (i + 1) * third] for i in range(3)]
        assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
        orders |= {tuple(e) for e in epochs}
    assert len(orders) == 3 * n_lanes


def test_hold_out_and_training_text_are_those_of_a_cache(config_of):
    in_lanes, cached = corpus.prepare(config_of()), corpus.prepare(config_of(lanes=0))
    np.testing.assert_array_equal(in_lanes.members[0].holdout.tokens, cached.members[0].holdout.tokens)
    (mine,), (theirs,) = in_lanes.members, cached.members
    for size in ("token_count", "documents", "text_bytes"):
        assert getattr(mine.training, size) == getattr(theirs.training, size)
    assert open_rows(config_of()).tokens_per_epoch == theirs.training.token_count // T * T
    assert in_lanes.name != cached.name


def test_a_tokenizer_of_little_text_is_that_of_a_cache(config_of):
    kinds = [{"kind": "bpe", "vocab_size": 330}, {"kind": "char"}]
    of = lambda n, kind: corpus.prepare(freeze(to_dict(config_of(lanes=n)) | {"tokenizer": kind})).tokenizer.digest
    for kind in kinds:
        assert of(LANES, kind) == of(0, kind)


def test_much_text_is_sampled_by_chunks_in_random_order():
    every = [f"{i} " * 50 for i in range(400)]
    kept = lambda d: sources.is_held(d, 0.05)
    some = lanes.sample(every, 0.05, 20_000)
    assert 20_000 <= sum(map(len, some)) < 22_000 and not any(map(kept, some))
    assert some == [d for d in every if d in some] and len({int(d.split()[0]) // 8 for d in some}) < 20
    assert int(some[0].split()[0]) < 100 and int(some[-1].split()[0]) > 300
    assert lanes.held_out(every, 0.05) == list(filter(kept, every))


# ---------------------------------------------------------------- any position, any reader


@pytest.mark.parametrize("source", SOURCES)
def test_the_rest_is_the_same_from_any_position(config_of, source):
    whole = stream(open_rows(config_of(source)), 0, POSITIONS[-1] + 3 * K)
    for first in POSITIONS:
        expected = whole[first // K : first // K + 3]
        for cache, prefetch in (("cache", 1), ("cache", 5), (f"empty {first}", 2)):  # with and without what the run has found
            assert_same(stream(open_rows(config_of(source, cache)), first, first + 3 * K, prefetch), expected)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_any_number_of_workers_builds_the_same(config_of, source, workers):
    for first in (0, EPOCH - 10 * K, 5 * EPOCH, 1_000_000 // K * K):
        expected = stream(open_rows(config_of(source)), first, first + 20 * K)
        for prefetch in (max(workers, 1), 3 * workers + 1):
            got = stream(open_rows(config_of(source, f"{first} {prefetch}")), first, first + 20 * K, prefetch, workers)
            assert_same(got, expected)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_of_a_pod_build_parts_of_the_same_batch(config_of, source, processes):
    expected = stream(open_rows(config_of(source)), EPOCH - 5 * K, EPOCH + 5 * K)
    share = B // processes
    parts = [
        stream(open_rows(config_of(source, f"{p}")), EPOCH - 5 * K, EPOCH + 5 * K, places=range(p * share, (p + 1) * share))
        for p in range(processes)
    ]
    together = [
        (step, jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *(part[i][1] for part in parts)))
        for i, (step, _) in enumerate(expected)
    ]
    assert_same(together, expected)


@pytest.mark.parametrize("source", ["jsonl", "parquet", "tfds"])
def test_the_kind_of_file_does_not_matter(config_of, source):
    assert_same(stream(open_rows(config_of(source)), 0, 20), stream(open_rows(config_of("text")), 0, 20))


def test_a_process_reads_only_the_chunks_of_its_lanes(config_of):
    rows = open_rows(config_of(lanes=B))
    stream(rows, 0, 2 * EPOCH, places=[1, 2])
    known = [rows.chunks.known(c) is not None for c in range(len(rows.chunks))]
    assert known == [c % B in (1, 2) for c in range(len(rows.chunks))]


def test_what_is_known_is_not_tokenised_again(config_of, monkeypatch):
    stream(open_rows(config_of()), 0, 2 * EPOCH)  # now every chunk is known
    rows, asked = open_rows(config_of()), []
    texts = rows.chunks.texts
    monkeypatch.setattr(rows.chunks, "texts", lambda chunk: asked.append(chunk) or texts(chunk))
    stream(rows, 5 * EPOCH, 5 * EPOCH + K)
    assert len(asked) <= 2 * LANES
    assert rows.tokens_per_epoch and len(asked) <= 2 * LANES


def test_what_is_known_travels_with_the_run(config_of, tmp_path, monkeypatch):
    """To a machine with an empty cache, from two processes that each know only their own lanes."""
    for process, places in enumerate(([0, 1], [2, 3])):
        rows = open_rows(config_of(cache=f"of {process}", lanes=B))
        stream(rows, 0, 2 * EPOCH, places=places)
        rows.chunks.keep(tmp_path / "run", process)
    (tmp_path / "run" / f"{rows.chunks.name}.2").write_bytes(b"cut off")
    rows, asked = open_rows(config_of(cache="new", lanes=B)), []
    rows.chunks.take(tmp_path / "run")
    texts = rows.chunks.texts
    monkeypatch.setattr(rows.chunks, "texts", lambda chunk: asked.append(chunk) or texts(chunk))
    assert_same(stream(rows, 5 * EPOCH, 5 * EPOCH + K), stream(open_rows(config_of(lanes=B)), 5 * EPOCH, 5 * EPOCH + K))
    assert len(asked) <= 2 * B


# ---------------------------------------------------------------- memory


class Endless(Sequence[str]):
    """20,000 documents of 5,000 bytes, generated on access."""

    def __len__(self):
        return 20_000

    def __getitem__(self, i):
        return f"{i:05} " * 833


def test_memory_does_not_grow_with_the_text(tmp_path):
    chunks = lanes.Chunks(Endless(), 0.01, byte_tokenizer(), tmp_path / "index")
    rows = lanes.LaneRows(chunks, 1024, 0, 4)
    rows[0]
    tracemalloc.start()
    try:
        for n in range(8_000):
            rows[n]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20, "of 8 MB that were read, and 100 MB that there are"


# ---------------------------------------------------------------- refusals


def test_more_lanes_than_chunks_are_refused(config_of):
    with pytest.raises(RunError, match=r"data.lanes=20: the source has 19 chunk.*nearest: data\.lanes=19"):
        open_rows(config_of(lanes=20))


def test_a_damaged_index_is_refused(config_of, tmp_path):
    open_rows(config_of())
    (path,) = (tmp_path / "cache").rglob("chunks.bin")
    path.write_bytes(b"short")
    with pytest.raises(RunError, match=r"damaged \(5 bytes, expected 152\)"):
        open_rows(config_of())


def test_files_in_pieces_too_large_to_read_for_each_chunk_are_refused(config_of, monkeypatch):
    monkeypatch.setattr(lanes, "_LARGEST_BLOCK", 12)
    with pytest.raises(RunError, match="13 documents of a file can only be read together"):
        open_rows(config_of("parquet"))


def test_a_bad_record_found_in_the_middle_of_a_run_says_how_to_go_on(tmp_path):
    class Texts(list):
        def __getitem__(self, i):
            if i == 12:
                raise data_error("bad.jsonl:13: no text")
            return super().__getitem__(i)

    rows = lanes.LaneRows(lanes.Chunks(Texts(TEXTS), 1e-4, byte_tokenizer(), tmp_path / "index"), T, 0, 2)
    with pytest.raises(
        RunError, match=r"bad.jsonl:13: no text .*`data report` checks all of them.*start a new one .*--config.init.from"
    ) as e:
        [rows[n] for n in range(400)]
    assert e.value.code == ExitCode.DATA


def test_a_lane_without_text_ends_in_an_error_not_in_a_loop(tmp_path):
    rows = lanes.LaneRows(lanes.Chunks([" "] * 8 + ["text"] * 8, 1e-4, byte_tokenizer(), tmp_path / "index"), T, 0, 2)
    assert rows[1][0].shape == (T + 1,)
    with pytest.raises(RunError, match="no training text in chunks"):
        rows[0]


@pytest.mark.parametrize("knob", [{"rows": "windows"}, {"holdout": "tail"}, {"shingle_bytes": 50}])
def test_what_needs_the_whole_text_is_refused(knob):
    with pytest.raises(RunError, match=r"needs the whole text before training"):
        freeze({"data": {"lanes": 2, "shingle_bytes": 0} | knob})


def test_threads_may_ask_for_rows_in_any_order(config_of):
    rows, expected = open_rows(config_of()), open_rows(config_of(cache="other"))
    order = np.random.default_rng(0).permutation(200).tolist()
    got = {}
    threads = [
        threading.Thread(target=lambda part: got.update({n: rows[n] for n in part}), args=(order[i::4],)) for i in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for n in range(200):
        np.testing.assert_array_equal(got[n], expected[n])
