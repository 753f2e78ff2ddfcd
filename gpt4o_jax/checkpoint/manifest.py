"""Digests of a checkpoint's files. The manifest is written last: without one, a checkpoint was never finished.

Orbax is atomic but does not detect flipped bits; these digests do.
"""

import hashlib
import json

from etils import epath

from gpt4o_jax.errors import data_error

NAME = "manifest.json"


def write(folder: epath.Path, meta: dict) -> None:
    """Commits the checkpoint in `folder`: writes the digests of all its files, with `meta` beside them."""
    files = {name: _sha256(folder / name) for name in _files(folder)}
    content = {"meta": meta, "files": files, "sha256": _own_digest(meta, files)}
    temporary = folder / f"{NAME}.tmp"
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True))
    temporary.replace(folder / NAME)


def read(folder: epath.Path) -> dict:
    """The metadata of a committed checkpoint. Raises RunError (exit code 3) if it is unfinished or its manifest is damaged."""
    return _content(folder)["meta"]


def digest(folder: epath.Path) -> str:
    """The digest of a committed checkpoint's files and metadata, wherever the folder is. Raises RunError as `read` does."""
    return _content(folder)["sha256"]


def verify(folder: epath.Path) -> int:
    """Compares every file with its digest; returns their number. Raises RunError naming the first that differs."""
    expected = _content(folder)["files"]
    present = set(_files(folder))
    for name in sorted(set(expected) | present):
        if name not in present:
            raise data_error(f"{folder}: checkpoint file {name} is missing")
        if name not in expected:
            raise data_error(f"{folder}: {name} does not belong to this checkpoint (not in {NAME})")
        if _sha256(folder / name) != expected[name]:
            raise data_error(f"{folder}: checkpoint file {name} is damaged (its SHA-256 differs from {NAME})")
    return len(expected)


def _content(folder: epath.Path) -> dict:
    try:
        content = json.loads((folder / NAME).read_text())
        if content["sha256"] != _own_digest(content["meta"], content["files"]):
            raise ValueError
        return content
    except FileNotFoundError:
        raise data_error(f"{folder}: no {NAME}: not a finished checkpoint") from None
    except (ValueError, KeyError, TypeError):
        raise data_error(f"{folder / NAME}: damaged (not what was written)") from None


def _files(folder: epath.Path) -> list[str]:
    found, waiting = [], [folder]
    while waiting:
        for path in waiting.pop().iterdir():
            if path.is_dir():
                waiting.append(path)
            elif not path.name.startswith(NAME):
                found.append(str(path.relative_to(folder)))
    return sorted(found)


def _own_digest(meta: dict, files: dict) -> str:
    return hashlib.sha256(json.dumps([meta, files], sort_keys=True).encode()).hexdigest()


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
