"""Conversations as documents: plain text for splitting, deduplication and counting, turns for tokenisation.

They come from JSONL files, from datasets through a reader (tasks/readers.py), and from the synthetic worlds of tasks/.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from gpt4o_jax.config import DataConfig
from gpt4o_jax.console import say
from gpt4o_jax.data import mixture, tokenizer_published
from gpt4o_jax.data.tokenizer import Tokenizer
from gpt4o_jax.errors import RunError, data_error, did_you_mean, lone_surrogate
from gpt4o_jax.tasks import chat, readers
from gpt4o_jax.tasks.item import Item
from gpt4o_jax.tasks.worlds import World

SEED = 0  # of world items; a run's own seed changes only their order, so they are tokenised once
SELECTION_SEED = 1  # of the held-out items for checkpoint selection during training
SCORED = 200  # held-out items of SEED per slice of a world that `evaluate` scores; none is used for checkpoint selection

UNRENDERED = f"this model's own chat template ({tokenizer_published.TEMPLATE_FILE}) is not supported here"


class Conversation(str):
    """The texts of its messages, joined by newlines. `item` holds the messages with roles, `where` the origin, for errors."""

    item: Item
    where: str

    def __new__(cls, item: Item, where: str):
        self = super().__new__(cls, "\n".join(m.text for m in item.messages))
        self.item, self.where = item, where
        return self


def are_documents_of(data: DataConfig) -> bool:
    """Whether the documents of a source (not a mixture) are conversations."""
    return data.source in ("conversations", "world") or bool(data.reader)


def talks(data: DataConfig) -> bool:
    """Whether any source of `data` consists of conversations."""
    return any(are_documents_of(alone) for _, alone in mixture.members(data))


def template_name(data: DataConfig, tokenizer: Tokenizer) -> str:
    """Name of the chat template: data.template, else the one the tokenizer's model was trained with, else "own"."""
    return data.template or tokenizer.template or "own"


def trained_template(data: DataConfig, tokenizer: Tokenizer) -> str:
    """Name of the template in which a model trained on `data` writes conversations; "" if it knows none."""
    return template_name(data, tokenizer) if talks(data) else tokenizer.template


def knows_only_published(data: DataConfig, tokenizer: Tokenizer) -> bool:
    """Whether a model trained on `data` knows only its published chat template, and that one is not supported here."""
    return not trained_template(data, tokenizer) and tokenizer_published.is_unknown(tokenizer)


def template_of(data: DataConfig, tokenizer: Tokenizer) -> chat.Template:
    """The template in which a model trained on `data` is asked; `plain` if it knows none. Raises RunError as template_for."""
    if knows_only_published(data, tokenizer):
        say(f"{UNRENDERED}; questions are asked in the template plain")
    return chat.template_for(trained_template(data, tokenizer) or "plain", tokenizer)


def encoder(data: DataConfig, tokenizer: Tokenizer) -> Callable[[Conversation], tuple[list[int], list[bool]]] | None:
    """document -> (ids, whether the loss counts each id); None if the documents of the source are not conversations.

    Raises RunError if the tokenizer lacks symbols of the template; the returned function does if it cannot render a document.
    """
    if not are_documents_of(data):
        return None
    template = chat.template_for(template_name(data, tokenizer), tokenizer)

    def encode(document: Conversation) -> tuple[list[int], list[bool]]:
        try:
            ids, counts = chat.encode(template.render(document.item.messages, False), tokenizer)
        except RunError as e:
            raise RunError(f"{document.where}: {e}", e.code) from None
        return ids, [True] * len(ids) if data.loss_on == "all" else counts

    return encode


def digest_parts(data: DataConfig) -> tuple[str, ...]:
    """What the conversations of a source and their tokens depend on besides the input files; () for plain text."""
    if not are_documents_of(data):
        return ()
    folder = Path(chat.__file__).parent  # a change of prompts, templates or item generation changes the conversations
    programs = [folder / name for name in ("chat.py", "item.py", "readers.py")] + sorted(folder.glob("worlds/*.py"))
    return (*(p.read_text(encoding="utf-8") for p in programs), data.reader, data.template, data.loss_on)


