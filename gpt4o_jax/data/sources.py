"""Loads the documents of a source and splits them into training text and hold-out."""

import codecs
import dataclasses
import functools
import glob
import hashlib
import itertools
import math
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gpt4o_jax.config import DataConfig
from gpt4o_jax.data import conversations, prepared, python_docs, records
from gpt4o_jax.errors import RunError, data_error, did_you_mean, unreachable
from gpt4o_jax.paths import of_user
from gpt4o_jax.tasks.item import Item
from gpt4o_jax.tasks.worlds import WORLDS, World, docstrings


def load(config: DataConfig) -> Sequence[str]:
    """Every document of one source (not a mixture), in a fixed order. Raises RunError for unreadable or empty input."""
    documents = {
        "python_docs": python_docs.documents,
        "text": lambda: _text_by_files(config) if config.lanes else _text(config),
        "jsonl": lambda: records.jsonl(text_files(config.path), config.field, conversations.taker(config)),
        "parquet": lambda: records.parquet(text_files(config.path), config.field, conversations.taker(config)),
        "tfds": lambda: prepared.documents(config.path, config.tfds_dir, config.field, conversations.taker(config)),
        "conversations": lambda: records.jsonl(text_files(config.path), "messages", conversations.taker(config)),
        "world": lambda: conversations.WorldItems(
            world(config.path, config.holdout_fraction), config.world_items, held_out=False
        ),
    }[config.source]()
    if not any(d.strip() for d in documents):
        raise data_error(f"data.source={config.source}: no text found" + (f" in {config.path}" if config.path else ""))
    return documents


def apart(config: DataConfig) -> Sequence[str] | None:
    """The separate hold-out of a source, if it has one: held-out items of a world, or data.holdout_path. Else None.

    Of a world these are the items for checkpoint selection during training. Raises RunError as `load` does.
    """
    if config.source == "world":
        made, size = world(config.path, config.holdout_fraction), math.ceil(config.world_items * config.holdout_fraction)
        return _as_documents(made.name, conversations.held_out(made, min(size, HELD_ITEMS), choosing=True))
    return load(dataclasses.replace(config, path=config.holdout_path)) if config.holdout_path else None


def scored_at_last(config: DataConfig) -> list[str]:
    """The held-out items of a world that only the final `evaluate` asks, no evaluation during training; [] for other sources."""
    if config.source != "world":
        return []
    made = world(config.path, config.holdout_fraction)
    return _as_documents(made.name, conversations.held_out(made, conversations.SCORED * len(made.slices), choosing=False))


def _as_documents(name: str, items: Sequence[Item]) -> list[str]:
    return [conversations.Conversation(item, f"world {name}: held-out item {i}") for i, item in enumerate(items)]


HELD_ITEMS = 500  # most held-out items of a world in a run's hold-out: they are generated, and more would only take longer
WORLD_NAMES = (*WORLDS, docstrings.NAME)


@functools.cache
def world(name: str, held_share: float = DataConfig.holdout_fraction) -> World:
    """The world of that name; docstrings holds out the documents that python_docs does. Raises RunError if there is none."""
    if name == docstrings.NAME:
        parts: dict[bool, list[str]] = {False: [], True: []}
        for document in python_docs.documents():
            parts[is_held(document, held_share)].append(document)
        return docstrings.world(parts[False], parts[True])
    if name not in WORLDS:
        raise RunError(f"world {name!r} does not exist{did_you_mean(name, WORLD_NAMES)}; there are {', '.join(WORLD_NAMES)}")
    return WORLDS[name]


def _text(config: DataConfig) -> list[str]:
    documents = []
    for path in text_files(config.path):
        documents += _cut(path, config.separator)
    return [d for d in documents if d.strip()]


def _text_by_files(config: DataConfig) -> records.Blocks:
    """The documents of `_text` and the blank ones; only those of the two files read last stay in memory."""
    paths = text_files(config.path)

    def read(i: int) -> list[str]:
        return _cut(paths[i], config.separator)

    return records.Blocks([len(read(i)) if config.separator else 1 for i in range(len(paths))], read)


def _cut(path, separator: str) -> list[str]:
    """The documents of a text file. Raises RunError as read_text does, and if only Windows line ends hide the separator."""
    text = read_text(path)
    if not separator:
        return [text]
    if separator not in text and "\r\n" in text and separator in text.replace("\r\n", "\n"):
        raise data_error(
            f"{path}: data.separator={separator!r} stands nowhere in it, for its lines end in \\r\\n; convert it, for example"
            " with `dos2unix`, or give a separator with such line ends"
        )
    return text.split(separator)


def text_files(pattern: str) -> list:
    """The file itself, the files below a folder, or the matches of a glob; sorted. Paths, or epaths for gs:// and the like.

    Hidden files are left out. Raises RunError if there are no files.
    """
    pattern = os.path.expanduser(pattern)
    path = Path(pattern)
    if "://" in pattern:
        return _remote_files(pattern)
    if path.is_file():
        return [path]
    found = _files_below(path) if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
    hidden = lambda p: any(part.startswith(".") for part in (p.relative_to(path) if path.is_dir() else Path(p.name)).parts)
    files = sorted(p for p in found if p.is_file() and not hidden(p))
    if not files:
        raise data_error(f"{pattern}: no such file, folder or glob with files; expected UTF-8 text")
    return files


