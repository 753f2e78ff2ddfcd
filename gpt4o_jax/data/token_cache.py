"""Tokenised documents on disk, memory-mapped: written once, named by what they were made from."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpt4o_jax.data.tokenizer import Tokenizer
from gpt4o_jax.errors import ExitCode, RunError, data_error


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """Documents as one stream of ids; document d is tokens[offsets[d] : offsets[d + 1]], from <bos> to <eos>."""

    tokens: np.ndarray  # uint16 or uint32, memory-mapped
    offsets: np.ndarray  # int64, one more than documents
    text_bytes: int  # UTF-8 bytes of all documents

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def token_count(self) -> int:
        return len(self.tokens)

    def document(self, d: int) -> np.ndarray:
        return self.tokens[self.offsets[d] : self.offsets[d + 1]]


def token_dtype(tokenizer: Tokenizer) -> type:
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def join(caches: Sequence[TokenCache]) -> TokenCache:
    """The documents of all, one cache after another; copied into memory where there are several."""
    if len(caches) == 1:
        return caches[0]
    lengths = np.concatenate([np.diff(c.offsets) for c in caches])
    tokens = np.concatenate([c.tokens for c in caches])
    return TokenCache(tokens, np.concatenate([[0], np.cumsum(lengths)]), sum(c.text_bytes for c in caches))


def cache_root(configured: str) -> Path:
    """data.cache_dir, or gpt4o_jax/ in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    if configured:
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt4o_jax"


def build(root: Path, name: str, documents: Sequence[str], tokenizer: Tokenizer) -> TokenCache:
    """Opens root/name, made first if it is not there. A folder appears whole or not at all."""
    folder = root / name
    if not (folder / "meta.json").exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(dir=root, prefix=f".{name}."))
            try:
                _write(made, documents, tokenizer)
                os.rename(made, folder)
            finally:
                shutil.rmtree(made, ignore_errors=True)
        except OSError as e:
            if not (folder / "meta.json").exists():  # else another process was first: the same bytes
                raise RunError(
                    f"{folder}: cannot write the token cache ({e.strerror or e}); free space or set --config.data.cache_dir",
                    ExitCode.STORAGE,
                ) from None
    return open_cache(folder)


def _write(folder: Path, documents: Sequence[str], tokenizer: Tokenizer) -> None:
    dtype = token_dtype(tokenizer)
    offsets, text_bytes = [0], 0
    with open(folder / "tokens.bin", "wb") as f:
        for text in documents:
            ids = np.array(tokenizer.document(text), dtype)
            f.write(ids.tobytes())
            offsets.append(offsets[-1] + len(ids))
            text_bytes += len(text.encode())
    np.array(offsets, np.int64).tofile(folder / "offsets.bin")
    meta = {"dtype": np.dtype(dtype).name, "documents": len(documents), "tokens": offsets[-1], "text_bytes": text_bytes}
    (folder / "meta.json").write_text(json.dumps(meta))


def open_cache(folder: Path) -> TokenCache:
    """Memory-maps a cache. Raises RunError where its files do not have the sizes it was written with."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        size = {f: (folder / f).stat().st_size for f in ("tokens.bin", "offsets.bin")}
        expected = {"tokens.bin": meta["tokens"] * np.dtype(meta["dtype"]).itemsize, "offsets.bin": 8 * (meta["documents"] + 1)}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise data_error(f"{folder}: damaged token cache (a file is missing or unreadable); delete that folder") from None
    if size != expected:
        raise data_error(f"{folder}: damaged token cache (file sizes {size}, expected {expected}); delete that folder")
    offsets = np.fromfile(folder / "offsets.bin", np.int64)
    tokens = np.memmap(folder / "tokens.bin", meta["dtype"], "r") if meta["tokens"] else np.zeros(0, meta["dtype"])
    return TokenCache(tokens, offsets, meta["text_bytes"])
