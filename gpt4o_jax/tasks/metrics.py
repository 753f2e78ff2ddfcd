"""Scores of predictions: each metric by its reference library, with a bootstrap interval, in tables by slice.

Every score is a number from 0 to 100 (error rates can be higher); what cannot be scored is an error, never nan. A metric
reduces each item to a few counts and scores their sum, so that corpus-level metrics (BLEU, chrF, F1, error rates) are
resampled as exactly as means. Arrays: N items, K counts.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpt4o_jax.errors import RunError, data_error, did_you_mean
from gpt4o_jax.tasks import squad
from gpt4o_jax.tasks.item import Item


@dataclasses.dataclass(frozen=True)
class Metric:
    """counts: (predictions, items) -> counts_NK. value: their sum over items -> the score.

    needs: what an item must have to be scored. of_slices: whether single slices can be scored. one_must: (name, test) of a
    property that at least one item must have for the score to be meaningful.
    """

    counts: Callable[[Sequence[str], Sequence[Item]], np.ndarray]
    value: Callable[[np.ndarray], float]
    needs: str = "references"
    of_slices: bool = True
    one_must: tuple[str, Callable[[Item], bool]] = ("", lambda item: True)


@dataclasses.dataclass(frozen=True)
class Score:
    """A score and its 95 % bootstrap interval (items resampled with replacement)."""

    value: float
    low: float
    high: float
    items: int

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


# ---------------------------------------------------------------- scores


def score(name: str, predictions: Sequence[str], items: Sequence[Item], resamples: int = 1000) -> Score:
    """The score over all items. predictions: one per item.

    Raises RunError for an unknown metric, no items, and items that it cannot score.
    """
    metric = lookup(name)
    if not items or len(predictions) != len(items):
        raise data_error(
            f"metric {name}: {len(predictions)} predictions for {len(items)} items; expected one of each, at least one"
        )
    for n, item in enumerate(items):
        if not _has(item, metric.needs):
            raise data_error(
                f"metric {name}: item {n} (slice {item.slice}) has no {metric.needs}; leave the metric or the item out"
            )
    if not tells(name, items):
        raise data_error(f"metric {name}: none of {len(items)} items is {metric.one_must[0]}; leave the metric out")
    counts_NK = metric.counts(predictions, items)
    rng = np.random.default_rng(0)
    drawn = [metric.value(counts_NK[rng.integers(len(items), size=len(items))].sum(axis=0)) for _ in range(resamples)]
    value, (low, high) = metric.value(counts_NK.sum(axis=0)), np.quantile(drawn, (0.025, 0.975))
    if not np.isfinite([value, low, high]).all():
        raise data_error(
            f"metric {name}: {value} over {len(items)} items is no score; the references hold nothing to compare with"
        )
    return Score(float(value), float(low), float(high), len(items))


def each(name: str, predictions: Sequence[str], items: Sequence[Item]) -> list[float]:
    """The score of each item alone, to show beside its text. Raises RunError for items that it cannot score."""
    metric = lookup(name)
    for n, item in enumerate(items):
        if not _has(item, metric.needs):
            raise data_error(f"metric {name}: item {n} (slice {item.slice}) has no {metric.needs}; leave it out")
    return [float(metric.value(counts_K)) for counts_K in metric.counts(predictions, items)]


def can_score(name: str, item: Item) -> bool:
    """Whether an item has what the metric needs."""
    return _has(item, lookup(name).needs)


def tells(name: str, items: Sequence[Item]) -> bool:
    """Whether the score over these items is meaningful."""
    return any(map(lookup(name).one_must[1], items))


def table(
    names: Sequence[str], predictions: Sequence[str], items: Sequence[Item], resamples: int = 1000
) -> dict[str, dict[str, Score]]:
    """Slice -> metric -> score, with the row "all" last. A row has the metrics that its items can be scored by.

    Raises RunError if there are no items, or none that a metric can score.
    """
    rows: dict[str, dict[str, Score]] = {item.slice: {} for item in items if item.slice} | {"all": {}}
    for name in names:
        metric = lookup(name)
        able = [(p, i) for p, i in zip(predictions, items, strict=True) if _has(i, metric.needs)]
        for row in rows if metric.of_slices else ("all",):
            chosen = [(p, i) for p, i in able if row in ("all", i.slice)]
            if chosen or row == "all":
                rows[row][name] = score(name, [p for p, _ in chosen], [i for _, i in chosen], resamples)
    return rows


def lookup(name: str) -> Metric:
    """The metric of that name. Raises RunError if there is none."""
    if name not in METRICS:
        raise RunError(f"metric {name!r}{did_you_mean(name, METRICS)}; expected one of {', '.join(METRICS)}")
    return METRICS[name]


def _has(item: Item, what: str) -> bool:
    return bool(item.references) if what == "references" else what in item.checks


# ---------------------------------------------------------------- means over items


def _mean(of_one: Callable[[str, Item], float], needs: str = "references") -> Metric:
    """The mean of a score from 0 to 1 per item, in percent."""

    def counts(predictions: Sequence[str], items: Sequence[Item]) -> np.ndarray:
        return np.array([(of_one(p, i), 1.0) for p, i in zip(predictions, items, strict=True)])

    return Metric(counts, lambda s: 100 * s[0] / s[1], needs)


def _exact_match(prediction: str, item: Item) -> float:
    return float(prediction.strip() in {r.strip() for r in item.references})


def _json(prediction: str) -> tuple[bool, Any]:
    """(whether it is JSON, the value). NaN and Infinity are not JSON."""
    try:
        return True, json.loads(prediction, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False, None


def _refuse_constant(name: str):
    raise ValueError(name)


def _json_right(prediction: str, item: Item) -> float:
    """1 for the value that was asked for, with keys in any order; 1, 1.0 and true are different values."""
    spelled = functools.partial(json.dumps, sort_keys=True)
    valid, value = _json(prediction)
    return float(valid and spelled(value) == spelled(item.checks["json"]))


def _key_content(prediction: str, item: Item) -> float:
    """Share of the required strings that occur as whole words."""
    return float(np.mean([bool(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", prediction)) for text in item.checks["key"]]))


def _rouge(kind: str) -> Metric:
    """F1 of rouge-score with stemming, as published; for English, since its words consist of a-z and 0-9 only."""

    def counts(predictions: Sequence[str], items: Sequence[Item]) -> np.ndarray:
        scorer = _library("rouge_score.rouge_scorer").RougeScorer([kind], use_stemmer=True)
        pairs = zip(predictions, items, strict=True)
        return np.array([(scorer.score_multi(i.references, p)[kind].fmeasure, 1.0) for p, i in pairs])

    return Metric(counts, lambda s: 100 * s[0] / s[1])


# ---------------------------------------------------------------- scores of a whole corpus


def _sacrebleu(kind: str) -> Metric:
    """BLEU or CHRF of sacrebleu with its defaults, from its own counts, which its significance tests resample too."""

    @functools.cache
    def scorer():
        return getattr(_library("sacrebleu.metrics"), kind)()

    def counts(predictions: Sequence[str], items: Sequence[Item]) -> np.ndarray:
        most = max(len(i.references) for i in items)
        streams = [[i.references[n] if n < len(i.references) else None for i in items] for n in range(most)]
        return np.array(scorer()._extract_corpus_statistics(predictions, streams), float)

    return Metric(counts, lambda s: scorer()._compute_score_from_stats(s.tolist()).score)


def _error_rate(unit: str) -> Metric:
    """jiwer's word or character error rate: edits / reference length; of several references, the one with fewest edits."""

    def counts(predictions: Sequence[str], items: Sequence[Item]) -> np.ndarray:
        process = getattr(_library("jiwer"), f"process_{unit}")

        def best(prediction: str, item: Item) -> tuple[float, float]:
            found = [process(r, prediction) for r in item.references]
            return min((o.substitutions + o.deletions + o.insertions, o.hits + o.substitutions + o.deletions) for o in found)

        return np.array([best(p, i) for p, i in zip(predictions, items, strict=True)], float)

    return Metric(counts, lambda s: 100 * s[0] / max(s[1], 1))  # if the references are empty: the number of edits, as in jiwer


