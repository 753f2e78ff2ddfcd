"""Preference pairs: a conversation with a preferred and a rejected answer, as rows of tokens.

JSONL, one per line: {"messages": [turns up to the question], "chosen": text, "rejected": text}. Or made from a world: the
rejected answer is the right one with one word replaced by that of another answer from the same slice, so telling them apart takes
attention.

T row length in tokens (a row also holds the token after its last, as a target)
"""

import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from gpt4o_jax.config import RunConfig
from gpt4o_jax.console import say as tell
from gpt4o_jax.data import conversations, packing, sources
from gpt4o_jax.data import tokenizer as tokenizers
from gpt4o_jax.data.batches import Batch, make_batch
from gpt4o_jax.data.rows import shuffled
from gpt4o_jax.data.tokenizer import Symbols, Tokenizer
from gpt4o_jax.errors import RunError, data_error, lone_surrogate
from gpt4o_jax.tasks import chat
from gpt4o_jax.tasks.chat import Message
from gpt4o_jax.tasks.worlds import World


class Pair(NamedTuple):
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    where: str  # for error messages


class Encoded(NamedTuple):
    """A pair as token ids, each with whether it belongs to the answer."""

    chosen: tuple[list[int], list[bool]]
    rejected: tuple[list[int], list[bool]]

    @property
    def length(self) -> int:
        return len(self.chosen[0]) + len(self.rejected[0])


# ---------------------------------------------------------------- sources of pairs


def read(text: str, where: str) -> Iterator[Pair]:
    """The pairs of a JSONL file; empty lines are skipped. Raises RunError with file:line and the field."""
    for n, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise data_error(f"{where}:{n}: not JSON") from None
        if not isinstance(record, dict) or not isinstance(record.get("messages"), list) or not record["messages"]:
            raise data_error(f"{where}:{n}: messages: expected the turns up to the question, as a list")
        try:
            prompt = tuple(chat.read_messages(record["messages"]))
        except RunError as e:
            raise data_error(f"{where}:{n}: messages: {e}") from None
        if prompt[-1].role == "assistant":
            raise data_error(f"{where}:{n}: messages: the last is of role assistant; answers belong in chosen and rejected")
        for name in ("chosen", "rejected"):
            if not isinstance(record.get(name), str):
                raise data_error(f"{where}:{n}: {name}: expected a text, got {record.get(name)!r:.40}")
        for name, text in (*(("messages", m.text) for m in prompt), *((name, record[name]) for name in ("chosen", "rejected"))):
            if lone := lone_surrogate(text):
                raise data_error(f"{where}:{n}: {name}: not valid Unicode: {lone}; leave it out")
        if record["chosen"] == record["rejected"]:
            raise data_error(f"{where}:{n}: chosen and rejected are the same text; nothing is preferred")
        yield Pair(prompt, record["chosen"], record["rejected"], f"{where}:{n}")


def of_world(world: World, size: int, held_out: bool, choosing: bool = True) -> Iterator[Pair]:
    """One pair for each of the world's first `size` items whose slice has a different answer nearby.

    The rejected answer is a `near_miss`, or, if that would also be right, the whole other answer. choosing: of held-out items,
    those that choose a checkpoint during training, else those of the last evaluation.
    """
    slices = len(world.slices)
    item = lambda i: world.item(conversations.SEED, i, False)
    if held_out:
        items = conversations.held_out(world, size + 19 * slices, choosing)
        size, item = min(size, len(items)), lambda i: items[i % len(items)]
    for i in range(size):
        mine = item(i)
        others = (item(i + n * slices).answer for n in range(1, 20))
        other = next((answer for answer in others if answer not in mine.references), None)
        if other is not None:
            close = near_miss(mine.answer, other, random.Random(f"{world.name} {i}"))
            rejected = other if close in mine.references else close
            yield Pair(mine.prompt, mine.answer, rejected, f"world {world.name}: item {i}")


