"""Documents come in a fixed order, the hold-out stays clean and fixed, and unreadable text is refused by name and place."""

import dataclasses
import hashlib
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4o_jax.config import DataConfig
from gpt4o_jax.data import python_docs, sources
from gpt4o_jax.errors import ExitCode, RunError


def refusal(call, *args) -> str:
    with pytest.raises(RunError) as e:
        call(*args)
    assert e.value.code == ExitCode.DATA
    return str(e.value)


# ---------------------------------------------------------------- the embedded corpus


@pytest.fixture(scope="module")
def docs():
    return python_docs.documents()


def test_python_docs_is_a_megabyte_of_english(docs):
    text = "\n".join(docs)
    assert len(text.encode()) > 1_000_000
    assert len(docs) == len(set(docs)) > 1000
    assert text.count(" the ") > 10_000
    assert all(d.strip() for d in docs)


def test_python_docs_is_the_same_in_another_process_and_imports_nothing(docs):
    code = (
        "import sys, sysconfig\n"
        "sysconfig.get_path('stdlib')\n"  # itself imports a module
        "from gpt4o_jax.data import python_docs, sources\n"
        "before = set(sys.modules)\n"
        "documents = python_docs.documents()\n"
        "print(sources.digest(documents), *set(sys.modules) - before)\n"
    )
    command = [sys.executable, "-W", "always", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "77"})
    assert done.stdout.split() == [sources.digest(docs)]
    assert done.stderr == "", "the library's own warnings are not the user's"


def test_the_digest_depends_on_every_document_and_their_order():
    names = {sources.digest(d) for d in ([], ["a"], ["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""])}
    assert len(names) == 6


# ---------------------------------------------------------------- text files


@pytest.fixture
def folder(tmp_path):
    """b.txt, a.txt, deep/c.md, and hidden files that are not text."""
    (tmp_path / "deep").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in {"b.txt": "bee", "a.txt": "one--two----", "deep/c.md": "sea"}.items():
        (tmp_path / name).write_text(text)
    for name in (".hidden", ".git/index"):
        (tmp_path / name).write_bytes(b"\0\xff")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "separator", "expected"),
    [
        ("a.txt", "", ["one--two----"]),
        ("a.txt", "--", ["one", "two"]),
        ("", "", ["one--two----", "bee", "sea"]),
        ("*.txt", "", ["one--two----", "bee"]),
        ("**/*.md", "", ["sea"]),
        ("[ab].txt", "--", ["one", "two", "bee"]),
    ],
)
def test_a_file_a_folder_or_a_glob(folder, path, separator, expected):
    config = DataConfig(source="text", path=f"{folder}/{path}", separator=separator)
    assert sources.load(config) == expected


def test_folders_behind_links_are_read_once(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "z.txt").write_text("zed")
    (folder / "link").symlink_to(other)
    (folder / "again").symlink_to(other)
    (other / "back").symlink_to(folder)
    (folder / ".git" / "visible").symlink_to(folder / "deep")
    assert sources.load(DataConfig(source="text", path=str(folder))) == ["one--two----", "zed", "bee", "sea"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "x").write_bytes("\ufeffHéllo\r\n".encode())
    assert sources.read_text(tmp_path / "x") == "Héllo\r\n"


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (None, "cannot read (No such file or directory)"),
        (b"", "empty file"),
        (b" \n\t\n", "empty file"),
        (b"\xef\xbb\xbf", "empty file"),
        (b"text\0more", "looks binary (a NUL byte at offset 4)"),
        ("text".encode("utf-16"), "looks binary (a NUL byte at offset 3)"),
        ("naïve".encode("latin-1"), "not UTF-8: byte 0xef at offset 2"),
        (b"x" * 10_000 + b"\xc3", "not UTF-8: byte 0xc3 at offset 10000"),
        (b"\xed\xa0\x80", "not UTF-8: byte 0xed at offset 0"),
    ],
)
def test_bad_files_are_refused_with_their_path(tmp_path, content, fragment):
    path = tmp_path / "x.txt"
    if content is not None:
        path.write_bytes(content)
    message = refusal(sources.read_text, path)
    assert str(path) in message and fragment in message


def test_a_folder_is_read_by_files_and_never_as_one(tmp_path):
    assert "Is a directory" in refusal(sources.read_text, tmp_path)


@pytest.mark.parametrize("name", ["missing.txt", "*.nothing", "empty", "only_hidden"])
def test_where_no_file_is_that_is_said(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "only_hidden").mkdir()
    (tmp_path / "only_hidden" / ".x").write_text("x")
    assert f"{tmp_path / name}: no such file, folder or glob" in refusal(sources.text_files, str(tmp_path / name))


