"""JSONL and Parquet give back the documents written; broken ones are refused by file and line, row or column."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4o_jax.config import DataConfig, freeze
from gpt4o_jax.data import corpus, file_digests, records, sources
from gpt4o_jax.errors import ExitCode, RunError

TEXTS = [f'document {i}: naïve ☃ "quoted"\n{"x" * (i % 7)}' for i in range(1000)]


def refusal(call, *args, code=ExitCode.DATA) -> str:
    with pytest.raises(RunError) as e:
        call(*args)
    assert e.value.code == code
    return str(e.value)


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts)))
    return path


def write_parquet(path, texts, field="text", rows=128, **columns):
    pq.write_table(pa.table({"id": range(len(texts)), field: texts, **columns}), path, row_group_size=rows)
    return path


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet}


def config(source, path, **knobs):
    return DataConfig(source=source, path=str(path), **knobs)


# ---------------------------------------------------------------- reading what was written


@pytest.mark.parametrize("source", WRITERS)
@pytest.mark.parametrize("n", [1, 127, 128, 129, 1000])
def test_documents_come_back_in_order_and_at_random(source, n, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_LINES", 100)
    path = WRITERS[source](tmp_path / "x", TEXTS[:n], field="body")
    documents = sources.load(config(source, path, field="body"))
    assert list(documents) == TEXTS[:n] and len(documents) == n
    for i in np.random.default_rng(0).integers(0, n, 50):
        assert documents[int(i)] == TEXTS[i]
    with pytest.raises(IndexError):
        documents[n]


@pytest.mark.parametrize("source", WRITERS)
def test_files_of_a_folder_follow_each_other_by_name(source, tmp_path):
    for name, part in (("b", TEXTS[3:]), ("a", TEXTS[:2]), ("a2", TEXTS[2:3]), (".hidden", [])):
        WRITERS[source](tmp_path / name, part)
    assert list(sources.load(config(source, tmp_path))) == TEXTS
    assert list(sources.load(config(source, f"{tmp_path}/a*"))) == TEXTS[:3]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1), st.integers(1, 5))
def test_any_text_survives_jsonl_and_parquet(tmp_path_factory, texts, block):
    folder = tmp_path_factory.mktemp("any")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_LINES", block)
        assert list(records.jsonl([write_jsonl(folder / "j", texts)], "text")) == texts
        assert list(records.parquet([write_parquet(folder / "p", texts, rows=block)], "text")) == texts


def test_blank_lines_and_no_newline_at_the_end(tmp_path):
    (tmp_path / "x").write_bytes(b'{"text": "a"}\n\n  \r\n{"text": "b"}\r\n{"text": "c"}')
    assert list(sources.load(config("jsonl", tmp_path / "x"))) == ["a", "", "", "b", "c"]


@pytest.mark.parametrize("line", [b"", b"\n", b'{"text": "b"}\n'])
def test_a_byte_order_mark_is_passed_over(tmp_path, line):
    """Files from Windows programs begin with one, even those without a document."""
    (tmp_path / "a").write_bytes(b'{"text": "a"}\n')
    (tmp_path / "b").write_bytes(b"\xef\xbb\xbf" + line)
    assert [d for d in sources.load(config("jsonl", tmp_path)) if d] == ["a", "b"][: 1 + (len(line) > 1)]


def test_a_column_is_read_by_its_whole_name(tmp_path):
    """In pyarrow, field `text` of column `a` has the same name as column `a.text`."""
    path = write_parquet(tmp_path / "x.parquet", TEXTS[:3], field="a.text", a=[{"text": "no"}] * 3)
    table = pq.read_table(path)
    pq.write_table(table.select(["a", "id", "a.text"]), path)
    assert list(sources.load(config("parquet", path, field="a.text"))) == TEXTS[:3]


def test_blank_documents_are_neither_trained_on_nor_held_out(tmp_path):
    texts = [t for text in TEXTS for t in (text, "", " \n")]
    knobs = config("jsonl", write_jsonl(tmp_path / "x", texts), shingle_bytes=0)
    training, held = sources.split(sources.load(knobs), knobs)
    assert sorted([*training, *held]) == sorted(TEXTS)


# ---------------------------------------------------------------- a corpus from it


@pytest.mark.parametrize("source", WRITERS)
@pytest.mark.parametrize("holdout", ["hash", "tail"])
def test_the_split_and_the_tokens_are_those_of_the_same_documents_in_memory(source, holdout, tmp_path):
    path = WRITERS[source](tmp_path / "x", TEXTS)
    knobs = config(source, path, holdout=holdout, shingle_bytes=20 if holdout == "hash" else 0, shingle_share=0.9)
    expected = sources.split(TEXTS, knobs)
    assert 0 < len(expected[1]) < len(expected[0])
    assert tuple(map(list, sources.split(sources.load(knobs), knobs))) == tuple(map(list, expected))
    made = corpus.prepare(freeze({
        "tokenizer": {"kind": "byte"}, "data": {"source": source, "path": str(path), "cache_dir": str(tmp_path / "cache"),
        "holdout": holdout, "shingle_bytes": knobs.shingle_bytes, "shingle_share": 0.9},
    }))  # fmt: skip
    for cache, texts in zip((made.members[0].training, made.members[0].holdout), expected, strict=True):
        decoded = [made.tokenizer.decode(cache.document(d)) for d in range(cache.documents)]
        assert decoded == texts and cache.text_bytes == sum(len(t.encode()) for t in texts)


def test_the_corpus_is_named_by_what_is_in_the_files_and_by_the_field(tmp_path):
    path = write_parquet(tmp_path / "x", TEXTS, other=TEXTS[::-1])

    def name(**knobs):
        data = {"source": "parquet", "path": str(path), "cache_dir": str(tmp_path / "cache"), "shingle_bytes": 0, **knobs}
        return corpus.prepare(freeze({"tokenizer": {"kind": "byte"}, "data": data})).name

    names = [name(), name(field="other")]
    write_parquet(path, TEXTS[1:], other=TEXTS[1:])
    names.append(name())
    assert len(set(names)) == 3
    moved = path.rename(tmp_path / "moved")
    assert name(path=str(moved)) == names[-1]


def test_the_digest_of_a_large_file_is_computed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(file_digests, "LARGE", 100)
    monkeypatch.setattr(file_digests, "_SETTLED", -10.0)
    small, large = (tmp_path / name for name in ("small", "large"))
    small.write_bytes(b"s" * 99)
    large.write_bytes(b"l" * 100)
    memory = tmp_path / "memory"
    first = file_digests.digest([small, large], memory)
    assert len(list(memory.iterdir())) == 1
    assert file_digests.digest([small, large], memory) == first
    assert file_digests.digest([large, small], memory) != first
    large.write_bytes(b"l" * 101)
    assert file_digests.digest([small, large], memory) != first


def test_the_digest_of_a_file_that_tells_no_time_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(file_digests, "LARGE", 100)
    large = tmp_path / "large"
    large.write_bytes(b"l" * 100)
    os.utime(large, (0, 0))
    before = file_digests.digest([large], tmp_path / "memory")
    large.write_bytes(b"m" * 100)
    os.utime(large, (0, 0))
    assert file_digests.digest([large], tmp_path / "memory") != before


# ---------------------------------------------------------------- an address in the cloud


@pytest.fixture
def bucket(monkeypatch):
    """gs:// served from memory instead of the network."""
    from etils.epath import backend
    from fsspec.implementations.memory import MemoryFileSystem

    class Cloud(MemoryFileSystem):
        store, pseudo_dirs, cachable = {}, [""], False

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(str(path).removeprefix("gs://"))

    monkeypatch.setattr(type(backend.fsspec_backend), "fs", lambda self, path: Cloud())