def tokens_name(data: DataConfig, tokenizer: Tokenizer) -> str:
    """Identifies the tokenisation of a source: published tokenizers with equal pieces may differ in their chat template."""
    template = tokenizer.template if are_documents_of(data) and not data.template else ""
    return tokenizer.digest + (f" {template}" if template else "")


# ---------------------------------------------------------------- where they come from


class WorldItems(Sequence[Conversation]):
    """The first `size` items of a world, each generated on access."""

    def __init__(self, world: World, size: int, held_out: bool, seed: int = SEED):
        self._world, self._size, self._how = world, size, (held_out, seed)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: int) -> Conversation:
        if not 0 <= i < self._size:
            raise IndexError(i)
        held_out, seed = self._how
        return Conversation(self._world.item(seed, i, held_out), f"world {self._world.name}: item {i}")


def held_out(world: World, size: int, choosing: bool) -> list[Item]:
    """At most `size` held-out items of a world: for checkpoint selection during training (choosing) or for the final evaluation.

    Item i is in slice i % len(world.slices). Up to SCORED items per slice, the two sets are disjoint unless there are too few.
    """
    slices = len(world.slices)
    if world.held_out:
        return one_part([world.item(SEED, i, True) for i in range(world.held_out)], choosing, world.name, slices)[:size]
    if not choosing:
        return [world.item(SEED, i, True) for i in range(size)]
    scored, wanted = _scored(world), math.ceil(size / slices)
    fresh = []
    for first in range(slices):
        items = (world.item(SELECTION_SEED, i, True) for i in range(first, 20 * wanted * slices, slices))
        fresh.append(list(itertools.islice((item for item in items if item.prompt not in scored), wanted)))
    return [item for group in zip(*fresh, strict=False) for item in group][:size]


@functools.cache
def _scored(world: World) -> set:
    """The prompts of the final evaluation."""
    return {world.item(SEED, i, True).prompt for i in range(SCORED * len(world.slices))}


def one_part(items: Sequence[Item], choosing: bool, name: str, group: int = 1) -> list[Item]:
    """One part of a finite set of held-out items: every third for checkpoint selection, the others for the final evaluation.

    group: number of consecutive items that stay together. If there are too few to split, both parts are all items; logged.
    """
    if len(items) < 3 * group:
        say(f"{name}: of {len(items)} held-out item(s) none can be kept apart: those that choose a checkpoint are scored at last")
        return list(items)
    return [item for i, item in enumerate(items) if (i // group % 3 == 2) == choosing]


class AsWritten(Sequence[str]):
    """Conversations as training text for a tokenizer: turns begin with a space, as in our own template."""

    def __init__(self, documents: Sequence[Conversation]):
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, i: int) -> str:
        return "\n".join(f" {m.text}" for m in self._documents[i].item.messages)


def taker(data: DataConfig) -> Callable[[dict, str], Conversation] | None:
    """(record, its location) -> Conversation, raising RunError for a bad record; None if the source has no conversations.

    Raises RunError if data.reader does not exist.
    """
    if not are_documents_of(data):
        return None
    read = _reader(data.reader or "conversations")

    def take(record: dict, where: str) -> Conversation:
        try:
            item = read(record)
        except RunError as e:
            raise data_error(f"{where}: {e}") from None
        texts = [(f"message {n}: content", m.text) for n, m in enumerate(item.messages)]
        for field, text in (*texts, *(("references", r) for r in item.references), ("slice", item.slice)):
            if lone := lone_surrogate(text):
                raise data_error(f"{where}: {field}: not valid Unicode: {lone}; leave it out")
        return Conversation(item, where)

    return take


def _reader(name: str) -> Callable[[dict], Item]:
    if name not in readers.READERS:
        hint = did_you_mean(name, readers.READERS)
        raise RunError(f"config.data.reader={name!r} does not exist{hint}; there are {', '.join(readers.READERS)}")
    return readers.READERS[name]
