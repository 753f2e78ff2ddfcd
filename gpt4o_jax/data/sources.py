"""Documents by name, and their split into training text and hold-out."""

import collections
import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path

from gpt4o_jax.config import DataConfig
from gpt4o_jax.data import python_docs
from gpt4o_jax.errors import data_error


def load(config: DataConfig) -> list[str]:
    """Every document of the configured source, in a fixed order. Raises RunError for unreadable or empty input."""
    documents = {"python_docs": lambda: python_docs.documents(), "text": lambda: _text(config)}[config.source]()
    if not documents:
        raise data_error(f"data.source={config.source}: no text found")
    return documents


def _text(config: DataConfig) -> list[str]:
    documents = []
    for path in text_files(config.path):
        text = read_text(path)
        documents += text.split(config.separator) if config.separator else [text]
    return [d for d in documents if d.strip()]


def text_files(pattern: str) -> list[Path]:
    """A file itself, the files below a folder, or those that a glob matches; sorted."""
    path = Path(pattern)
    if path.is_file():
        return [path]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
    hidden = lambda p: any(part.startswith(".") for part in (p.relative_to(path) if path.is_dir() else Path(p.name)).parts)
    files = sorted(p for p in found if p.is_file() and not hidden(p))
    if not files:
        raise data_error(f"{pattern}: no such file, folder or glob with files; expected UTF-8 text")
    return files


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises RunError where it is missing, empty, binary, or not UTF-8, with the offset."""
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise data_error(f"{path}: cannot read ({e.strerror or e})") from None
    if not raw.strip():
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
    """Names a list of documents: 16 hex digits."""
    h = hashlib.sha256()
    for text in documents:
        h.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return h.hexdigest()[:16]


def split(documents: Sequence[str], config: DataConfig) -> tuple[list[str], list[str]]:
    """(training documents, held-out documents).

    hash: a document is held out by a hash of its own text, so adding others never moves it;
    near-duplicates of the hold-out are dropped from training (see near_duplicates).
    tail: the last holdout_fraction of the characters of all documents.
    """
    if config.holdout == "tail":
        return _split_tail(documents, config.holdout_fraction)
    training, held = [], []
    for d in documents:
        (held if _is_held(d, config.holdout_fraction) else training).append(d)
    if config.shingle_bytes:
        copies = near_duplicates(training, held, config.shingle_bytes, config.shingle_share)
        training = [d for d, copy in zip(training, copies, strict=True) if not copy]
    if not training:
        raise data_error(
            f"hold-out took every one of {len(documents)} documents (holdout_fraction={config.holdout_fraction},"
            f" shingle_bytes={config.shingle_bytes}); use more documents, or data.holdout=tail"
        )
    if not held and config.holdout_fraction:
        raise data_error(
            f"hold-out is empty: none of {len(documents)} document(s) fell into holdout_fraction={config.holdout_fraction};"
            " split the text with data.separator, use more documents, or data.holdout=tail"
        )
    return training, held


def _is_held(document: str, fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") < fraction * 2**64


def near_duplicates(training: Sequence[str], held: Sequence[str], n: int, share: float) -> list[bool]:
    """For each training document, whether it repeats the hold-out.

    It does where at least `share` of its own shingles (runs of n bytes) stand in held-out documents, or at
    least `share` of one held-out document's stand in it; share 0: where a single one is common.
    """
    sizes = [0] * len(held)
    holders: dict[bytes, list[int]] = {}  # shingle -> held-out documents it stands in
    for h, text in enumerate(held):
        shingles = _shingles(text, n)
        sizes[h] = len(shingles)
        for s in shingles:
            holders.setdefault(s, []).append(h)

    def repeats(text: str) -> bool:
        shingles = _shingles(text, n)
        common = [s for s in shingles if s in holders]
        if not common:
            return False
        contained = collections.Counter(h for s in common for h in holders[s])
        return len(common) >= share * len(shingles) or any(count >= share * sizes[h] for h, count in contained.items())

    return [repeats(text) for text in training]


def _shingles(text: str, n: int) -> set[bytes]:
    raw = text.encode()
    return {raw[i : i + n] for i in range(len(raw) - n + 1)}


def _split_tail(documents: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    cut = int((1 - fraction) * sum(map(len, documents)))
    training, held, seen = [], [], 0
    for d in documents:
        here = min(max(cut - seen, 0), len(d))
        training += [d[:here]] if here else []
        held += [d[here:]] if here < len(d) else []
        seen += len(d)
    return training, held
