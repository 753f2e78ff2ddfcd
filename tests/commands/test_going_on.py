"""The same command again in the folder of a run: what it goes on from, what it changes, and when it must not begin."""

import shutil

import pytest

from gpt4o_jax.__main__ import main
from gpt4o_jax.errors import ExitCode

USAGE, DATA = ExitCode.USAGE, ExitCode.DATA


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run, to go on with."""
    return shutil.copytree(run, tmp_path / "copy")


def damage(folder, *steps: int) -> None:
    for step in steps:
        largest = max((folder / "checkpoints" / str(step)).rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
        largest.write_bytes(b"damaged" + largest.read_bytes())


def test_a_run_without_an_intact_checkpoint_never_starts_again_by_itself(train_args, copy, capsys):
    damage(copy, 10, 20)
    before = (copy / "metrics.jsonl").read_bytes()
    for _ in range(3):  # by a launcher, say; from the second time on only names tell that there were checkpoints
        assert main(train_args(copy)) == DATA
        assert capsys.readouterr().err.splitlines()[-1].endswith("is intact; remove the folder to start again")
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(train_args, copy, command):
    damage(copy, 20)
    assert "continuing from step 10 of 20" in command(*train_args(copy))[1]
    assert command(*train_args(copy))[0]["step"] == 20, "the damaged one that still lies there keeps nobody from going on"
