"""The same command again in a run folder: where it continues from, what it changes, and when it must not start."""

import errno
import fcntl
import json
import shutil
import subprocess
import sys

import jax
import pytest
from etils import epath

from gpt4o_jax.__main__ import main
from gpt4o_jax.data.tokenizer import Tokenizer
from gpt4o_jax.errors import ExitCode
from gpt4o_jax.paths import Hold

USAGE, DATA = ExitCode.USAGE, ExitCode.DATA


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run, to continue."""
    return shutil.copytree(run, tmp_path / "copy")


def damage(folder, *steps: int) -> None:
    for step in steps:
        largest = max((folder / "checkpoints" / str(step)).rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
        largest.write_bytes(b"damaged" + largest.read_bytes())


def test_a_run_without_an_intact_checkpoint_never_starts_again_by_itself(train_args, copy, capsys):
    damage(copy, 10, 20)
    before = (copy / "metrics.jsonl").read_bytes()
    for _ in range(3):  # as by a launcher; from the second time on, only names show that there were checkpoints
        assert main(train_args(copy)) == DATA
        assert capsys.readouterr().err.splitlines()[-1].endswith("is intact; remove the folder to start again")
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(train_args, copy, command):
    damage(copy, 20)
    assert "continuing from step 10 of 20" in command(*train_args(copy))[1]
    assert command(*train_args(copy))[0]["step"] == 20, "the damaged one that still lies there keeps nobody from going on"


@pytest.fixture
def killed_start(train_args, tmp_path):
    """The folder of a start that was killed while it wrote its tokenizer."""

    class Killed(BaseException):
        pass

    def save_half(self, folder):
        (folder / "tokenizer.json").write_bytes(b"{")  # of a published tokenizer; the next start makes its own
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Tokenizer, "save_in", save_half)
        main(train_args(tmp_path / "run"))
    return tmp_path / "run"


def test_a_start_killed_before_its_folder_is_whole_is_begun_again(train_args, killed_start, command):
    assert command(*train_args(killed_start))[0]["step"] == 20
    assert not {"tokenizer.json", "config.json.tmp"} & {p.name for p in killed_start.iterdir()}
    assert command("evaluate", f"--workdir={killed_start}")[0]["step"] == 20


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "thesis.tex"])
def test_a_folder_without_config_that_holds_more_than_a_killed_start_is_left_alone(train_args, killed_start, refused, name):
    (killed_start / name).touch()
    before = sorted(killed_start.iterdir())
    refused(USAGE, "not empty and no run folder", *train_args(killed_start))
    assert sorted(killed_start.iterdir()) == before


def test_a_killed_start_whose_next_one_cannot_write_leaves_an_empty_folder(train_args, killed_start, refused, monkeypatch):
    def full(self, folder):
        (folder / "tokenizer.model").write_bytes(b"{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Tokenizer, "save_in", full)
    refused(ExitCode.STORAGE, "cannot write (No space left on device)", *train_args(killed_start))
    assert not any(killed_start.iterdir())


def test_a_run_that_another_process_began_and_left_while_this_one_prepared_its_text_is_continued(
    train_args, copy, tmp_path, command, monkeypatch
):
    from gpt4o_jax.data import corpus

    workdir, prepare = tmp_path / "run", corpus.prepare

    def slowly(*args):
        if not workdir.exists():
            shutil.copytree(copy, workdir)
        return prepare(*args)

    monkeypatch.setattr(corpus, "prepare", slowly)
    before = (copy / "metrics.jsonl").read_bytes()
    assert command(*train_args(workdir))[0]["step"] == 20
    assert (workdir / "metrics.jsonl").read_bytes().startswith(before)


# ---------------------------------------------------------------- two trainings in one folder


def test_a_folder_in_which_another_process_trains_is_left_alone_until_that_has_ended(train_args, copy, refused, command):
    shutil.rmtree(copy / "checkpoints" / "20")
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    script = (
        "import sys; from etils import epath; from gpt4o_jax.paths import Hold\n"
        "hold = Hold(); hold.take(epath.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script, str(copy)], **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        refused(USAGE, f"--workdir={copy}: in use by another process", *train_args(copy))
        assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before
        other.kill()
    assert command(*train_args(copy))[0]["step"] == 20


def test_two_trainings_that_both_find_no_folder(train_args, tmp_path, refused, monkeypatch):
    """The other process has created it by the time the text is tokenised."""
    from gpt4o_jax.data import corpus

    workdir, prepare = tmp_path / "run", corpus.prepare
    with Hold() as other:

        def slowly(*args):
            workdir.mkdir()
            other.take(epath.Path(workdir))
            return prepare(*args)

        monkeypatch.setattr(corpus, "prepare", slowly)
        refused(USAGE, "in use by another process", *train_args(workdir))
    assert not any(workdir.iterdir())


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP])
def test_where_folders_cannot_be_locked_training_goes_on(train_args, copy, command, monkeypatch, error):
    def flock(*_):
        raise OSError(error, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert command(*train_args(copy))[0]["step"] == 20


# ---------------------------------------------------------------- what the continuing command changes


def test_what_may_change_is_what_config_json_says_afterwards(train_args, copy, text, tmp_path, command, refused):
    shutil.rmtree(copy / "checkpoints" / "20")
    moved = shutil.copy(text, tmp_path / "moved.txt")
    (tmp_path / "other.txt").write_text(text.read_text().replace("green", "nereg"))
    before = json.loads((copy / "config.json").read_text())
    refused(DATA, "the run was trained on corpus", *train_args(copy, f"--config.data.path={tmp_path}/other.txt"))
    assert json.loads((copy / "config.json").read_text()) == before
    command(*train_args(copy, f"--config.data.path={moved}", "--config.eval.batch_size=3"))
    after = json.loads((copy / "config.json").read_text())
    assert (after["data"]["path"], after["eval"]["batch_size"]) == (str(moved), 3)
    for section, name in (("data", "path"), ("eval", "batch_size")):
        after[section][name] = before[section][name]
    assert command("evaluate", f"--workdir={copy}")[0]["text"] == "holdout"
    assert after == before and not (copy / "config.json.tmp").exists()


def test_a_profile_is_of_steps_that_are_still_to_come(train_args, copy, command, capsys, monkeypatch):
    traced = []
    monkeypatch.setattr(jax.profiler, "start_trace", traced.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    shutil.rmtree(copy / "checkpoints" / "20")
    refused_at = "gpt4o_jax: train: --profile=2:10: the run goes on from step 10; end after it"
    assert main(train_args(copy, "--profile=2:10")) == USAGE and not traced
    assert capsys.readouterr().err.splitlines()[-1] == refused_at
    _, told = command(*train_args(copy, "--profile=2:15"))
    assert f"profile of steps 11 to 20 in {copy / 'profile'}" in told and len(traced) == 1


def test_a_profile_that_cannot_be_written_costs_nothing_else(train_args, copy, command, monkeypatch):
    def lost():
        raise jax.errors.JaxRuntimeError("FAILED_PRECONDITION: Could not resolve host\n when reading gs://bucket")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lost)
    shutil.rmtree(copy / "checkpoints" / "20")
    report, told = command(*train_args(copy, "--profile=10:15"))
    assert report["step"] == 20
    assert told.count(f"the profile of steps 11 to 20 cannot be written to {copy / 'profile'}: FAILED_PRECONDITION") == 1