def near_miss(answer: str, other: str, rng: random.Random) -> str:
    """`answer` with a random word replaced by `other`'s word at the same place; `other` itself if no word differs."""
    words, others = answer.split(" "), other.split(" ")
    places = [i for i, (word, another) in enumerate(zip(words, others, strict=False)) if word != another]
    if not places:
        return other
    at = rng.choice(places)
    return " ".join([*words[:at], others[at], *words[at + 1 :]])


def load(config: RunConfig) -> tuple[list[Pair], list[Pair]]:
    """(training pairs, held-out pairs). Pairs from files are held out by a hash of the question, or come from data.holdout_path.

    Raises RunError.
    """
    data = config.data
    if data.source == "world":
        world = sources.world(data.path, data.holdout_fraction)
        return list(of_world(world, data.world_items, False)), list(of_world(world, config.objective.held_out, True))
    pairs = _of_files(data.path)
    if data.holdout_path:
        return pairs, _of_files(data.holdout_path)
    is_held = lambda pair: sources.is_held("\n".join(m.text for m in pair.prompt), data.holdout_fraction)
    training, held = ([p for p in pairs if is_held(p) == wanted] for wanted in (False, True))
    for kind, found in (("training", training), ("held-out", held)):
        if not found:
            raise data_error(f"{data.path}: {len(pairs)} pairs, and no {kind} one; give more, or another data.holdout_fraction")
    return training, held


def _of_files(path: str) -> list[Pair]:
    return [pair for file in sources.text_files(path) for pair in read(sources.read_text(file), str(file))]


# ---------------------------------------------------------------- rows of pairs


class PairRows:
    """Rows of as many whole pairs as fit; the i-th pair of a row has the segments 2i + 1 (chosen) and 2i + 2 (rejected).

    Each epoch has the same rows in a new random order. `reference` [rows, T], once known, is the log-probability that the
    reference model gives each target, in the rows' first order.
    """

    def __init__(self, pairs: Sequence[Encoded], T: int, seed: int):
        self.T, self.seed, self.count = T, seed, len(pairs)
        lengths = np.array([pair.length for pair in pairs])
        row, self.rows_per_epoch = packing.first_fit(lengths, T + 1)
        self._rows: list[list[Encoded]] = [[] for _ in range(self.rows_per_epoch)]
        for r, pair in zip(row, pairs, strict=True):
            self._rows[r].append(pair)
        self.most = max(map(len, self._rows))  # most pairs in a row
        self.tokens_per_epoch = self.rows_per_epoch * T
        self.fill = float(lengths.sum() / (self.rows_per_epoch * (T + 1)))
        self.reference = np.zeros((self.rows_per_epoch, T), np.float32)
        self._epoch = functools.lru_cache(maxsize=2)(lambda epoch: shuffled(seed, epoch, self.rows_per_epoch))

    def __getitem__(self, row: int):
        """Row number `row` of the run, as returned by `at`."""
        epoch, row = divmod(row, self.rows_per_epoch)
        return self.at(int(self._epoch(epoch)[row]))

    def at(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, segments, weights [T + 1] each, reference [T]). The weights of a pair, as targets, sum to 1."""
        tokens, segments = np.zeros((2, self.T + 1), np.int32)
        weights = np.zeros(self.T + 1, np.float32)
        at = 0
        for i, pair in enumerate(self._rows[row]):
            share = 1 / sum(sum(counts) for _, counts in pair)
            for segment, (ids, counts) in zip((2 * i + 1, 2 * i + 2), pair, strict=True):
                here = slice(at, at + len(ids))
                tokens[here], segments[here], weights[here] = ids, segment, np.multiply(counts, share)
                at += len(ids)
        return tokens, segments, weights, self.reference[row]


def pair_batch(rows: list[tuple], symbols: Symbols) -> Batch:
    """Batch [B, T] of rows of PairRows (an empty row is two arrays of zeros), with "reference" in Batch.beside."""
    batch = make_batch([row[:2] for row in rows], symbols)
    empty = np.zeros(batch.tokens.shape[1], np.float32)
    weights = np.stack([row[2][1:] if len(row) > 2 else empty for row in rows])
    reference = np.stack([row[3] if len(row) > 2 else empty for row in rows])
    return dataclasses.replace(batch, weights=batch.weights * weights, beside={"reference": reference})


@dataclasses.dataclass(frozen=True)
class PairCorpus:
    """The training loop's corpus, for pairs."""

    name: str
    tokenizer: Tokenizer
    training: PairRows
    held_out: PairRows
    in_lanes: tuple = ()

    @property
    def size(self) -> str:
        return f"{self.training.count:,} training pairs"

    def rows(self, config: RunConfig) -> PairRows:
        return self.training