def _files_below(folder: Path) -> Iterator[Path]:
    """Follows links; a folder that several of them lead to is entered once."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in names)


def _remote_files(pattern: str) -> list:
    """`text_files` for an address that etils.epath understands."""
    scheme, _, rest = pattern.partition("://")
    parts = rest.rstrip("/").split("/")
    plain = list(itertools.takewhile(lambda part: not set("*?[") & set(part), parts))
    root, wild = of_user(f"{scheme}://{'/'.join(plain)}"), "/".join(parts[len(plain) :])
    try:
        if not wild and root.is_file():
            return [root]
        files = sorted(p for p in (root.glob(wild) if wild else _below(root)) if p.is_file() and not p.name.startswith("."))
    except NotImplementedError as e:  # for `**`
        raise data_error(f"{pattern}: cannot list ({e})") from None
    except OSError as e:
        raise unreachable(pattern, e) from None
    if not files:
        raise data_error(f"{pattern}: no such file, folder or glob with files")
    return files


def _below(folder):
    """Files below a folder; epath rejects `**`, and its walk() drops the scheme."""
    for path in folder.iterdir() if folder.is_dir() else ():
        yield from _below(path) if path.is_dir() else [path]


def read_text(path) -> str:
    """The text of a UTF-8 file. Raises RunError if it is missing, empty, binary, or not UTF-8 (with the offset)."""
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise data_error(f"{path}: cannot read ({e.strerror or e})") from None
    if not raw.removeprefix(codecs.BOM_UTF8).strip():
        raise data_error(f"{path}: empty file, expected UTF-8 text")
    if b"\0" in raw[:8192]:
        raise data_error(f"{path}: looks binary (a NUL byte at offset {raw.index(0)}), expected UTF-8 text")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise data_error(
            f"{path}: not UTF-8: byte 0x{raw[e.start]:02x} at offset {e.start}; convert it, for example with `iconv -t UTF-8`"
        ) from None


def digest(documents: Sequence[str]) -> str:
    """Digest of a list of documents: 16 hex digits."""
    h = hashlib.sha256()
    for text in documents:
        h.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return h.hexdigest()[:16]


class Part(Sequence[str]):
    """Some documents of a source, each read on access."""

    def __init__(self, documents: Sequence[str], chosen: Sequence[int]):
        self._documents, self._chosen = documents, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, i: int) -> str:
        return self._documents[self._chosen[i]]


def split(documents: Sequence[str], config: DataConfig) -> tuple[Sequence[str], Sequence[str]]:
    """(training documents, held-out documents) of one source: see `split_all`."""
    return split_all([documents], config)[0]


def split_all(
    corpora: Sequence[Sequence[str]], config: DataConfig, own: Sequence[Sequence[str] | None] = (), more: Sequence[str] = ()
) -> list[tuple[Sequence[str], Sequence[str]]]:
    """(training documents, held-out documents) of each source.

    hash: a document is held out by a hash of its own text, so adding others never moves it; near-duplicates of the hold-out of
    any source are dropped from the training text of all (see near_duplicate_test).
    own: for each source its separate hold-out, or None. One from data.holdout_path is treated like one by hash. The items of a
    world are all alike in form, so they are not dropped for repeating a world's hold-out, only for repeating that of another
    source.
    more: further held-out documents, in none of the hold-outs, that training text must not repeat either.
    tail: the last holdout_fraction of the characters of all documents of a source, which are all read into memory.
    Raises RunError if hash leaves a source without training documents or without a hold-out.
    """
    if config.holdout == "tail":
        return [_split_tail(documents, config.holdout_fraction) for documents in corpora]
    own = own or [None] * len(corpora)
    pairs = []
    for documents, held in zip(corpora, own, strict=True):
        if held is None:
            pairs.append(_split_by_hash(documents, config.holdout_fraction))
        elif config.holdout_path:
            pairs.append((_not_blank(documents), _not_blank(held)))
        else:
            pairs.append((documents, held))
    if config.shingle_bytes:
        of_worlds = [held is not None and not config.holdout_path for held in own]
        pairs = _without_repeats(pairs, of_worlds, config, more)
    for documents, (training, held) in zip(corpora, pairs, strict=True):
        if not training:
            how, mend = f"holdout_fraction={config.holdout_fraction}", _tail(config)
            if _are_conversations(documents):
                mend = "a file of held-out ones in data.holdout_path"
            if config.holdout_path:
                how, mend = f"holdout_path={config.holdout_path}", "data.shingle_bytes=0, which keeps what repeats it"
            raise data_error(
                f"hold-out took every one of {len(documents)} documents ({how}, shingle_bytes={config.shingle_bytes});"
                f" use more documents, or {mend}"
            )
        if not held and config.holdout_fraction:
            raise no_holdout(documents, config)
    return pairs


def _without_repeats(pairs, of_worlds: Sequence[bool], config: DataConfig, more: Sequence[str]):
    """`pairs` without the training documents that repeat a hold-out: for worlds, of a source that is no world; else any."""
    if all(of_worlds):
        return pairs
    test = lambda held: near_duplicate_test(held, config.shingle_bytes, config.shingle_share)
    of_texts = test([d for (_, held), made_up in zip(pairs, of_worlds, strict=True) if not made_up for d in held])
    of_any = of_texts if not any(of_worlds) else test([*(d for _, held in pairs for d in held), *more])
    kept = []
    for (training, held), made_up in zip(pairs, of_worlds, strict=True):
        repeats = of_texts if made_up else of_any
        kept.append((_choose(training, (not repeats(d) for d in training)), held))
    return kept


def no_holdout(documents: Sequence[str], config: DataConfig) -> RunError:
    instead = "a larger data.holdout_fraction" if config.lanes else _tail(config)  # lanes never hold the tail's whole text
    mend = f"split the text with data.separator, use more documents, or {instead}"
    if _are_conversations(documents):
        mend = "use more conversations, a larger data.holdout_fraction, or a file of held-out ones in data.holdout_path"
    return data_error(
        f"hold-out is empty: none of {len(documents)} document(s) fell into holdout_fraction={config.holdout_fraction}; {mend}"
    )


def _tail(config: DataConfig) -> str:
    """The settings that hold out the tail instead, all that are needed."""
    return "data.holdout=tail" + (" with data.shingle_bytes=0" if config.shingle_bytes else "")


def _are_conversations(documents: Sequence[str]) -> bool:
    return isinstance(documents[0], conversations.Conversation)


def _choose(documents: Sequence[str], keep: Iterable[bool]) -> Sequence[str]:
    """The documents to keep; not read yet if the source is not in memory."""
    if isinstance(documents, list):
        return list(itertools.compress(documents, keep))
    return Part(documents, array("q", itertools.compress(range(len(documents)), keep)))


def _split_by_hash(documents: Sequence[str], fraction: float) -> tuple[Sequence[str], list[str]]:
    held, kept = [], bytearray()
    for d in documents:
        out = is_held(d, fraction)
        held += [d] if out and d.strip() else []
        kept.append(not out and bool(d.strip()))
    return _choose(documents, kept), held


def _not_blank(documents: Sequence[str]) -> Sequence[str]:
    return _choose(documents, (bool(d.strip()) for d in documents))


def is_held(document: str, fraction: float) -> bool:
    """Whether a document is held out, which depends only on its text."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") < fraction * 2**64


