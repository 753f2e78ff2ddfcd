"""Task answers are those of greedy decoding of each prompt alone, scored by slice; tasks are found by name."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from gpt4o_jax import parallel, task_report
from gpt4o_jax.config import DataConfig, ModelConfig
from gpt4o_jax.data import conversations, sources
from gpt4o_jax.data.tokenizer import byte_tokenizer
from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.evaluation import generation
from gpt4o_jax.evaluation.generation import Task
from gpt4o_jax.finetuning.pairs import of_world
from gpt4o_jax.model import gpt
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.sampling.settings import Sampling
from gpt4o_jax.tasks import metrics
from gpt4o_jax.tasks.chat import say, template
from gpt4o_jax.tasks.item import Item, exchange
from gpt4o_jax.tasks.worlds import APPLICATIONS, WORLDS

TOKENIZER, OWN = byte_tokenizer(), template("own")
CONFIG = ModelConfig(vocab_size=288, context_length=64, n_layers=2, d_model=32, n_heads=2, compute_dtype="float32")
MODEL = gpt.GPT(CONFIG, Compute("cpu", "float32"))
QUESTIONS = ["a", "what?", "a longer question than that", "é", "x" * 80]  # the last one does not fit
ITEMS = [exchange(q, ("yes" * (1 + n % 2), "no"), f"slice {n % 2}") for n, q in enumerate(QUESTIONS)]


def refusal(call, *args, code=ExitCode.USAGE) -> str:
    with pytest.raises(RunError) as e:
        call(*args)
    assert e.value.code == code and "\n" not in str(e.value)
    return str(e.value)


@pytest.fixture(scope="module", autouse=True)
def params():
    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        yield jax.tree.map(lambda x: 3 * x, gpt.init(MODEL, jax.random.key(0)))


# ---------------------------------------------------------------- answers


def alone(params, item) -> str:
    """The text after bos, user, question, end, assistant, up to the end of the turn, decoded alone."""
    special = TOKENIZER.special
    prompt = [
        1,
        special("<|user|>"),
        *TOKENIZER.encode(item.prompt[0].text),
        special("<|end_of_turn|>"),
        special("<|assistant|>"),
    ]
    most = 2 * max(len(r) for r in item.references) + 8
    if len(prompt) >= CONFIG.context_length:
        return ""
    ids = []
    while len(ids) < min(most, CONFIG.context_length - len(prompt)):
        tokens = np.array([prompt + ids])
        index = np.arange(tokens.shape[1])[None]
        hidden, _, _ = MODEL.apply({"params": params}, tokens, index, np.ones_like(index))
        logits = np.array(gpt.unembed(MODEL, params, hidden)[0, -1], np.float64)
        ends = [2, special("<|end_of_turn|>")]
        logits[[i for i in range(32) if i not in ends]] = -np.inf
        if logits.argmax() in ends:
            break
        ids.append(int(logits.argmax()))
    return OWN.said(TOKENIZER.decode(ids))


@pytest.mark.parametrize("batch_size", [2, 16])
def test_answers_are_those_of_each_prompt_alone(params, batch_size):
    said = generation.answer(MODEL, params, TOKENIZER, OWN, ITEMS, batch_size)
    assert said == [*(alone(params, item) for item in ITEMS[:-1]), generation.TOO_LONG]
    assert all(said)


def test_drawn_answers_are_a_function_of_the_seed(params):
    drawn = lambda seed: generation.answer(MODEL, params, TOKENIZER, OWN, ITEMS, 2, Sampling(temperature=3.0), seed)
    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0)[-1] == generation.TOO_LONG


# ---------------------------------------------------------------- scores


def answering(monkeypatch, right):
    """Replaces the model by one that gives item.answer if right(item), else a wrong answer."""
    monkeypatch.setattr(generation, "answer", lambda *a: [i.answer if right(i) else "?" for i in a[4]])


def test_scores_of_a_world_by_slice(monkeypatch):
    (task,) = generation.tasks(["numbers"], DataConfig(), 5)
    assert [i.slice for i in task.items] == list(WORLDS["numbers"].slices) * 5
    assert list(task.items) == [WORLDS["numbers"].item(0, i, True) for i in range(30)], "held-out items"
    answering(monkeypatch, lambda item: item.slice != "en-de")
    found = generation.evaluate(None, None, None, None, [task], 8)
    assert found["numbers/exact_match"] == pytest.approx(100 * 5 / 6) and found["numbers/en-de/exact_match"] == 0
    assert found["numbers/de-en/exact_match"] == 100
    assert list(found) == generation.numbers([task])


@pytest.mark.parametrize("name", sources.WORLD_NAMES)
def test_every_world_has_scores_of_every_slice_and_pictures(tmp_path, monkeypatch, name):
    (task,) = generation.tasks([name], DataConfig(), 3)
    answering(monkeypatch, lambda item: True)
    found = generation.evaluate(None, None, None, None, [task], 8)
    assert list(found) == generation.numbers([task]) and list(found.values()) == pytest.approx([100] * len(found))
    answered = task_report.Answered(
        task, [i.answer for i in task.items], metrics.table(task.metrics, [i.answer for i in task.items], task.items)
    )
    task_report.save(epath.Path(tmp_path), [answered])
    rows = [line.split(" | ")[1] for line in (tmp_path / "scores.md").read_text().splitlines()[2:]]
    assert set(rows) == {*(item.slice for item in task.items), "all"}


@pytest.mark.parametrize("name", sources.WORLD_NAMES)
def test_no_item_of_the_last_evaluation_chooses_a_checkpoint(name):
    asked = lambda items: {i.prompt for i in items}
    (last,), (choosing,) = (generation.tasks([name], DataConfig(), n, c) for n, c in ((200, False), (50, True)))
    assert not asked(last.items) & asked(choosing.items)
    assert min(len(choosing.items), len(last.items)) >= 25
    world = sources.world(name)
    by_slice = [world.slices[i % len(world.slices)] for i in range(len(choosing.items))]
    assert [i.slice for i in choosing.items] == by_slice
    bits = [d.item for d in sources.apart(DataConfig(source="world", path=name))]
    assert bits and not asked(last.items) & asked(bits), "nor those whose bits are counted while training"
    pairs = [{p.prompt for p in of_world(world, 40, True, choosing)} for choosing in (False, True)]
    assert pairs[0] and pairs[1] and not pairs[0] & pairs[1]


def test_too_few_items_to_keep_some_apart_are_told(capsys):
    assert conversations.one_part(ITEMS[:2], True, "task holdout") == ITEMS[:2]
    assert "task holdout: of 2 held-out item(s) none can be kept apart" in capsys.readouterr().err
    assert conversations.one_part(ITEMS, True, "") == [ITEMS[2]] and not capsys.readouterr().err


def test_answers_and_scores_are_saved_side_by_side(tmp_path, monkeypatch):
    items = [*ITEMS[:3], Item((say("system", "s"), say("user", "u"), say("assistant", "yes")), ("yes",), "slice 1", {"json": 1})]
    task = Task("mine", items, ("exact_match", "json_right", "bleu"))
    said = ["yes", "no", "wrong", "1"]
    answered = task_report.Answered(task, said, metrics.table(task.metrics, said, items))
    task_report.save(epath.Path(tmp_path / "out"), [answered])
    lines = [json.loads(line) for line in (tmp_path / "out" / "mine.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == said and [line["exact_match"] for line in lines] == [100, 100, 0, 0]
    assert ["json_right" in line for line in lines] == [False, False, False, True] and lines[3]["json_right"] == 100
    assert lines[3]["prompt"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["mine"]
    assert scores["all"]["exact_match"]["value"] == 50 and scores["slice 1"]["exact_match"]["items"] == 2
    assert "| mine | all | 4 | exact_match | 50.0 [" in (tmp_path / "out" / "scores.md").read_text()
    assert (tmp_path / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- available tasks


def test_an_application_is_its_worlds():
    for name, worlds in APPLICATIONS.items():
        assert [t.name for t in generation.tasks([name, *worlds], DataConfig(), 1)] == list(worlds)


@pytest.mark.parametrize("reader", ["", "holdout_path"])
def test_held_out_conversations_are_a_task(tmp_path, reader):
    write = lambda path, n, more: path.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]} | more)
            + "\n"
            for i in range(n)
        )
    )
    write(tmp_path / "x", 200, {})
    write(tmp_path / "y", 20, {"references": ["one", "two"], "slice": "s"})
    data = DataConfig(source="conversations", path=str(tmp_path / "x"), holdout_path=str(tmp_path / "y") if reader else "")
    (task,) = generation.tasks(["holdout"], data, 7)
    if reader:
        assert len(task.items) == 7 and task.items[0].references == ("one", "two") and task.items[0].slice == "s"
        held = [d.item for d in sources.apart(data)]
    else:
        held = [d.item for d in sources.split(sources.load(data), data)[1]]
    assert list(task.items) == [item for i, item in enumerate(held[:21]) if i % 3 < 2][:7]
    (choosing,) = generation.tasks(["holdout"], data, 7, choosing=True)
    assert list(choosing.items) == held[:21][2::3], "every third chooses checkpoints, and is not scored at last"


def test_tasks_that_cannot_be():
    tasks = lambda *names: generation.tasks(names, DataConfig(), 1)
    assert "task 'nubmers' does not exist (did you mean numbers?); there are" in refusal(tasks, "nubmers")
    assert "task holdout: the run was trained on no conversations of files" in refusal(tasks, "holdout")


def test_a_missing_library_is_told_before_anything_is_answered(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics", None)
    monkeypatch.setitem(metrics.METRICS, "chrf", metrics._sacrebleu("CHRF"))
    assert "pip install -r requirements-eval.txt" in refusal(lambda: generation.tasks(["numbers"], DataConfig(), 1))
