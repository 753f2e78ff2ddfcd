"""evaluate --choice and --tasks, and tasks during training, from the outside."""

import json

import pytest

from gpt4o_jax.__main__ import main
from gpt4o_jax.errors import ExitCode

QUESTIONS = [{"question": f"{i} green", "choices": ["bottles", "red ones", "wall"], "answer": i % 3} for i in range(5)]


@pytest.fixture(scope="module")
def byte_run(train_args, as_on_a_laptop, tmp_path_factory):
    """A finished run that can read any text."""
    workdir = tmp_path_factory.mktemp("runs") / "byte"
    with as_on_a_laptop():
        assert main(train_args(workdir, "--config.tokenizer.kind=byte", "--config.train.length=10 steps")) == 0
    return workdir


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return path


def test_multiple_choice_is_scored(byte_run, questions, command):
    """From a file as some editors write it: with a byte order mark, and a U+2028 that does not end a line of JSON."""
    questions.write_text("\ufeff" + questions.read_text().replace("green", "green\u2028"))
    result, _ = command("evaluate", f"--workdir={byte_run}", f"--choice={questions}", "--num_fewshot=2", "--limit=4")
    assert result["questions"] == 4 and result["chance"] == pytest.approx(1 / 3) and result["num_fewshot"] == 2
    assert {result["accuracy"], result["accuracy_norm"]} <= {i / 4 for i in range(5)}


def test_a_question_of_countless_brackets_is_told_by_line(byte_run, questions, refused):
    questions.write_text(questions.read_text() + "[" * 100_000 + "\n")
    message = "questions.jsonl:6: expected a JSON object with question"
    refused(ExitCode.DATA, message, "evaluate", f"--workdir={byte_run}", f"--choice={questions}")


@pytest.mark.parametrize(
    ("code", "fragment", "args"),
    [
        (ExitCode.USAGE, "--text and --choice: expected one of them", ("--text=a", "--choice=b")),
        (ExitCode.USAGE, "--limit=3 is for --choice or --tasks; give that too, or leave it out", ("--limit=3",)),
        (ExitCode.USAGE, "--num_fewshot=0 is for --choice or --tasks; leave it or --text out", ("--num_fewshot=0", "--text=a")),
        (ExitCode.USAGE, "--task_dir=x is for --tasks", ("--task_dir=x", "--choice=b")),
        (ExitCode.USAGE, "--stride=3 is for --text or the hold-out; leave it or --tasks out", ("--stride=3", "--tasks=b")),
        (ExitCode.USAGE, "--stride=3 is for --text or the hold-out; leave it or --choice out", ("--stride=3", "--choice=b")),
        (ExitCode.DATA, "nowhere.jsonl: cannot read (No such file", ("--choice=nowhere.jsonl",)),
        (ExitCode.DATA, "~nobody_at_all/a.jsonl: cannot read (No such file", ("--choice=~nobody_at_all/a.jsonl",)),
        (ExitCode.USAGE, "--choice=gs://bucket/a: an object store; expected a path", ("--choice=gs://bucket/a",)),
        (ExitCode.USAGE, "--text= is empty, expected text: UTF-8 file", ("--text=",)),
        (ExitCode.USAGE, "--tasks=,: no task in it", ("--tasks=,",)),
        (ExitCode.USAGE, "--task_dir=nowhere: no such folder", ("--tasks=a", "--task_dir=nowhere")),
        (ExitCode.USAGE, "--num_fewshot=2 is for tasks of lm-evaluation-harness", ("--tasks=numbers", "--num_fewshot=2")),
        (ExitCode.USAGE, "--temperature=1.0 is for --tasks; give that too, or leave it out", ("--temperature=1",)),
        (ExitCode.USAGE, "--temperature=1 is for our own tasks, and arc are not", ("--tasks=arc", "--temperature=1")),
        (ExitCode.USAGE, "--temperature=-1: expected a number from 0.0 to 100.0", ("--tasks=numbers", "--temperature=-1")),
        (ExitCode.USAGE, "task holdout: the run was trained on no conversations of files", ("--tasks=holdout",)),
    ],
)
def test_flags_that_do_not_go_together(byte_run, refused, code, fragment, args):
    refused(code, fragment, "evaluate", f"--workdir={byte_run}", *args)


