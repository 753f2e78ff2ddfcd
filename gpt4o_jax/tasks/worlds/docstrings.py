"""Real text: the body of a docstring, summarised by the line that its author began it with.

Uses documents that begin with a sentence on its own line, an empty line, and a body. The body, cut at the end of a line to
fit a small model's context, is the text to summarise; the sentence is the answer. Held out: the documents that the caller
holds out of its text, so that no model has read them. No target: `lead` is the baseline to compare with.
"""

import re
from collections.abc import Sequence

from gpt4o_jax.errors import data_error
from gpt4o_jax.tasks.item import Item, ask_to_summarise, exchange
from gpt4o_jax.tasks.worlds.world import World

NAME = "docstrings"
_LONGEST = 400  # characters of a body
_DOCUMENT = re.compile(r"(?P<summary>[A-Z][^\n]{18,110}\.)\n[ \t]*\n(?P<body>.{60,})", re.DOTALL)


def world(training: Sequence[str], held_out: Sequence[str]) -> World:
    """The world over these documents, in their order, repeating. Raises RunError if a part has no suitable document."""
    asked = pairs(held_out)
    known = {summary for _, summary in asked}  # not to be trained on in another document
    parts = {False: [pair for pair in pairs(training) if pair[1] not in known], True: asked}
    for held_out, found in parts.items():
        if not found:
            kind = "held-out" if held_out else "training"
            raise data_error(
                f"world {NAME}: no {kind} document begins with a sentence and goes on; try another data.holdout_fraction"
            )

    def item(seed: int, index: int, held_out: bool) -> Item:
        body, summary = parts[held_out][(index + 7919 * seed) % len(parts[held_out])]
        return exchange(ask_to_summarise(body), (summary,), NAME)

    return World(NAME, item, (NAME,), ("rouge_l", "rouge_1", "rouge_2"), len(asked))


def pairs(documents: Sequence[str]) -> list[tuple[str, str]]:
    """(body, summary) of the documents that have both; no summary twice, and none that its body contains."""
    found = {}
    for match in filter(None, map(_DOCUMENT.match, documents)):
        body = match["body"]
        if len(body) > _LONGEST:
            body = body[: _LONGEST + 1].rpartition("\n")[0] or body[:_LONGEST]
        found.setdefault(match["summary"], body.strip())
    return [(body, summary) for summary, body in found.items() if summary not in body]


def lead(item: Item) -> str:
    """The baseline for summaries: the first words of the text, as many as the reference has."""
    text = item.prompt[-1].text.removeprefix(ask_to_summarise(""))
    return " ".join(text.split()[: len(item.references[0].split())])
