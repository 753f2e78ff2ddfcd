"""Records of published datasets as items: the features of TFDS, or the same fields from JSON; other fields are ignored.

    squad             squad/v1.1, squad/v2.0   context, question, answers {text: [...]}; empty: the question has no answer
    de-en, en-ro ...  wmt14_translate, ...     one text per language (or both in a field "translation")
    translation       the same                 from the other language into English
    cnn_dailymail     cnn_dailymail            article, highlights
    xsum              xsum                     document, summary
    samsum            samsum                   dialogue, summary
    billsum           billsum                  text, summary
    conversations     chat datasets            messages [{role, content}, ...], optionally references, slice; no tools

Each reader raises RunError that names the field, what it contains, and what is expected.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from gpt4o_jax.errors import RunError, data_error
from gpt4o_jax.tasks.chat import read_messages
from gpt4o_jax.tasks.item import LANGUAGES, NO_ANSWER, Item, ask_about, ask_to_summarise, ask_to_translate, exchange

Record = Mapping[str, Any]


def _squad(record: Record) -> Item:
    """Answers as an object of lists (TFDS), or as a list of objects. Slices: answerable, unanswerable."""
    passage, question = _text(record, "context"), _text(record, "question")
    stored = _field(record, "answers")
    if isinstance(stored, list):
        stored = {"text": [_field(answer, "text", f"answers[{n}]") for n, answer in enumerate(stored)]}
    texts = _field(stored, "text", "answers")
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise data_error(f"answers.text: got {texts!r:.40}, expected a list of texts")
    answers = tuple(dict.fromkeys(t.strip() for t in texts if t.strip()))
    asked = ask_about(passage, question)
    if not answers:
        return exchange(asked, (NO_ANSWER,), "unanswerable")
    return exchange(asked, answers, "answerable", {"answerable": True})


def _translate(record: Record, source: str, target: str) -> Item:
    pair = _field(record, "translation") if "translation" in record else record
    texts = _text(pair, source), _text(pair, target)
    return exchange(ask_to_translate(texts[0], target), (texts[1],), f"{source}-{target}")


def _into_english(record: Record) -> Item:
    pair = _field(record, "translation") if "translation" in record else record
    sources = [code for code in LANGUAGES if code != "en" and isinstance(pair, Mapping) and code in pair]
    if len(sources) != 1:
        found = ", ".join(pair) if isinstance(pair, Mapping) else repr(pair)
        raise data_error(f"got the fields {found:.80}, expected en and one of {', '.join(c for c in LANGUAGES if c != 'en')}")
    return _translate(record, sources[0], "en")


def _summarise(record: Record, name: str, document: str, summary: str) -> Item:
    return exchange(ask_to_summarise(_text(record, document)), (_text(record, summary),), name)


def _conversation(record: Record) -> Item:
    """{"messages": [{"role": ..., "content": ...}, ...]}, optionally "references", a list of acceptable answers instead of the
    last message, and "slice". Raises RunError that names the field.
    """
    stored = record.get("messages")
    if isinstance(stored, Mapping):  # as TFDS stores a sequence of turns
        columns = {name: list(column) for name, column in stored.items()}
        if len(set(map(len, columns.values()))) > 1:
            raise data_error(f"messages: got columns of lengths {', '.join(f'{len(c)} ({n})' for n, c in columns.items())}")
        stored = [dict(zip(columns, turn, strict=True)) for turn in zip(*columns.values(), strict=True)]
    for name in ("tools", "functions"):
        if record.get(name):
            raise data_error(f"{name}: no template here writes them; put them into a system message, as text")
    if not isinstance(stored, list) or not stored:
        keys = ", ".join(map(repr, list(record)[:8])) or "no keys"
        raise data_error(f"messages: expected a list of turns, got {stored!r:.40} (there are {keys})")
    try:
        messages = tuple(read_messages(stored))
    except RunError as e:
        raise data_error(f"messages: {e}") from None
    last = messages[-1]
    if last.role != "assistant":
        pair = "; chosen and rejected make preference pairs, for training by DPO alone" if "chosen" in record else ""
        raise data_error(f"messages: the last is of role {last.role}, expected assistant: its words are what is learned{pair}")
    references, row = record.get("references", [last.text]), record.get("slice", "")
    if not isinstance(references, list) or not references or not all(isinstance(r, str) for r in references):
        raise data_error(f"references: expected a list of texts, got {references!r:.40}")
    if not isinstance(row, str):
        raise data_error(f"slice: expected a text, got {row!r:.40}")
    if row == "all":
        raise data_error("slice: 'all' is the row of all items in tables of scores; expected another name")
    return Item(messages, tuple(references), row)


def _field(record: Any, name: str, where: str = "") -> Any:
    place = f"{where}.{name}" if where else name
    if not isinstance(record, Mapping):
        raise data_error(f"{where or 'record'}: got {record!r:.40}, expected an object with the field {name!r}")
    if name not in record:
        raise data_error(f"{place}: missing (there are {', '.join(map(str, list(record)[:8])) or 'no fields'})")
    return record[name]


def _text(record: Any, name: str) -> str:
    """A text that is not blank, stripped."""
    text = _field(record, name)
    if not isinstance(text, str) or not text.strip():
        raise data_error(f"{name}: got {text!r:.40}, expected a text that is not blank")
    return text.strip()


_PAIRS = [pair for code in LANGUAGES if code != "en" for pair in ((code, "en"), ("en", code))]
_SUMMARIES = {
    "cnn_dailymail": ("article", "highlights"),
    "xsum": ("document", "summary"),
    "samsum": ("dialogue", "summary"),
    "billsum": ("text", "summary"),
}
READERS: dict[str, Callable[[Record], Item]] = {
    "conversations": _conversation,
    "squad": _squad,
    "translation": _into_english,
    **{f"{a}-{b}": functools.partial(_translate, source=a, target=b) for a, b in _PAIRS},
    **{name: functools.partial(_summarise, name=name, document=d, summary=s) for name, (d, s) in _SUMMARIES.items()},
}

# The metrics (tasks/metrics.py) for the items of each reader, the leading one first.
METRICS = {
    "conversations": ("exact_match", "chrf"),
    "squad": ("squad_f1", "squad_em", "unanswerable_f1"),
    **{name: ("bleu", "chrf") for name in ("translation", *(f"{a}-{b}" for a, b in _PAIRS))},
    **{name: ("rouge_l", "rouge_1", "rouge_2") for name in ("xsum", "samsum", "billsum")},
    "cnn_dailymail": ("rouge_lsum", "rouge_1", "rouge_2"),  # one highlight per line
}
