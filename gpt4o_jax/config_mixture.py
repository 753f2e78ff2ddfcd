"""The syntax of data.mixture's members: SOURCE:PATH=WEIGHT.

    python_docs=0.7   text:notes/=1   jsonl:web/*.jsonl@body=2.5   tfds:wiki40b/en:train[:90%]=0.1
    world:numbers=0.5   conversations:chats.jsonl=1   tfds:squad:train@reader:squad=1

Weights are relative. For one member, @FIELD overrides data.field, and @reader:NAME data.reader.
"""

from fractions import Fraction
from typing import NamedTuple

from gpt4o_jax.errors import RunError, did_you_mean

SOURCES = ("python_docs", "text", "jsonl", "parquet", "tfds", "conversations", "world")
READER = "reader:"  # @reader:NAME: the member is read as with data.reader=NAME


class Member(NamedTuple):
    source: str
    path: str
    field: str  # a field, or READER and a reader's name; empty: the config's
    weight: Fraction


def parse(entry: str) -> Member:
    """One entry of data.mixture. Raises RunError."""
    where = f"config.data.mixture: {entry!r}"
    named, equals, weight_text = entry.rpartition("=")
    if not equals:
        raise RunError(f"{where} has no weight; expected SOURCE:PATH=WEIGHT, for example python_docs=0.7 or text:notes/=0.3")
    try:
        weight = float(weight_text)
        if not 1e-9 <= weight <= 1e9:
            raise ValueError
    except ValueError:
        raise RunError(f"{where}: weight {weight_text!r}, expected a number from 1e-9 to 1e9") from None
    source, _, path = named.strip().partition(":")
    if source not in SOURCES:
        hint = did_you_mean(source, SOURCES)
        raise RunError(f"{where}: unknown source {source!r}{hint}; expected SOURCE:PATH=WEIGHT with one of {', '.join(SOURCES)}")
    field = ""
    if source in ("jsonl", "parquet", "tfds") and "@" in path.rpartition("/")[2]:
        path, _, field = path.rpartition("@")
        if not field.removeprefix(READER):
            raise RunError(f"{where}: nothing after @; expected the name of a field, or reader:NAME, or no @")
    if bool(path) != (source != "python_docs"):
        wanted = {"python_docs": "python_docs=WEIGHT, without a path", "tfds": "tfds:NAME/CONFIG:SPLIT=WEIGHT"}
        wanted["world"] = "world:NAME=WEIGHT"
        raise RunError(f"{where}: expected {wanted.get(source, f'{source}:PATH=WEIGHT')}")
    return Member(source, path, field, Fraction(weight_text.strip()))


def parse_all(entries: tuple[str, ...], field: str) -> list[Member]:
    """The members of data.mixture; field: data.field. Raises RunError, also if a text occurs twice."""
    members = [parse(e) for e in entries]
    texts = [(m.source, m.path, m.field or field) for m in members]
    for i, text in enumerate(texts):
        if text in texts[:i]:
            raise RunError(f"config.data.mixture: {entries[i]!r} names a member that is there already; add the weights up")
    return members
