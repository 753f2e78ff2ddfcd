"""convert import and export, as a user calls them: imported runs are run folders like any other."""

import dataclasses
import errno
import fcntl

import pytest

from gpt4o_jax.__main__ import main
from gpt4o_jax.errors import RunError
from gpt4o_jax.interop.huggingface import built_beside
from gpt4o_jax.run import open_run
from tests.commands.conftest import FROM_RUN, TEXT


def test_out_and_in_again_then_every_command(train_args, tmp_path, command, refused):
    text = tmp_path / "line.txt"
    text.write_text(TEXT.splitlines()[7])
    run, out, back = (tmp_path / name for name in ("run", "out", "back"))
    llama = ("--config.model.mlp=swiglu", "--config.model.qk_norm=false", "--config.model.output_init=scaled")
    assert main(train_args(run, *llama)) == 0
    said, _ = command("convert", "export", f"--workdir={run}", f"--to={out}")
    assert said["family"] == "llama" and said["step"] == 20
    assert {p.name for p in out.iterdir()} == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model"}
    said, _ = command("convert", "import", f"--from={out}", f"--workdir={back}", "--compute_dtype=float32")
    assert said["family"] == "llama" and said["tensors"] == 12

    one, two = (command("evaluate", f"--workdir={w}", f"--text={text}", "--stride=8")[0] for w in (run, back))
    assert {k: v for k, v in one.items() if k not in ("workdir", "step")} == {
        k: v for k, v in two.items() if k not in ("workdir", "step")
    }
    samples = [
        command("generate", f"--workdir={w}", f"--prompt={TEXT[:9]}", "--max_new_tokens=4")[0]["samples"] for w in (run, back)
    ]
    assert samples[0] == samples[1]
    assert command("verify", f"--workdir={back}")[0]["checkpoints"].keys() == {"0"}
    refused(3, "imported weights have no hold-out, nor", "evaluate", f"--workdir={back}")

    _, err = command(*train_args(tmp_path / "tuned", f"--config={FROM_RUN}:{back}"))  # model and tokenizer come from `back`
    assert f"weights from {back} at step 0" in err
    first, second = (open_run(w) for w in (back, tmp_path / "tuned"))
    assert second.config.model == dataclasses.replace(first.config.model, compute_dtype="float32")
    assert second.tokenizer.digest == first.tokenizer.digest and second.config.init.from_ == str(back)


def test_wrong_usage_is_one_line(run, tmp_path, refused):
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("x")
    refused(2, "--from is missing", "convert", "import", f"--workdir={tmp_path}/w")
    refused(2, "--dtype=int8: expected float32 or bfloat16", "convert", "export", f"--workdir={run}", "--to=x", "--dtype=int8")
    refused(3, "no such folder", "convert", "export", f"--workdir={tmp_path}/none", f"--to={tmp_path}/o")
    fits = "no family fits; the nearest is qwen3, which differs in mlp=relu2 (there: swiglu)"
    refused(2, fits, "convert", "export", f"--workdir={run}", f"--to={tmp_path}/o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("action", ["import", "export", "merge"])
def test_where_no_finished_folder_can_be_put_is_told_before_any_work(tmp_path, refused, monkeypatch, action):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gpt4o_jax.run.open_run", None)
    monkeypatch.setattr("gpt4o_jax.interop.huggingface.import_folder", None)
    args, to = (["--from=x"], "--workdir") if action == "import" else (["--workdir=x"], "--to")
    for place in (".", tmp_path):
        refused(2, f"{to}={place}: the folder you are in", "convert", action, *args, f"{to}={place}")
    told = f"{to}=gs://b/x: an object store; expected a path of this machine"
    refused(2, told, "convert", action, *args, f"{to}=gs://b/x")
    assert not any(tmp_path.iterdir())


def test_a_link_to_an_empty_folder_is_a_target(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    with built_beside(tmp_path / "link", "--to") as beside:
        (beside / "x").touch()
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["x"] and (tmp_path / "link").is_symlink()


def test_of_two_processes_with_one_target_the_second_is_refused(tmp_path):
    target, left = tmp_path / "run", tmp_path / ".run.unfinished.0"
    (left / "folder").mkdir(parents=True)  # left by a killed process
    (left / "file").touch()
    with built_beside(target, "--to") as beside:
        assert not left.exists()
        (beside / "x").touch()
        with pytest.raises(RunError, match=f"--to={target}: in use by another process"), built_beside(target, "--to"):
            pass
        assert (beside / "x").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["run"] and (target / "x").exists()


def test_without_locks_the_first_that_is_finished_stays(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    target = tmp_path / "run"
    with pytest.raises(RunError, match=f"--to={target}: exists already"), built_beside(target, "--to") as late:
        with built_beside(target, "--to") as first:
            (first / "x").touch()
        (late / "y").touch()
    assert [p.name for p in tmp_path.iterdir()] == ["run"] and [p.name for p in target.iterdir()] == ["x"]


@pytest.mark.parametrize("action", ["export", "merge"])
def test_the_help_says_which_checkpoint_is_taken(action, capsys):
    """Both open a run the way every command does."""
    assert main(["convert", action, "--help"]) == 0
    assert "the best, where the run keeps it" in capsys.readouterr().out
