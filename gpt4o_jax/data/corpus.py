"""From a config to token caches: load, split, train the tokenizer, tokenise; each step once per machine.

With data.lanes only the hold-out is tokenised here, and a bpe tokenizer is trained on a sample (data/lanes.py).
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from gpt4o_jax import config_mixture
from gpt4o_jax.config import DataConfig, RunConfig
from gpt4o_jax.data import conversations, file_digests, lanes, mixture, prepared, python_docs, sources, token_cache
from gpt4o_jax.data import tokenizer as tokenizers
from gpt4o_jax.data.rows import ROWS, make_rows
from gpt4o_jax.data.token_cache import TokenCache
from gpt4o_jax.data.tokenizer import Tokenizer
from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.paths import appearing_whole, of_user
from gpt4o_jax.tasks.worlds import docstrings

_TOKENIZER_BYTES = 200_000_000  # SentencePiece holds the text in memory, and more of it changes no piece that matters
_TOKENIZER_ITEMS = 5_000  # of each world


@dataclasses.dataclass(frozen=True)
class Member:
    """One source of a corpus, as tokens."""

    data: DataConfig  # config that reads only this source
    share: Fraction  # of the training rows
    training: TokenCache | lanes.Chunks
    holdout: TokenCache

    @property
    def name(self) -> str:
        return name_of(self.data)


def name_of(data: DataConfig) -> str:
    """Name of a source (not a mixture) in evaluations, spelled as in data.mixture."""
    field = config_mixture.READER + data.reader if data.reader else (data.field if data.field != DataConfig.field else "")
    return data.source + (f":{data.path}" if data.path else "") + (f"@{field}" if field else "")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training text and hold-out as tokens. `name` is the digest of sources, split, shares and tokenizer."""

    name: str
    tokenizer: Tokenizer
    members: tuple[Member, ...]  # several only for data.source=mixture

    @property
    def size(self) -> str:
        """Amount of training text, as far as known without reading it."""
        if self.in_lanes:
            return f"up to {sum(map(len, self.in_lanes)) * lanes.CHUNK:,} training documents, read in lanes"
        return f"{sum(m.training.token_count for m in self.members):,} training tokens"

    @property
    def in_lanes(self) -> list[lanes.Chunks]:
        """Training text of the members that is tokenised while it is read."""
        return [m.training for m in self.members if isinstance(m.training, lanes.Chunks)]

    def too_long(self, T: int) -> list[str]:
        """One line per source with conversations too long for a row of T tokens, where first_fit cuts them."""
        lines = []
        for member in self.members:
            lengths = np.diff(member.training.offsets) if conversations.are_documents_of(member.data) else np.zeros(0, np.int64)
            if over := int(np.count_nonzero(lengths > T + 1)):
                lines.append(
                    f"{member.name}: {over:,} of {len(lengths):,} conversations are longer than"
                    f" model.context_length={T} and are cut there; the longest needs"
                    f" --config.model.context_length={lengths.max() - 1}"
                )
        return lines

    def rows(self, config: RunConfig):
        """`training_rows` of this corpus."""
        return training_rows(config, self)


