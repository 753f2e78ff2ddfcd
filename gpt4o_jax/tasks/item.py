"""Items for training and evaluation: a conversation whose last turn is the answer, and what makes an answer right.

The three prompt formats are here too, so that synthetic worlds and real datasets ask alike.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gpt4o_jax.tasks.chat import Message, say

NO_ANSWER = "unknown"  # answer to an unanswerable question; short, or most learned tokens would be refusals
LANGUAGES = {
    "cs": "Czech", "de": "German", "en": "English", "es": "Spanish", "fi": "Finnish", "fr": "French", "hi": "Hindi",
    "ro": "Romanian", "ru": "Russian", "tr": "Turkish",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Item:
    """messages: a conversation; the last message is the assistant's answer, which is scored.

    references: acceptable answers. slice: its row in tables of scores. checks: data for scorers that need more than a text
    ("json": the value that an answer must encode, "key": the strings that it must contain, "answerable": see tasks/squad.py).
    """

    messages: tuple[Message, ...]
    references: tuple[str, ...]
    slice: str
    checks: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1].text


def exchange(question: str, references: tuple[str, ...], slice: str, checks: Mapping[str, Any] | None = None) -> Item:
    """An item with one question, answered with the first reference."""
    return Item((say("user", question), say("assistant", references[0])), references, slice, checks or {})


def conversation(passage: str, asked: Mapping[str, str], slice: str) -> Item:
    """An item with questions and answers about one passage; the last answer is scored."""
    turns = [message for question, answer in asked.items() for message in (say("user", question), say("assistant", answer))]
    turns[0] = say("user", ask_about(passage, turns[0].text))
    return Item(tuple(turns), (turns[-1].text,), slice)


def ask_about(passage: str, question: str) -> str:
    return f"{passage}\n{question}"


def ask_to_translate(text: str, language: str) -> str:
    return f"Translate into {LANGUAGES[language]}: {text}"


def ask_to_summarise(text: str) -> str:
    return f"Summarise:\n{text}"
