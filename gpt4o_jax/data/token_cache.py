"""Tokenised documents on disk, memory-mapped: written once, named by a digest of their inputs."""

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gpt4o_jax.data.tokenizer import Tokenizer
from gpt4o_jax.errors import ExitCode, RunError, data_error
from gpt4o_jax.paths import appearing_whole, local

_ABANDONED = 86_400  # seconds without a write


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """Documents as one stream of ids; document d is tokens[offsets[d] : offsets[d + 1]], from <bos> to <eos>."""

    tokens: np.ndarray  # uint16 or uint32, memory-mapped
    offsets: np.ndarray  # int64 [documents + 1]
    text_bytes: int  # UTF-8 bytes of all documents
    counts: np.ndarray | None = None  # uint8, whether the loss counts each token as a target; None: all count

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def token_count(self) -> int:
        return len(self.tokens)

    def document(self, d: int) -> np.ndarray:
        return self.tokens[self.offsets[d] : self.offsets[d + 1]]

    def counted(self, d: int) -> np.ndarray | None:
        """Whether each token of document d counts; None: all do."""
        return None if self.counts is None else self.counts[self.offsets[d] : self.offsets[d + 1]]


def token_dtype(tokenizer: Tokenizer) -> type:
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def cache_root(configured: str) -> Path:
    """data.cache_dir, or gpt4o_jax/ in the user's cache folder (XDG_CACHE_HOME, else ~/.cache).

    Raises RunError for a path in an object store.
    """
    if configured:
        return local("config.data.cache_dir", configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt4o_jax"


def build(
    root: Path,
    name: str,
    documents: Sequence[str],
    tokenizer: Tokenizer,
    encode: Callable[[str], tuple[list[int], list[bool]]] | None = None,
) -> TokenCache:
    """Opens root/name, built first if it does not exist. The folder appears complete or not at all.

    Leftovers of killed processes are removed after a day without a write.

    encode: document -> (ids, whether the loss counts each); None: documents are texts, and every token counts.
    Raises RunError if a document cannot be tokenised, or the cache cannot be written or is damaged.
    """
    folder = root / name
    if not (folder / "meta.json").exists():
        try:
            for left in root.glob(f".{name}.*"):
                with contextlib.suppress(OSError):  # another process was faster
                    if time.time() - max(p.stat().st_mtime for p in (left, *left.iterdir())) > _ABANDONED:
                        shutil.rmtree(left, ignore_errors=True)
            with appearing_whole(folder) as made:
                made.mkdir()
                _write(made, documents, tokenizer, encode)
        except OSError as e:
            if not (folder / "meta.json").exists():  # else another process was first, with the same bytes
                raise RunError(
                    f"{folder}: cannot write the token cache ({e.strerror or e}); free space or set --config.data.cache_dir",
                    ExitCode.STORAGE,
                ) from None
    return open_cache(folder)


def _write(folder: Path, documents: Sequence[str], tokenizer: Tokenizer, encode) -> None:
    dtype = token_dtype(tokenizer)
    offsets, text_bytes = [0], 0
    with open(folder / "tokens.bin", "wb") as f, open(folder / "counts.bin", "wb") as f_counts:
        for n, text in enumerate(documents, start=1):
            try:
                ids, counts = encode(text) if encode else (tokenizer.document(text), [])
            except RunError as e:
                if encode:
                    raise  # it already says where the document is
                raise RunError(f"document {n} of {len(documents)} ({text[:60]!r}): {e}", e.code) from None
            f.write(np.array(ids, dtype).tobytes())
            f_counts.write(bytes(counts))
            offsets.append(offsets[-1] + len(ids))
            text_bytes += len(text.encode())
    if encode is None:
        (folder / "counts.bin").unlink()
    np.array(offsets, np.int64).tofile(folder / "offsets.bin")
    meta = {"dtype": np.dtype(dtype).name, "documents": len(documents), "tokens": offsets[-1], "text_bytes": text_bytes}
    (folder / "meta.json").write_text(json.dumps(meta | ({"counts": True} if encode else {})))


def open_cache(folder: Path) -> TokenCache:
    """Memory-maps a cache. Raises RunError if a file is missing, or its size is not the one it was written with."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        expected = {"tokens.bin": meta["tokens"] * np.dtype(meta["dtype"]).itemsize, "offsets.bin": 8 * (meta["documents"] + 1)}
        if "counts" in meta:
            expected["counts.bin"] = meta["tokens"]
        size = {f: (folder / f).stat().st_size for f in expected}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise data_error(f"{folder}: damaged token cache (a file is missing or unreadable); delete that folder") from None
    if size != expected:
        raise data_error(f"{folder}: damaged token cache (file sizes {size}, expected {expected}); delete that folder")
    offsets = np.fromfile(folder / "offsets.bin", np.int64)
    mapped = lambda name, dtype: np.memmap(folder / name, dtype, "r") if meta["tokens"] else np.zeros(0, dtype)
    counts = mapped("counts.bin", np.uint8) if "counts" in meta else None
    return TokenCache(mapped("tokens.bin", meta["dtype"]), offsets, meta["text_bytes"], counts)