def prepare(config: RunConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Opens the corpus of a run and builds what is not in the cache yet.

    tokenizer: the run's own, if it already has one; None: the one that config.tokenizer specifies.
    Documents are read only if something has to be built. Raises RunError for bad input, or if the cache cannot be written.
    """
    root = token_cache.cache_root(config.data.cache_dir)
    shares, alone = zip(*mixture.members(config.data), strict=True)
    keys = _split_keys(alone, root / "digests")
    whole = keys[0] if len(keys) == 1 else _digest(*(f"{key} {share}" for key, share in zip(keys, shares, strict=True)))

    @functools.cache
    def documents():
        return split_documents(alone)

    def tokenizer_text():
        if config.tokenizer.kind == "char":  # not a statistic of the text: it needs the hold-out's characters too
            if config.data.lanes:
                return itertools.chain(*map(sources.load, alone))
            return itertools.chain(*(part for pair in documents() for part in pair))
        if config.data.lanes:
            sampled = zip(alone, shares, strict=True)
            parts = [lanes.sample(sources.load(c), c.holdout_fraction, int(share * _TOKENIZER_BYTES)) for c, share in sampled]
        else:
            parts = [_some(training, c) for (training, _), c in zip(documents(), alone, strict=True)]
        return mixture.fair_text(parts, shares, _TOKENIZER_BYTES)

    if tokenizer is None:
        tokenizer = _tokenizer(config, root / "tokenizers", whole, tokenizer_text)
    members = []
    for i, key in enumerate(keys):
        if config.data.lanes:
            members.append(_in_lanes(alone[i], shares[i], root / "tokens", _digest(key, tokenizer.digest), tokenizer))
            continue
        caches, how = [], conversations.tokens_name(alone[i], tokenizer)
        for j, part in enumerate(("training", "holdout")):
            folder = root / "tokens" / f"{_digest(key, how)}-{part}"
            if (folder / "meta.json").exists():
                caches.append(token_cache.open_cache(folder))
            else:
                encode = conversations.encoder(alone[i], tokenizer)
                caches.append(token_cache.build(folder.parent, folder.name, documents()[i][j], tokenizer, encode))
        members.append(Member(alone[i], shares[i], *caches))
    how = dict.fromkeys([tokenizer.digest, *(conversations.tokens_name(c, tokenizer) for c in alone)])
    return Corpus(_digest(whole, *how), tokenizer, tuple(members))


def _some(documents: Sequence[str], data: DataConfig) -> Sequence[str]:
    """Documents to train a tokenizer on: of a world, whose items all use the same words, only the first ones."""
    if data.source == "world":
        documents = sources.Part(documents, range(min(len(documents), _TOKENIZER_ITEMS)))
    return conversations.AsWritten(documents) if conversations.are_documents_of(data) else documents


def _in_lanes(data: DataConfig, share: Fraction, root: Path, name: str, tokenizer: Tokenizer) -> Member:
    """A member whose training text is tokenised while it is read."""
    documents = sources.load(data)
    training = lanes.Chunks(documents, data.holdout_fraction, tokenizer, root / f"{name}-chunks")
    folder = root / f"{name}-holdout"
    if (folder / "meta.json").exists():
        return Member(data, share, training, token_cache.open_cache(folder))
    held = lanes.held_out(documents, data.holdout_fraction)
    if not held:
        raise sources.no_holdout(documents, data)
    return Member(data, share, training, token_cache.build(root, folder.name, held, tokenizer))


def split_documents(alone: Sequence[DataConfig]) -> list[tuple[Sequence[str], Sequence[str]]]:
    """(training documents, held-out documents) of each source of a corpus."""
    more = [document for c in alone for document in sources.scored_at_last(c)]
    return sources.split_all([sources.load(c) for c in alone], alone[0], [sources.apart(c) for c in alone], more)


def training_rows(config: RunConfig, corpus: Corpus):
    """The row function of a run. Raises RunError if a source is too short for one row, or for its lanes."""
    texts, shares = [m.training for m in corpus.members], [m.share for m in corpus.members]
    make = functools.partial(lanes.LaneRows, lanes=config.data.lanes) if config.data.lanes else ROWS[config.data.rows]
    return make_rows(make, texts, shares, config.model.context_length, config.seed)


def expected_vocab_size(config: RunConfig) -> int:
    """Vocabulary size of a run of this config, without reading its text. Raises RunError if that needs the text (kind char)."""
    wanted = config.tokenizer
    if config.model.vocab_size:
        return config.model.vocab_size
    if wanted.path:
        return tokenizers.load(of_user(wanted.path)).vocab_size
    if wanted.kind == "byte":
        return tokenizers.byte_tokenizer().vocab_size
    if wanted.kind == "char":
        raise RunError(
            "config.tokenizer.kind=char: how many characters there are the text would tell, which is not read here; give their"
            " number and that of the 32 reserved ids, such as --config.model.vocab_size=96"
        )
    return wanted.vocab_size


def _tokenizer(config: RunConfig, folder: Path, key: str, text: Callable[[], Iterable[str]]) -> Tokenizer:
    wanted = config.tokenizer
    if wanted.path:
        return tokenizers.load(of_user(wanted.path))
    path = folder / f"{_digest(key, wanted.kind, str(wanted.vocab_size))}.model"
    if path.exists():
        return tokenizers.load(path)
    made = tokenizers.train(wanted.kind, wanted.vocab_size, text())
    try:
        with appearing_whole(path) as beside:
            made.save(beside)
    except OSError as e:
        raise RunError(
            f"{folder}: cannot write the tokenizer ({e.strerror or e}); free space or set --config.data.cache_dir",
            ExitCode.STORAGE,
        ) from None
    return made


def _source_key(config: DataConfig, memory: Path) -> str:
    """A key that changes whenever the documents do, computed without parsing them."""
    if config.source == "python_docs":
        return _digest("python_docs", sys.version, Path(python_docs.__file__).read_text())
    more = conversations.digest_parts(config)
    if config.source == "world":
        text = (sys.version, Path(python_docs.__file__).read_text()) if config.path == docstrings.NAME else ()
        return _digest("world", config.path, str(config.world_items), str(_TOKENIZER_ITEMS), *text, *more)
    what = config.separator if config.source == "text" else config.field
    found = [_files(config, path, memory) for path in (config.path, config.holdout_path) if path]
    return _digest(config.source, *found[0], what, *more, *itertools.chain(*found[1:]))


def _files(config: DataConfig, path: str, memory: Path) -> tuple[str, ...]:
    """Digest of the files of a source; for TFDS preceded by the dataset's version."""
    if config.source == "tfds":
        version, files = prepared.files(path, config.tfds_dir)
        return version, file_digests.digest(files, memory)
    return (file_digests.digest(sources.text_files(path), memory),)


def _split_keys(alone: Sequence[DataConfig], memory: Path) -> list[str]:
    """A key of the training text and hold-out of each source."""
    knobs = alone[0]
    split = [knobs.holdout, knobs.holdout_fraction, knobs.shingle_bytes, knobs.shingle_share]
    if knobs.shingle_bytes:
        split.append("less repeats, short ones too")  # tells these caches from older ones, which kept short repeats
    split = json.dumps([*split, "lanes", lanes.CHUNK, lanes.HOLDOUT_BYTES] if knobs.lanes else split)
    keys = [_digest(_source_key(c, memory), split) for c in alone]
    if len(keys) > 1 and knobs.shingle_bytes:  # each drops what repeats the hold-out of any
        return [_digest(key, *sorted(keys)) for key in keys]
    return keys


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