def test_a_separator_that_leaves_nothing_is_refused(tmp_path):
    (tmp_path / "x").write_text("----")
    assert "no text found" in refusal(sources.load, DataConfig(source="text", path=str(tmp_path / "x"), separator="--"))


@pytest.mark.parametrize("lanes", [0, 2])
def test_a_separator_that_line_ends_hide_is_told_and_with_them_it_cuts(tmp_path, lanes):
    (tmp_path / "x").write_bytes(b"one\r\n\r\ntwo\r\nlines")
    given = DataConfig(source="text", path=str(tmp_path / "x"), lanes=lanes)
    message = refusal(sources.load, dataclasses.replace(given, separator="\n\n"))
    assert f"{tmp_path / 'x'}: data.separator='\\n\\n' stands nowhere in it, for its lines end in \\r\\n" in message
    assert list(sources.load(dataclasses.replace(given, separator="\r\n\r\n"))) == ["one", "two\r\nlines"]
    assert list(sources.load(dataclasses.replace(given, separator="--"))) == ["one\r\n\r\ntwo\r\nlines"]  # one document


# ---------------------------------------------------------------- hold-out by hash


def _documents(n: int, start: int = 0) -> list[str]:
    return [f"{i}: {hashlib.sha256(str(i).encode()).hexdigest()}" for i in range(start, start + n)]


def test_adding_documents_never_moves_one_in_or_out_of_the_hold_out():
    config = DataConfig(holdout_fraction=0.2, shingle_bytes=0)
    training, held = sources.split(_documents(200), config)
    assert sorted(training + held) == sorted(_documents(200))
    assert 20 < len(held) < 60
    more_training, more_held = sources.split(_documents(100, start=1000) + _documents(200)[::-1], config)
    assert set(training) <= set(more_training) and set(held) <= set(more_held)


def test_a_larger_fraction_holds_out_the_same_documents_and_more():
    helds = [set(sources.split(_documents(200), DataConfig(holdout_fraction=f, shingle_bytes=0))[1]) for f in (0.1, 0.3, 0.6)]
    assert helds[0] < helds[1] < helds[2]


@settings(deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=40), min_size=2, max_size=30),
    st.integers(1, 12),
    st.sampled_from([0, 0.3, 0.5, 1]),
)
def test_near_duplicates_of_the_hold_out_and_nothing_else_are_dropped_from_training(documents, n, share):
    try:
        training, held = sources.split(documents, DataConfig(holdout_fraction=0.3, shingle_bytes=0))
    except RunError as e:
        assert e.code == ExitCode.DATA
        return
    shingles = lambda d: {d[i : i + n] for i in range(len(d) - n + 1)}
    known = set().union(*map(shingles, held))

    def repeats(d):
        own, common = shingles(d), shingles(d) & known
        contained = [len(shingles(h) & own) for h in held]
        share_of_held = any(c and c >= share * len(shingles(h)) for c, h in zip(contained, held, strict=True))
        return d in held or (bool(common) and (len(common) >= share * len(own) or share_of_held))

    kept = [d for d in training if not repeats(d)]
    config = DataConfig(holdout_fraction=0.3, shingle_bytes=n, shingle_share=share)
    if not kept:
        assert "hold-out took every one" in refusal(sources.split, documents, config)
    else:
        assert sources.split(documents, config) == (kept, held), "and the hold-out does not depend on shingles"
    if share == 0:
        assert all(known.isdisjoint(shingles(d)) for d in kept)


def test_a_short_text_of_the_hold_out_is_dropped_and_blank_ones_are_none(tmp_path):
    """With files as they occur: short lines, and an empty one at the end."""
    config = DataConfig(source="jsonl", path=str(tmp_path / "a"), holdout_path=str(tmp_path / "b"))
    lines = lambda texts: "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a").write_text(lines(["ja", "", "nein", "doch", " "]) + "\n")
    (tmp_path / "b").write_text(lines(["nein", "  ", "nie"]) + "\n")
    ((training, held),) = sources.split_all([sources.load(config)], config, [sources.apart(config)])
    assert (list(training), list(held)) == (["ja", "doch"], ["nein", "nie"])


