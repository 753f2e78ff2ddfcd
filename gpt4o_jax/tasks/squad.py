"""Exact match and F1 of SQuAD 2.0, by the rules of its official script (arXiv:1806.03822).

Texts are compared in lower case, without ASCII punctuation and without a, an and the; F1 counts common words. Refusing
(NO_ANSWER, or an empty answer) is right exactly where the question has no answer.
"""

import collections
import re
import string

from gpt4o_jax.tasks.item import NO_ANSWER, Item

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split())


def unanswerable(item: Item) -> bool:
    return refuses(item.answer)


def refuses(text: str) -> bool:
    return normalize(text) in ("", normalize(NO_ANSWER))


def exact_match(prediction: str, item: Item) -> float:
    """1.0 where the prediction is one of the answers."""
    return max(float(_said(prediction) == gold) for gold in _answers(item))


def f1(prediction: str, item: Item) -> float:
    """Of common words, the best over the answers."""
    return max(_f1(_said(prediction).split(), gold.split()) for gold in _answers(item))


def _said(text: str) -> str:
    return "" if refuses(text) else normalize(text)


def _answers(item: Item) -> set[str]:
    """As the official script: answers of which nothing is left count only where there are no others."""
    return {_said(r) for r in item.references if not refuses(r)} or {""}


def _f1(said: list[str], gold: list[str]) -> float:
    if not said or not gold:
        return float(said == gold)
    common = (collections.Counter(said) & collections.Counter(gold)).total()
    return 2 * common / (len(said) + len(gold))
