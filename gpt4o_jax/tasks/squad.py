"""Exact match and F1 of SQuAD 2.0, by the rules of its official script (arXiv:1806.03822).

Texts are compared in lower case, without ASCII punctuation and without a, an and the; F1 counts common words. Refusing
(NO_ANSWER, or an empty answer) is right exactly if the question has no answer. An item known to have one (checks
"answerable") may have the word NO_ANSWER among its answers, where it is then not a refusal.
"""

import collections
import re
import string

from gpt4o_jax.tasks.item import NO_ANSWER, Item

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """In lower case, without punctuation and articles, words separated by single spaces."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split())


def unanswerable(item: Item) -> bool:
    """Whether the question of the item has no answer."""
    return not item.checks.get("answerable") and _empty(item.answer)


def refused(prediction: str, item: Item) -> bool:
    """Whether the prediction refuses to answer."""
    return _empty(prediction) and normalize(prediction) not in _answers(item) - {""}


def exact_match(prediction: str, item: Item) -> float:
    """1.0 if the prediction is one of the answers, else 0.0."""
    return float(_said(prediction, item) in _answers(item))


def f1(prediction: str, item: Item) -> float:
    """F1 of common words, 0 to 1, the best over the answers."""
    return max(_f1(_said(prediction, item).split(), gold.split()) for gold in _answers(item))


def _empty(text: str) -> bool:
    return normalize(text) in ("", normalize(NO_ANSWER))


def _said(prediction: str, item: Item) -> str:
    """The normalized prediction; a refusal becomes the empty text."""
    return "" if refused(prediction, item) else normalize(prediction)


def _answers(item: Item) -> set[str]:
    """The normalized answers. As in the official script, empty ones count only if there are no others."""
    word = set() if item.checks.get("answerable") else {normalize(NO_ANSWER)}
    return {normalize(r) for r in item.references} - {""} - word or {""}


def _f1(said: list[str], gold: list[str]) -> float:
    if not said or not gold:
        return float(said == gold)
    common = (collections.Counter(said) & collections.Counter(gold)).total()
    return 2 * common / (len(said) + len(gold))
