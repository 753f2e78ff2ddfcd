"""Dataset records become items like those of worlds, from TFDS's feature specs or from the same fields in JSON; for a broken
record the message names the field.
"""

import importlib
import json

import numpy as np
import pytest

from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.tasks import metrics
from gpt4o_jax.tasks.item import NO_ANSWER
from gpt4o_jax.tasks.readers import METRICS, READERS

SQUAD = {
    "id": "1",
    "title": "T",
    "context": " Ann lives in Rome.\n",
    "question": "Where?",
    "answers": {"text": ["Rome"], "answer_start": [13]},
}
NONE = {**SQUAD, "answers": {"text": [], "answer_start": []}, "is_impossible": True}
CASES = [
    ("squad", SQUAD, "Ann lives in Rome.\nWhere?", ("Rome",), "answerable"),
    ("squad", {**SQUAD, "answers": {"text": ["Rome", " Rome", "in Rome"]}}, "Ann lives in Rome.\nWhere?", ("Rome", "in Rome"),
     "answerable"),
    ("squad", {**SQUAD, "answers": [{"text": "Rome", "answer_start": 13}]}, "Ann lives in Rome.\nWhere?", ("Rome",),
     "answerable"),
    ("squad", NONE, "Ann lives in Rome.\nWhere?", (NO_ANSWER,), "unanswerable"),
    ("squad", {**SQUAD, "answers": []}, "Ann lives in Rome.\nWhere?", (NO_ANSWER,), "unanswerable"),
    ("de-en", {"de": "Ja.", "en": "Yes."}, "Translate into English: Ja.", ("Yes.",), "de-en"),
    ("en-de", {"de": "Ja.", "en": "Yes."}, "Translate into German: Yes.", ("Ja.",), "en-de"),
    ("translation", {"en": "Yes.", "ro": "Da."}, "Translate into English: Da.", ("Yes.",), "ro-en"),
    ("ro-en", {"translation": {"en": "Yes.", "ro": "Da."}}, "Translate into English: Da.", ("Yes.",), "ro-en"),
    ("cnn_dailymail", {"article": "Long.", "highlights": "A.\nB.", "id": "1", "publisher": "c"},
     "Summarise:\nLong.", ("A.\nB.",), "cnn_dailymail"),
    ("xsum", {"document": "Long.", "summary": "Short."}, "Summarise:\nLong.", ("Short.",), "xsum"),
    ("samsum", {"dialogue": "A: Hi!\r\nB: Hi.", "summary": "They greet.", "id": "1"},
     "Summarise:\nA: Hi!\r\nB: Hi.", ("They greet.",), "samsum"),
    ("billsum", {"text": "Long.", "summary": "Short.", "title": "T"}, "Summarise:\nLong.", ("Short.",), "billsum"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "record", "asked", "answers", "slice"), CASES)
def test_records_become_questions_and_answers(name, record, asked, answers, slice):
    item = READERS[name](json.loads(json.dumps(record)))
    assert [m.role for m in item.messages] == ["user", "assistant"]
    assert (item.prompt[0].text, item.references, item.answer, item.slice) == (asked, answers, answers[0], slice)


@pytest.mark.parametrize("name", READERS)
def test_every_reader_has_metrics_that_exist(name):
    assert set(METRICS[name]) <= metrics.METRICS.keys() and METRICS.keys() == READERS.keys()


@pytest.mark.parametrize(
    ("dataset", "reader"),
    [("squad/v1.1", "squad"), ("squad/v2.0", "squad"), ("wmt14_translate/de-en", "de-en"),
     ("wmt16_translate/ro-en", "translation"), ("cnn_dailymail", "cnn_dailymail"), ("xsum", "xsum"),
     ("samsum", "samsum"), ("billsum", "billsum")],
)  # fmt: skip
def test_readers_take_what_the_feature_specs_of_tfds_decode_to(dataset, reader, tmp_path):
    """A record made from the builder's own spec, serialised and read back as in array_record."""
    for part in ("text", "translate", "summarization", "question_answering"):  # registered only on import
        importlib.import_module(f"tensorflow_datasets.{part}")
    import tensorflow_datasets as tfds

    features = tfds.builder(dataset, data_dir=str(tmp_path)).info.features
    record = features.deserialize_example_np(features.serialize_example(example(features)))
    item = READERS[reader](plain(record))
    assert "text of" in item.prompt[0].text and "text of" in item.answer


def test_conversations_are_the_same_from_tfds_and_from_json():
    """TFDS stores a sequence of turns as a column of roles and a column of texts."""
    import tensorflow_datasets as tfds

    f = tfds.features
    features = f.FeaturesDict({"messages": f.Sequence({"role": f.Text(), "content": f.Text()}), "slice": f.Text()})
    turns = [("system", "Be brief."), ("user", "Ja?"), ("assistant", "Ja.")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns], "slice": "talk"}
    decoded = plain(features.deserialize_example_np(features.serialize_example(record)))
    assert decoded["messages"] == dict(role=[r for r, _ in turns], content=[t for _, t in turns])
    item = READERS["conversations"](decoded)
    assert item == READERS["conversations"](record) and [(m.role, m.text) for m in item.messages] == turns
    assert (item.references, item.slice) == (("Ja.",), "talk")


def example(feature, name=""):
    """A value for every feature."""
    if type(feature).__name__ == "Sequence":
        return [example(feature.feature, name)] * 2
    if hasattr(feature, "keys"):
        return {key: example(feature[key], key) for key in feature}
    return {"O": f"text of {name}", "b": True}.get(np.dtype(feature.np_dtype).kind, 3)


def plain(value):
    """Bytes as text and arrays as lists, as data/prepared.py returns records."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value
    return [plain(v) for v in value] if isinstance(value, list) else value.decode() if isinstance(value, bytes) else value


@pytest.mark.parametrize(
    ("name", "record", "fragment"),
    [
        ("squad", {}, "context: missing (there are no fields)"),
        ("squad", {**SQUAD, "question": 3}, "question: got 3, expected a text that is not blank"),
        ("squad", {**SQUAD, "context": " "}, "context: got ' ', expected a text that is not blank"),
        ("squad", {**SQUAD, "answers": "Rome"}, "answers: got 'Rome', expected an object with the field 'text'"),
        ("squad", {**SQUAD, "answers": [{"start": 1}]}, "answers[0].text: missing (there are start)"),
        ("squad", {**SQUAD, "answers": {"text": "Rome"}}, "answers.text: got 'Rome', expected a list of texts"),
        ("de-en", {"de": "Ja.", "fr": "Oui."}, "en: missing (there are de, fr)"),
        ("translation", {"text": "Ja."}, "got the fields text, expected en and one of cs, de"),
        ("translation", {"translation": "Ja."}, "expected en and one of"),
        ("xsum", {"document": "x", "summary": None}, "summary: got None, expected a text"),
        ("conversations", {"messages": {"role": ["user"], "content": []}}, "columns of lengths 1 (role), 0 (content)"),
        ("billsum", ["x"], "record: got ['x'], expected an object with the field 'text'"),
    ],
)
def test_broken_records_are_told_by_field(name, record, fragment):
    with pytest.raises(RunError) as e:
        READERS[name](record)
    assert e.value.code == ExitCode.DATA and fragment in str(e.value)
