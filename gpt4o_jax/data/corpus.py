"""From a config to token caches: load, split, train the tokenizer, tokenise; each once per machine."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import sys
from pathlib import Path

from gpt4o_jax.config import DataConfig, RunConfig
from gpt4o_jax.data import file_digests, prepared, python_docs, sources, token_cache
from gpt4o_jax.data import tokenizer as tokenizers
from gpt4o_jax.data.token_cache import TokenCache
from gpt4o_jax.data.tokenizer import Tokenizer
from gpt4o_jax.errors import ExitCode, RunError


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training text and hold-out as tokens. `name` is the digest of source, split and tokenizer."""

    name: str
    tokenizer: Tokenizer
    training: TokenCache
    holdout: TokenCache


def prepare(config: RunConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Opens the corpus of a run, making what is not in the cache yet.

    tokenizer: the run's own where it has one already; otherwise config.tokenizer says which.
    Documents are read only where something has to be made.
    """
    root = token_cache.cache_root(config.data.cache_dir)
    split_key = _digest(_source_key(config.data, root / "digests"), _split_knobs(config.data))

    @functools.cache
    def documents():
        return sources.split(sources.load(config.data), config.data)

    if tokenizer is None:
        # A character set is no statistic of the text: the hold-out's characters belong to it.
        parts = 2 if config.tokenizer.kind == "char" else 1
        tokenizer = _tokenizer(config, root / "tokenizers", split_key, lambda: itertools.chain(*documents()[:parts]))
    name = _digest(split_key, tokenizer.digest)
    caches = []
    for i, part in enumerate(("training", "holdout")):
        folder = root / "tokens" / f"{name}-{part}"
        ready = (folder / "meta.json").exists()
        caches.append(
            token_cache.open_cache(folder) if ready else token_cache.build(folder.parent, folder.name, documents()[i], tokenizer)
        )
    return Corpus(name, tokenizer, *caches)


def _tokenizer(config: RunConfig, folder: Path, split_key: str, documents) -> Tokenizer:
    wanted = config.tokenizer
    if wanted.path:
        return tokenizers.load(Path(wanted.path))
    path = folder / f"{_digest(split_key, wanted.kind, str(wanted.vocab_size))}.model"
    if path.exists():
        return tokenizers.load(path)
    made = tokenizers.train(wanted.kind, wanted.vocab_size, documents())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        made.save(temporary)
        os.replace(temporary, path)
    except OSError as e:
        raise RunError(
            f"{folder}: cannot write the tokenizer ({e.strerror or e}); free space or set --config.data.cache_dir",
            ExitCode.STORAGE,
        ) from None
    return made


def _source_key(config: DataConfig, memory: Path) -> str:
    """Changes whenever the documents do, without parsing them."""
    if config.source == "python_docs":
        return _digest("python_docs", sys.version, Path(python_docs.__file__).read_text())
    if config.source == "tfds":
        version, files = prepared.files(config.path, config.tfds_dir)
        return _digest("tfds", version, file_digests.digest(files, memory), config.field)
    files = file_digests.digest(sources.text_files(config.path), memory)
    return _digest(config.source, files, config.separator if config.source == "text" else config.field)


def _split_knobs(config: DataConfig) -> str:
    return json.dumps([config.holdout, config.holdout_fraction, config.shingle_bytes, config.shingle_share])


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