def test_a_50_byte_copy_of_the_hold_out_is_dropped_and_a_49_byte_copy_is_not():
    config = DataConfig(holdout_fraction=0.2, shingle_bytes=50, shingle_share=0.0)
    held = sources.split(_documents(100), config)[1][0]
    for size, dropped in ((50, True), (49, False)):
        copies = [f"{i}...{held[5 : 5 + size]}...{i}" for i in range(40)]
        held_now = sources.split(copies, DataConfig(holdout_fraction=0.2, shingle_bytes=0))[1]
        copies = [c for c in copies if c not in held_now]
        training, _ = sources.split(_documents(100) + copies, config)
        assert (set(copies).isdisjoint(training)) is dropped
        assert dropped or set(copies) <= set(training)


def test_the_embedded_corpus_keeps_most_of_its_text_and_a_clean_hold_out(docs):
    config = DataConfig()
    training, held = sources.split(docs, config)
    size = lambda documents: sum(len(d.encode()) for d in documents)
    assert size(training) > 0.6 * size(docs) and size(held) > 0.01 * size(docs)
    shingles = lambda d: {d.encode()[i : i + 50] for i in range(len(d.encode()) - 49)}
    known = set().union(*map(shingles, held))
    shares = [len(known & s) / max(len(s), 1) for s in map(shingles, training)]
    assert max(shares) < config.shingle_share


def test_a_copy_of_a_validation_split_is_dropped_as_one_of_the_hold_out_by_hash(tmp_path):
    def split(size: int):
        data = DataConfig("text", f"{tmp_path}/x", holdout_path=f"{tmp_path}/y", separator="\n", shingle_bytes=size)
        return sources.split_all([sources.load(data)], data, [sources.apart(data)])[0]

    documents, held = _documents(40), _documents(10, start=100)
    (tmp_path / "y").write_text("\n".join(held))
    (tmp_path / "x").write_text("\n".join([*documents, held[3], held[5] + " and more"]))
    assert split(50) == (documents, held)
    assert split(0) == ([*documents, held[3], held[5] + " and more"], held)
    (tmp_path / "x").write_text("\n".join(held[:4]))
    told = refusal(split, 50)
    assert f"every one of 4 documents (holdout_path={tmp_path}/y, shingle_bytes=50)" in told and "data.shingle_bytes=0" in told


def test_a_hold_out_that_takes_all_or_nothing_is_refused():
    same = ["x" * 60 + "y" * 50 + str(i) for i in range(50)]
    assert "hold-out took every one of 50 documents" in refusal(sources.split, same, DataConfig(holdout_fraction=0.2))
    one = [d for d in _documents(50) if not sources.is_held(d, 0.05)][:1]
    assert "hold-out is empty: none of 1 document(s)" in refusal(sources.split, one, DataConfig(holdout_fraction=0.05))


@pytest.mark.parametrize(
    ("knobs", "mend"),
    [
        ({}, "data.holdout=tail with data.shingle_bytes=0"),
        ({"shingle_bytes": 0}, "data.holdout=tail"),
        ({"shingle_bytes": 0, "lanes": 3}, "a larger data.holdout_fraction"),
    ],
)
def test_a_hold_out_is_mended_by_what_the_config_allows(knobs, mend):
    """Neither lanes nor shingles go with a hold-out at the tail."""
    config = DataConfig(holdout_fraction=0.2, **knobs)
    assert str(sources.no_holdout(["text"], config)).endswith(f"use more documents, or {mend}")
    if not config.lanes:  # which split their text elsewhere
        held = [d for d in _documents(50) if sources.is_held(d, 0.2)]
        assert refusal(sources.split, held, config).endswith(f"use more documents, or {mend}")


def test_without_a_hold_out_everything_is_training():
    assert sources.split(_documents(5), DataConfig(holdout_fraction=0.0)) == (_documents(5), [])


# ---------------------------------------------------------------- hold-out at the tail


@settings(deadline=None)
@given(st.lists(st.text(max_size=20), max_size=12), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]))
def test_the_tail_is_the_last_characters_of_all_documents_and_nothing_is_lost(documents, fraction):
    training, held = sources.split(documents, DataConfig(holdout="tail", holdout_fraction=fraction, shingle_bytes=0))
    text = "".join(documents)
    cut = int((1 - fraction) * len(text))
    assert "".join(training) == text[:cut] and "".join(held) == text[cut:]
    assert all(training) and all(held)
    whole = [d for d in documents if d]
    parts = training + held
    split_one = len(parts) - len(whole)  # at most one document is cut in two
    assert split_one in (0, 1)
    assert parts == whole or [*parts[: len(training) - 1], training[-1] + held[0], *held[1:]] == whole
