"""Metrics equal their reference libraries on a thousand random cases, singly and together, including empty and Unicode ones;
SQuAD's equal its official rules, reimplemented here; what cannot be scored is a one-line error.
"""

import json
import math
import random
import re
import string

import jiwer
import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from gpt4o_jax.errors import RunError
from gpt4o_jax.tasks import metrics
from gpt4o_jax.tasks.item import NO_ANSWER, Item, exchange

WORDS = [
    "the",
    "a",
    "cat",
    "Katze",
    "mat.",
    "über",
    "日本",
    "sat",
    "sitting",
    "naïve",
    "☃",
    "An",
    "12",
    "don't",
    "—",
    "and",
    "it",
]


def texts(n, seed, longest=9):
    """Random sentences: some empty, some blank, some of several lines."""
    rng = random.Random(seed)
    some = lambda: rng.choice([" ", " ", " ", "  ", "\n"]).join(rng.choices(WORDS, k=rng.randint(0, longest)))
    return [rng.choice(["", " "]) if rng.random() < 0.05 else some() for _ in range(n)]


def changed(text, rng):
    """A prediction: the same text, or with words dropped, doubled or replaced."""
    words = text.split(" ")
    for _ in range(rng.randrange(4)):
        i = rng.randrange(len(words))
        words[i : i + 1] = rng.choice([[], [words[i]] * 2, [rng.choice(WORDS)]]) or [""]
    return " ".join(words)


def made(n=1000, several=True):
    rng = random.Random(1)
    items, predictions = [], []
    for first, second, third in zip(texts(n, 2), texts(n, 3), texts(n, 4), strict=True):
        references = (first, second, third)[: rng.randint(1, 3) if several else 1]
        items.append(exchange("?", references, rng.choice("xyz")))
        predictions.append(changed(rng.choice(references), rng))
    return predictions, items


PREDICTIONS, ITEMS = made()
SINGLE_PREDICTIONS, SINGLE = made(several=False)


def value(name, predictions, items):
    return metrics.score(name, predictions, items, resamples=1).value


# ---------------------------------------------------------------- reference libraries


@pytest.mark.parametrize(("name", "kind"), [("bleu", sacrebleu.BLEU), ("chrf", sacrebleu.CHRF)])
def test_translation_scores_are_those_of_sacrebleu(name, kind):
    streams = [[i.references[n] if n < len(i.references) else None for i in ITEMS] for n in range(3)]
    assert value(name, PREDICTIONS, ITEMS) == pytest.approx(kind().corpus_score(PREDICTIONS, streams).score, abs=1e-9)
    one_by_one = [kind().corpus_score([p], [[r] for r in i.references]).score for p, i in zip(PREDICTIONS, ITEMS, strict=True)]
    assert metrics.each(name, PREDICTIONS, ITEMS) == pytest.approx(one_by_one, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "kind"), [("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL"), ("rouge_lsum", "rougeLsum")]
)
def test_summary_scores_are_those_of_rouge_score(name, kind):
    scorer = rouge_scorer.RougeScorer([kind], use_stemmer=True)
    best = lambda p, i: 100 * max(scorer.score(r, p)[kind].fmeasure for r in i.references)
    expected = [best(p, i) for p, i in zip(PREDICTIONS, ITEMS, strict=True)]
    assert metrics.each(name, PREDICTIONS, ITEMS) == pytest.approx(expected, abs=1e-9)
    assert value(name, PREDICTIONS, ITEMS) == pytest.approx(np.mean(expected), abs=1e-9)


@pytest.mark.parametrize(("name", "rate"), [("wer", jiwer.wer), ("cer", jiwer.cer)])
def test_error_rates_are_those_of_jiwer(name, rate):
    references = [i.references[0] for i in SINGLE]
    assert value(name, SINGLE_PREDICTIONS, SINGLE) == pytest.approx(100 * rate(references, SINGLE_PREDICTIONS), abs=1e-9)
    one_by_one = [100 * rate(r, p) for r, p in zip(references, SINGLE_PREDICTIONS, strict=True)]
    assert metrics.each(name, SINGLE_PREDICTIONS, SINGLE) == pytest.approx(one_by_one, abs=1e-9)


# ---------------------------------------------------------------- SQuAD