def _refusals(predictions: Sequence[str], items: Sequence[Item]) -> np.ndarray:
    """Counts [N, 2] of F1: true positives; predicted plus actual positives (refusals plus unanswerable questions)."""
    pairs = [(squad.refused(p, i), squad.unanswerable(i)) for p, i in zip(predictions, items, strict=True)]
    return np.array([(said and true, said + true) for said, true in pairs], float)


def _library(name: str):
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise RunError(f"metrics need {e.name or name}, which is not installed: pip install -r requirements-eval.txt") from None


METRICS = {
    "exact_match": _mean(_exact_match),
    "bleu": _sacrebleu("BLEU"),
    "chrf": _sacrebleu("CHRF"),
    "rouge_1": _rouge("rouge1"),
    "rouge_2": _rouge("rouge2"),
    "rouge_l": _rouge("rougeL"),
    "rouge_lsum": _rouge("rougeLsum"),  # for summaries with one sentence per line
    "squad_em": _mean(squad.exact_match),
    "squad_f1": _mean(squad.f1),
    "unanswerable_f1": Metric(  # F1 of detecting questions without an answer
        _refusals,
        lambda s: 200 * s[0] / s[1] if s[1] else 100.0,  # none in the resample and none refused: no mistake
        of_slices=False,
        one_must=("an unanswerable question", squad.unanswerable),
    ),
    "wer": _error_rate("words"),
    "cer": _error_rate("characters"),
    "json_valid": _mean(lambda prediction, _: float(_json(prediction)[0]), "json"),
    "json_right": _mean(_json_right, "json"),
    "key_content": _mean(_key_content, "key"),
}