@pytest.mark.parametrize("source", WRITERS)
def test_files_in_a_bucket(source, bucket, tmp_path):
    from etils import epath

    for name, part in (("b", TEXTS[300:]), ("a", TEXTS[:300])):
        target = epath.Path(f"gs://bucket/deep/{name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(WRITERS[source](tmp_path / name, part).read_bytes())
    assert list(sources.load(config(source, "gs://bucket/deep"))) == TEXTS
    assert list(sources.load(config(source, "gs://bucket/*/b"))) == TEXTS[300:]
    assert list(sources.load(config(source, "gs://bucket/deep/a"))) == TEXTS[:300]
    here, there = (file_digests.digest(sources.text_files(str(p)), tmp_path) for p in (tmp_path, "gs://bucket/deep"))
    assert here == there
    for missing in ("gs://bucket/nothing", "gs://bucket/deep/*.x"):
        assert f"{missing}: no such file, folder or glob" in refusal(sources.load, config(source, missing))
    assert "`**` pattern not supported" in refusal(sources.load, config(source, "gs://bucket/**/a"))


def test_a_bucket_without_the_package_for_it(monkeypatch):
    from etils.epath import backend

    def fs(self, path):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(type(backend.fsspec_backend), "fs", fs)
    told = refusal(sources.load, config("jsonl", "gs://bucket/x"), code=ExitCode.USAGE)
    assert told == "gs://bucket/x: this kind of storage needs another package (Please install gcsfs): pip install gcsfs"


@pytest.mark.parametrize("source", WRITERS)
@pytest.mark.parametrize("error", [OSError(113, "No route to host"), PermissionError("Forbidden"), TimeoutError("no answer")])
def test_a_bucket_that_cannot_be_reached(monkeypatch, bucket, source, error):
    """While listing its files, and while reading one of them."""
    from etils import epath
    from etils.epath import backend

    address = "gs://bucket/deep/x"
    epath.Path(address).parent.mkdir(parents=True)
    epath.Path(address).write_bytes(b"{}")
    cloud = type(backend.fsspec_backend.fs(address))

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(cloud, "_open", fail)
        told = refusal(sources.load, config(source, address))
        assert f"{address}: cannot read" in told and (error.strerror or str(error)) in told
    monkeypatch.setattr(cloud, "info", fail)
    for path in (address, "gs://bucket/deep/*", "gs://bucket"):
        told = refusal(sources.load, config(source, path), code=ExitCode.STORAGE)
        assert f"cannot be reached ({error}); check the address, the network" in told and told.startswith("gs://bucket")


# ---------------------------------------------------------------- what is broken

LINES = [
    (b'{"text": "a"}\n{"text": \n', ":2: not JSON"),
    (b'{"text": "a"}\n\n\n{"text": "b"} {}\n', ":4: not JSON"),
    (b'{"text": "a"}\n["text"]\n', ":2: a JSON list, expected an object with the key 'text'"),
    (b'{"text": "a"}\n{"body": "b", "id": 3}\n', ":2: no key 'text' (there are 'body', 'id'); set data.field"),
    (b'{"text": "a"}\n{}\n', ":2: no key 'text' (there are no keys)"),
    (b'{"text": "a"}\n{"text": 3}\n', ":2: 'text' is 3, expected a string"),
    (b'{"text": "a"}\n{"text": null}\n', ":2: 'text' is null, expected a string"),
    (b'{"text": "a"}\n{"text": ["b"]}\n', ":2: 'text' is [\"b\"], expected a string"),
    (b'{"text": "a"}\n{"text": "\xff"}\n', ":2: not UTF-8 (byte 0xff)"),
    (b'{"text": "a"}\n{"text": "b\\ud800"}\n', ":2: 'text' is not valid Unicode: lone surrogate U+D800 at character 1"),
    (b"\x89PNG\r\n\0\0", ":1: not UTF-8 (byte 0x89)"),
    (b"[" * 100_000, ":1: not JSON"),
    (b"", "no text found in"),
    (b"\n \n", "no text found in"),
    (b'{"text": " "}\n', "no text found in"),
]


@pytest.mark.parametrize(("content", "fragment"), LINES)
def test_a_broken_line_is_refused_by_file_and_number(tmp_path, monkeypatch, content, fragment):
    for block in (1, 2, 100):
        monkeypatch.setattr(records, "_LINES", block)
        (tmp_path / "x.jsonl").write_bytes(content)
        message = refusal(lambda: list(sources.load(config("jsonl", tmp_path / "x.jsonl"))))
        assert f"{tmp_path}/x.jsonl" in message and fragment in message


def test_a_parquet_file_that_is_none(tmp_path):
    path = tmp_path / "x.parquet"
    for content in (b"", b"PAR1", b"no parquet at all, but long enough to look"):
        path.write_bytes(content)
        assert f"{path}: not a whole Parquet file" in refusal(sources.load, config("parquet", path))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_parquet_file(tmp_path, share):
    path = write_parquet(tmp_path / "x.parquet", TEXTS)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert f"{path}: not a whole Parquet file" in refusal(sources.load, config("parquet", path))


def test_a_damaged_page(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=500, use_dictionary=False, compression="zstd")
    raw = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    raw[start : start + 200] = bytes(200)
    path.write_bytes(raw)
    assert f"{path}: row group 1 is damaged" in refusal(lambda: list(sources.load(config("parquet", path))))


@pytest.mark.parametrize(
    ("field", "fragment"),
    [
        ("txt", "no column 'txt' (there are id, text, maybe); set data.field"),
        ("id", "column 'id' is of int64, expected strings"),
        ("maybe", "row 1 of row group 0: 'maybe' is null, expected a string"),
    ],
)
def test_a_column_without_text(tmp_path, field, fragment):
    path = write_parquet(tmp_path / "x.parquet", TEXTS[:3], maybe=["a", None, "b"])
    message = refusal(lambda: list(sources.load(config("parquet", path, field=field))))
    assert str(path) in message and fragment in message


def test_two_columns_of_one_name(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(TEXTS[:3])] * 2, names=["text", "text"]), path)
    assert f"{path}: 2 columns are named 'text'" in refusal(sources.load, config("parquet", path))


@pytest.mark.parametrize("source", WRITERS)
def test_nothing_where_files_should_be(source, tmp_path):
    assert "no such file, folder or glob" in refusal(sources.load, config(source, tmp_path / "nothing"))
    write_parquet(tmp_path / "x.parquet", [""])
    with pytest.raises(RunError, match=f"data.source={source} needs it: --config.data.path=FILE"):
        freeze({"data": {"source": source}})


def test_a_parquet_file_without_rows(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert f"no text found in {path}" in refusal(sources.load, config("parquet", path))