def official(text):
    """The rules in their published order, character by character and word by word."""
    kept = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def squad_reference(prediction, answers):
    """(exact match, F1); an empty answer means none."""
    gold = [official(a) for a in answers if official(a)] or [[]]
    said, pairs = official(prediction), []
    for words in gold:
        left, common = list(words), 0
        for w in said:
            if w in left:
                left.remove(w)
                common += 1
        if not said or not words:
            pairs.append((said == words, float(said == words)))
        elif common == 0:
            pairs.append((False, 0.0))
        else:
            precision, recall = common / len(said), common / len(words)
            pairs.append((said == words, 2 * precision * recall / (precision + recall)))
    return tuple(100 * max(column) for column in zip(*pairs, strict=True))


def test_question_scores_follow_squads_rules():
    expected = [squad_reference(p, i.references) for p, i in zip(PREDICTIONS, ITEMS, strict=True)]
    for name, column in zip(("squad_em", "squad_f1"), zip(*expected, strict=True), strict=True):
        assert metrics.each(name, PREDICTIONS, ITEMS) == pytest.approx(column, abs=1e-9)
        assert value(name, PREDICTIONS, ITEMS) == pytest.approx(np.mean(column), abs=1e-9)


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1"),
    [
        ("The Cat!", ("cat",), 100, 100),
        ("a big cat", ("cat",), 0, 200 / 3),
        ("dog", ("cat", "the dog"), 100, 100),
        (NO_ANSWER, (NO_ANSWER,), 100, 100),
        ("", (NO_ANSWER,), 100, 100),
        (NO_ANSWER, ("text",), 0, 0),
        ("The text", (NO_ANSWER,), 0, 0),
    ],
)
def test_answers_and_refusals_by_example(prediction, answers, em, f1):
    items = [exchange("?", answers, "s")]
    assert value("squad_em", [prediction], items) == em and value("squad_f1", [prediction], items) == pytest.approx(f1)


def test_f1_of_refusals_counts_both_mistakes():
    rng = random.Random(0)
    items = [exchange("?", (rng.choice([NO_ANSWER, "cat"]),), "s") for _ in range(1000)]
    predictions = [rng.choice([NO_ANSWER, "dog", "", "cat"]) for _ in items]
    said, true = ([t in ("", NO_ANSWER) for t in column] for column in (predictions, [i.answer for i in items]))
    hits = sum(s and t for s, t in zip(said, true, strict=True))
    precision, recall = hits / sum(said), hits / sum(true)
    assert value("unanswerable_f1", predictions, items) == pytest.approx(200 * precision * recall / (precision + recall))


def test_the_word_of_refusals_may_be_an_answer_where_there_is_one():
    """As in the official script, which has no such word: only an item without an answer is unanswerable."""
    answerable = lambda *answers: exchange("?", answers, "answerable", {"answerable": True})
    rng = random.Random(2)
    words = [NO_ANSWER, f"the {NO_ANSWER}!", "John", "cat", f"an {NO_ANSWER} cat"]
    items = [answerable(*rng.choices(words, k=rng.randint(1, 3))) for _ in range(1000)]
    predictions = [rng.choice(i.references) if rng.random() < 0.5 else rng.choice(words[2:]) for i in items]
    expected = [squad_reference(p, i.references) for p, i in zip(predictions, items, strict=True)]
    for name, column in zip(("squad_em", "squad_f1"), zip(*expected, strict=True), strict=True):
        assert metrics.each(name, predictions, items) == pytest.approx(column, abs=1e-9)
    assert value("squad_f1", [NO_ANSWER], [answerable(f"an {NO_ANSWER} cat")]) == 0, "a refusal, which shares a word by chance"
    with pytest.raises(RunError, match="metric unanswerable_f1: none of 1000 items is an unanswerable question; leave the me"):
        value("unanswerable_f1", predictions, items)
    mixed = [answerable(NO_ANSWER), exchange("?", (NO_ANSWER,), "unanswerable")]
    assert value("unanswerable_f1", [NO_ANSWER] * 2, mixed) == 100


# ---------------------------------------------------------------- exact scores


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ('{"name": "f", "arguments": {"x": 1, "y": "ü"}}', True),
        ('\n{"arguments":{"y":"\\u00fc","x":1},"name":"f"} ', True),
        ('{"name": "f", "arguments": {"x": 1.0, "y": "ü"}}', False),
        ('{"name": "f", "arguments": {"x": true, "y": "ü"}}', False),
        ('{"name": "f", "arguments": {"x": NaN, "y": "ü"}}', None),
        ('{"name": "f", "arguments": {"x": 1, "y": "ü"}', None),
        ('{"name": "f", "arguments": {"x": 1, "y": "ü"}} ok', None),
        ("[" * 100_000, None),
        ("", None),
    ],
)
def test_json_is_valid_and_right(prediction, right):
    items = [exchange("?", ("x",), "s", {"json": {"name": "f", "arguments": {"x": 1, "y": "ü"}}})]
    assert value("json_valid", [prediction], items) == 100 * (right is not None)
    assert value("json_right", [prediction], items) == 100 * bool(right)