def prepare(config: RunConfig, tokenizer: Tokenizer | None = None) -> PairCorpus:
    """The pairs of a run. tokenizer: the run's own, if it already has one. Raises RunError."""
    tokenizer = tokenizer or tokenizers.load(epath.Path(config.tokenizer.path or config.init.from_))
    digest, made = hashlib.sha256(tokenizer.digest.encode()), []
    for pairs in load(config):
        fitting = _fitting(pairs, config, tokenizer)
        digest.update(repr(fitting).encode())
        made.append(PairRows(fitting, config.model.context_length, config.seed))
    return PairCorpus(digest.hexdigest()[:16], tokenizer, *made)


def scored_at_last(config: RunConfig, corpus: PairCorpus) -> PairRows:
    """Held-out pairs of the last evaluation: for a world, others than those that choose a checkpoint; for files, the same."""
    if config.data.source != "world":
        return corpus.held_out
    world = sources.world(config.data.path, config.data.holdout_fraction)
    pairs = list(of_world(world, config.objective.held_out, held_out=True, choosing=False))
    return PairRows(_fitting(pairs, config, corpus.tokenizer), config.model.context_length, config.seed)


def _fitting(pairs: Sequence[Pair], config: RunConfig, tokenizer: Tokenizer) -> list[Encoded]:
    """The pairs that fit in a row, as ids. Raises RunError if none does, or the template cannot write one or tell it apart."""
    template = chat.template_for(conversations.template_name(config.data, tokenizer), tokenizer)
    T = config.model.context_length

    def encode(pair: Pair, answer: str):
        try:
            rendered = template.render([*pair.prompt, chat.say("assistant", answer)], False)
            return chat.encode(_last_answer(rendered), tokenizer)
        except RunError as e:
            raise RunError(f"{pair.where}: {e}", e.code) from None

    encoded = [Encoded(encode(pair, pair.chosen), encode(pair, pair.rejected)) for pair in pairs]
    for pair, (chosen, rejected) in zip(pairs, encoded, strict=True):
        if chosen == rejected:
            name = conversations.template_name(config.data, tokenizer)
            raise data_error(f"{pair.where}: chosen and rejected are the same in the template {name}; nothing is preferred")
    fitting = [pair for pair in encoded if pair.length <= T + 1]
    if not fitting:
        shortest = min(pair.length for pair in encoded)
        raise data_error(
            f"{config.data.path}: none of {len(encoded)} pairs fits in a row of model.context_length={T}, which takes both"
            f" answers, each behind its question; the shortest needs context_length={shortest - 1}"
        )
    if len(fitting) < len(encoded):
        tell(
            f"{len(encoded) - len(fitting)} of {len(encoded)} pairs are longer than a row and left out; the longest needs"
            f" model.context_length={max(pair.length for pair in encoded) - 1}"
        )
    return fitting


def _last_answer(rendered: chat.Rendered) -> chat.Rendered:
    """`rendered` with only the last answer counted: the earlier ones belong to the question."""
    last = max(i for i, (_, counts) in enumerate(rendered) if counts)
    before = max((i for i, (_, counts) in enumerate(rendered[:last]) if not counts), default=-1)
    return [(part, counts and i > before) for i, (part, counts) in enumerate(rendered)]
