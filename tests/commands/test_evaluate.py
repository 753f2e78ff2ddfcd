"""evaluate --choice and --tasks from the outside."""

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
    result, _ = command("evaluate", f"--workdir={byte_run}", f"--choice={questions}", "--num_fewshot=2", "--limit=4")
    assert result["questions"] == 4 and result["chance"] == pytest.approx(1 / 3) and result["num_fewshot"] == 2
    assert {result["accuracy"], result["accuracy_norm"]} <= {i / 4 for i in range(5)}


@pytest.mark.parametrize(
    ("code", "fragment", "args"),
    [
        (ExitCode.USAGE, "--text and --choice: expected one of them", ("--text=a", "--choice=b")),
        (ExitCode.USAGE, "--limit=3 is for --choice or --tasks", ("--limit=3",)),
        (ExitCode.USAGE, "--num_fewshot=0 is for --choice or --tasks", ("--num_fewshot=0", "--text=a")),
        (ExitCode.USAGE, "--task_dir=x is for --tasks", ("--task_dir=x", "--choice=b")),
        (ExitCode.USAGE, "--stride=3 is for --text", ("--stride=3", "--tasks=b")),
        (ExitCode.DATA, "nowhere.jsonl: cannot read (No such file", ("--choice=nowhere.jsonl",)),
        (ExitCode.USAGE, "--task_dir=nowhere: no such folder", ("--tasks=a", "--task_dir=nowhere")),
    ],
)
def test_flags_that_do_not_go_together(byte_run, refused, code, fragment, args):
    refused(code, fragment, "evaluate", f"--workdir={byte_run}", *args)


def test_tasks_need_lm_eval(byte_run, refused, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    refused(ExitCode.USAGE, "--tasks needs lm-eval", "evaluate", f"--workdir={byte_run}", "--tasks=a")
