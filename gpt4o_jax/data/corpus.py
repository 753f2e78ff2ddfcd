"""From a config to token caches: load, split, train the tokenizer, tokenise; each once per machine."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

from gpt4o_jax.config import DataConfig, RunConfig
from gpt4o_jax.data import file_digests, mixture, prepared, python_docs, sources, token_cache
from gpt4o_jax.data import tokenizer as tokenizers
from gpt4o_jax.data.rows import make_rows
from gpt4o_jax.data.token_cache import TokenCache
from gpt4o_jax.data.tokenizer import Tokenizer
from gpt4o_jax.errors import ExitCode, RunError

_TOKENIZER_BYTES = 200_000_000  # SentencePiece holds its text in memory, and more of it moves no piece that matters


@dataclasses.dataclass(frozen=True)
class Member:
    """One source of a corpus, as tokens."""

    data: DataConfig  # what it would be read by alone
    share: Fraction  # of the training rows
    training: TokenCache
    holdout: TokenCache


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training text and hold-out as tokens. `name` is the digest of sources, split, shares and tokenizer."""

    name: str
    tokenizer: Tokenizer
    members: tuple[Member, ...]  # several only for data.source=mixture

    @functools.cached_property
    def holdout(self) -> TokenCache:
        """The held-out documents of all members, one member after another."""
        return token_cache.join([m.holdout for m in self.members])


def prepare(config: RunConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Opens the corpus of a run, making what is not in the cache yet.

    tokenizer: the run's own where it has one already; otherwise config.tokenizer says which.
    Documents are read only where something has to be made.
    """
    root = token_cache.cache_root(config.data.cache_dir)
    shares, alone = zip(*mixture.members(config.data), strict=True)
    keys = _split_keys(alone, root / "digests")
    whole = keys[0] if len(keys) == 1 else _digest(*(f"{key} {share}" for key, share in zip(keys, shares, strict=True)))

    @functools.cache
    def documents():
        return split_documents(alone)

    def tokenizer_text():
        if config.tokenizer.kind == "char":  # no statistic of the text: the hold-out's characters belong to it
            return itertools.chain(*(part for pair in documents() for part in pair))
        return mixture.fair_text([training for training, _ in documents()], shares, _TOKENIZER_BYTES)

    if tokenizer is None:
        tokenizer = _tokenizer(config, root / "tokenizers", whole, tokenizer_text)
    members = []
    for i, key in enumerate(keys):
        caches = []
        for j, part in enumerate(("training", "holdout")):
            folder = root / "tokens" / f"{_digest(key, tokenizer.digest)}-{part}"
            if (folder / "meta.json").exists():
                caches.append(token_cache.open_cache(folder))
            else:
                caches.append(token_cache.build(folder.parent, folder.name, documents()[i][j], tokenizer))
        members.append(Member(alone[i], shares[i], *caches))
    return Corpus(_digest(whole, tokenizer.digest), tokenizer, tuple(members))


def split_documents(alone: Sequence[DataConfig]) -> list[tuple[Sequence[str], Sequence[str]]]:
    """(training documents, held-out documents) of each source of a corpus."""
    return sources.split_all([sources.load(c) for c in alone], alone[0])


def training_rows(config: RunConfig, corpus: Corpus):
    """The row function of a run. Raises RunError where a source is too short for one row."""
    caches, shares = [m.training for m in corpus.members], [m.share for m in corpus.members]
    return make_rows(config.data.rows, caches, shares, config.model.context_length, config.seed)


def _tokenizer(config: RunConfig, folder: Path, key: str, text: Callable[[], Iterable[str]]) -> Tokenizer:
    wanted = config.tokenizer
    if wanted.path:
        return tokenizers.load(Path(wanted.path))
    path = folder / f"{_digest(key, wanted.kind, str(wanted.vocab_size))}.model"
    if path.exists():
        return tokenizers.load(path)
    made = tokenizers.train(wanted.kind, wanted.vocab_size, text())
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


def _split_keys(alone: Sequence[DataConfig], memory: Path) -> list[str]:
    """Names training text and hold-out of each source."""
    knobs = alone[0]
    split = json.dumps([knobs.holdout, knobs.holdout_fraction, knobs.shingle_bytes, knobs.shingle_share])
    keys = [_digest(_source_key(c, memory), split) for c in alone]
    if len(keys) > 1 and knobs.shingle_bytes:  # each loses what repeats the hold-outs of all
        return [_digest(key, *sorted(keys)) for key in keys]
    return keys


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