def test_key_content_is_counted_in_whole_words():
    items = [exchange("?", ("x",), "s", {"key": ("Paris", "12", "3 to 1")})]
    assert value("key_content", ["In Paris it was 12, and 3 to 1."], items) == 100
    assert value("key_content", ["In Parise it was 112, and 3 to 10."], items) == 0


def test_exact_match_takes_any_reference_and_no_other_text():
    items = [exchange("?", ("a", "b"), "s")] * 4
    assert metrics.each("exact_match", ["b", " a\n", "A", "a b"], items) == [100, 100, 0, 0]


# ---------------------------------------------------------------- intervals and tables


def test_intervals_are_those_of_drawing_the_items_again():
    """For k right out of n, the quantiles of a binomial distribution."""
    items = [exchange("?", ("a",), "s")] * 400
    found = metrics.score("exact_match", ["a"] * 360 + ["b"] * 40, items, resamples=4000)
    half = 1.96 * math.sqrt(0.9 * 0.1 / 400) * 100
    assert found.value == 90 and (found.low, found.high) == pytest.approx((90 - half, 90 + half), abs=0.6)
    assert found == metrics.score("exact_match", ["a"] * 360 + ["b"] * 40, items, resamples=4000)


@pytest.mark.parametrize("name", ["bleu", "chrf", "wer"])
def test_corpus_scores_are_resampled_as_a_whole(name):
    """Each draw is the corpus score of the drawn items, not a mean of item scores."""
    found = metrics.score(name, SINGLE_PREDICTIONS[:60], SINGLE[:60], resamples=200)
    rng, values = np.random.default_rng(0), []
    for _ in range(200):
        chosen = rng.integers(60, size=60)
        values.append(value(name, [SINGLE_PREDICTIONS[i] for i in chosen], [SINGLE[i] for i in chosen]))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, (0.025, 0.975))))


def test_a_table_has_a_row_for_each_slice_and_one_for_all():
    json_items = [exchange("?", ("{}",), "call", {"json": {}}), exchange("?", (NO_ANSWER,), "answer")]
    rows = metrics.table(["exact_match", "json_right", "unanswerable_f1"], ["{}", "x"], json_items)
    assert {r: {m: s.value for m, s in row.items()} for r, row in rows.items()} == {
        "call": {"exact_match": 100, "json_right": 100},
        "answer": {"exact_match": 0},
        "all": {"exact_match": 50, "json_right": 100, "unanswerable_f1": pytest.approx(200 / 3)},  # no word is left of "{}"
    }


# ---------------------------------------------------------------- what cannot be scored

BARE = Item(exchange("?", ("a",), "s").messages, (), "s")


@pytest.mark.parametrize(
    ("call", "fragment"),
    [
        (lambda: metrics.score("blue", ["a"], ITEMS[:1]), "metric 'blue' (did you mean bleu?); expected one of"),
        (lambda: metrics.score("bleu", [], []), "0 predictions for 0 items"),
        (lambda: metrics.table(["bleu"], [], []), "0 predictions for 0 items"),
        (lambda: metrics.score("bleu", ["a"], ITEMS[:2]), "1 predictions for 2 items"),
        (lambda: metrics.score("exact_match", ["a"], [BARE]), "item 0 (slice s) has no references"),
        (lambda: metrics.table(["json_right"], ["a"], ITEMS[:1]), "metric json_right"),
        (lambda: metrics.score("key_content", ["a"], ITEMS[:1]), "has no key"),
    ],
)
def test_what_cannot_be_scored_is_told(call, fragment):
    with pytest.raises(RunError) as e:
        call()
    assert fragment in str(e.value)


@pytest.mark.parametrize("name", sorted(metrics.METRICS))
@pytest.mark.parametrize(("prediction", "reference"), [("", ""), ("", "a"), ("a", ""), ("☃", "!")])
def test_scores_are_numbers_whatever_is_empty(name, prediction, reference):
    items = [exchange("?", (reference or " ",), "s", {"json": json.loads("{}"), "key": ("a",)})] * 2
    found = metrics.score(name, [prediction] * 2, items, resamples=5)
    assert all(map(math.isfinite, (found.value, found.low, found.high)))


def test_without_the_library_the_install_command_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(RunError, match=r"pip install -r requirements-eval\.txt"):
        metrics.score("rouge_l", ["a"], ITEMS[:1])