def near_duplicate_test(held: Sequence[str], n: int, share: float) -> Callable[[str], bool]:
    """Returns a function that tells whether a training document repeats the hold-out.

    It does if at least `share` of its own shingles (runs of n bytes) occur in held-out documents, or at least `share` of the
    shingles of one held-out document occur in it; share 0: if they have one in common. A document too short for shingles repeats
    only an identical text.
    """
    whole = set(held)
    of_each = [_shingles(text, n) for text in held]
    sizes = np.array([len(shingles) for shingles in of_each], np.int64)
    # Every shingle of the hold-out with its document, sorted: 12 bytes per byte of text instead of a Python object.
    all_held = np.concatenate([*of_each, np.zeros(0, np.uint64)])
    documents = np.repeat(np.arange(len(held), dtype=np.int32), sizes)
    order = np.argsort(all_held, kind="stable")
    all_held, documents = all_held[order], documents[order]

    def repeats(text: str) -> bool:
        if text in whole:
            return True
        shingles = _shingles(text, n)
        first, last = np.searchsorted(all_held, shingles), np.searchsorted(all_held, shingles, side="right")
        times = last - first  # in how many held-out documents each occurs
        common = np.count_nonzero(times)
        if common == 0 or common >= share * len(shingles):
            return common > 0
        before = np.cumsum(times) - times
        contained = np.bincount(documents[np.repeat(first - before, times) + np.arange(times.sum())], minlength=len(held))
        return bool(np.any((contained > 0) & (contained >= share * sizes)))

    return repeats


_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, whose bits look random


def _shingles(text: str, n: int) -> np.ndarray:
    """uint64 [S], sorted hashes of the distinct runs of n bytes: polynomials of their bytes modulo 2^64 (Rabin-Karp).

    Among a billion runs two have the same hash with a probability of about 3 %, which costs a document one shingle.
    """
    raw = np.frombuffer(text.encode(), np.uint8).astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(max(len(raw) - n + 1, 0), np.uint64)
    for i in range(n if len(hashes) else 0):
        hashes = hashes * _ODD + raw[i : i + len(hashes)]
    return np.unique(hashes)


def _split_tail(documents: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    cut = int((1 - fraction) * sum(map(len, documents)))
    training, held, seen = [], [], 0
    for d in documents:
        here = min(max(cut - seen, 0), len(d))
        training += [d[:here]] if here else []
        held += [d[here:]] if here < len(d) else []
        seen += len(d)
    return training, held