def test_tasks_need_lm_eval(byte_run, refused, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    refused(ExitCode.USAGE, "--tasks=a needs lm-eval", "evaluate", f"--workdir={byte_run}", "--tasks=a")


def test_every_name_is_looked_at_before_anything_is_answered(byte_run, refused, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    monkeypatch.setattr("gpt4o_jax.run.open_run", lambda *_: pytest.fail("a model is opened before the mistake is told"))
    refused(ExitCode.USAGE, "nubmers (did you mean numbers?)", "evaluate", f"--workdir={byte_run}", "--tasks=numbers,nubmers")


def test_worlds_are_scored_and_every_answer_is_kept(byte_run, command):
    result, told = command("evaluate", f"--workdir={byte_run}", "--tasks=translation", "--limit=1")
    scores = result["tasks"]["numbers"]
    assert scores["all"]["exact_match"] == {"value": 0.0, "low": 0.0, "high": 0.0, "items": 6} and len(scores) == 7
    assert "| numbers | all | 6 | exact_match | 0.0 [0.0, 0.0] |" in told
    lines = (byte_run / "evaluations" / "10" / "numbers.jsonl").read_text().splitlines()
    assert len(lines) == 6 and json.loads(lines[0])["prompt"][0]["content"].startswith("Translate into German")
    command("evaluate", f"--workdir={byte_run}", "--tasks=numbers", "--limit=1", "--temperature=0.5")
    assert (byte_run / "evaluations" / "10_temperature_0.5" / "scores.json").exists()


WORLD = (
    "--config.data.source=world", "--config.data.path=numbers", "--config.data.world_items=200", "--config.data.rows=first_fit",
    "--config.tokenizer.kind=byte", "--config.model.context_length=192", "--config.train.length=10 steps",
    "--config.eval.every=10", "--config.eval.tasks=('numbers',)", "--config.eval.task_items=1",
    "--config.checkpoint.best=numbers/exact_match",
    "--config.sample.prompts=('',)",
)  # fmt: skip


def test_tasks_are_scored_while_training_and_stand_in_the_report(train_args, tmp_path, command):
    _, told = command(*train_args(tmp_path / "run", *WORLD, "--config.model.context_length=96"))
    assert told.count("200 conversations are longer than model.context_length=96 and are cut there") == 1
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (scores,) = (r for r in records if r["kind"] == "eval")
    assert scores["numbers/exact_match"] == 0 and scores["numbers/en-de/exact_match"] == 0 and scores["tokens"] > 0
    assert "| numbers/exact_match | 0.0 |" in (tmp_path / "run" / "report.md").read_text()
    assert (tmp_path / "run" / "tasks.png").read_bytes().startswith(b"\x89PNG")
    result, _ = command("evaluate", f"--workdir={tmp_path / 'run'}", "--tasks=numbers", "--limit=1")
    assert "all" in result["tasks"]["numbers"]


@pytest.mark.parametrize(
    ("fragment", "arg"),
    [
        ("task 'nubmers' does not exist (did you mean numbers?)", "--config.eval.tasks=('nubmers',)"),
        (
            "config.checkpoint.best=numbers/exact: no such number (did you mean numbers/exact_match?)",
            "--config.checkpoint.best=numbers/exact",
        ),
        ("world 'nubmers' does not exist (did you mean numbers?)", "--config.data.path=nubmers"),
        (
            "config.checkpoint.best=world:numbers/bits_per_byte: no such number",  # with one source: bits_per_byte
            "--config.checkpoint.best=world:numbers/bits_per_byte",
        ),
    ],
)
def test_names_that_training_does_not_know(train_args, tmp_path, refused, fragment, arg):
    refused(ExitCode.USAGE, fragment, *train_args(tmp_path / "run", *WORLD, arg))
    assert not (tmp_path / "run").exists()


def test_a_member_of_a_mixture_that_is_not_there_is_told_before_anything_is_written(train_args, text, tmp_path, refused, command):
    members = f"('text:{text}=1', 'world:numbers=1')"
    mixed = (*WORLD, "--config.data.source=mixture", "--config.data.path=", f"--config.data.mixture={members}")
    best = "--config.checkpoint.best=world:number/bits_per_byte"
    told = refused(ExitCode.USAGE, "(did you mean world:numbers/bits_per_byte?)", *train_args(tmp_path / "run", *mixed, best))
    assert f"text:{text}/bits_per_byte" in told and not (tmp_path / "run").exists()
    without_tasks = ("--config.eval.tasks=()", "--config.eval.task_items=50")
    command(*train_args(tmp_path / "run", *mixed, best.replace("number/", "numbers/"), *without_tasks))
    _, told = command("evaluate", f"--workdir={tmp_path / 'run'}")
    assert "world:numbers/bits_per_byte chose by this hold-out, so its score is a little too good" in told
