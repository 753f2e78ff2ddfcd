"""Adapter runs as a user has them: several over one base, small, resumed bit for bit, merged, and never on another base."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from gpt4o_jax.__main__ import main
from gpt4o_jax.checkpoint.store import Store
from gpt4o_jax.errors import ExitCode
from gpt4o_jax.run import open_run
from tests.commands.conftest import FROM_RUN

USAGE, DATA = ExitCode.USAGE, ExitCode.DATA


@pytest.fixture(scope="session")
def adapted_args(train_args, run):
    def arguments(workdir, *more: str, base=run) -> list[str]:
        knobs = {"lora.rank": 2, "lora.targets": "('*/attention/*',)", "optimizer.peak_lr": 0.03, "optimizer.warmup_steps": 0}
        return train_args(workdir, f"--config={FROM_RUN}:{base}", *(f"--config.{k}={v}" for k, v in knobs.items()), *more)

    return arguments


@pytest.fixture(scope="session")
def adapted(adapted_args, as_on_a_laptop, tmp_path_factory):
    """A finished adapter run over `run`; the tests only read it."""
    workdir = tmp_path_factory.mktemp("adapted") / "one"
    with as_on_a_laptop():
        assert main(adapted_args(workdir)) == 0
    return workdir


def parameters(workdir) -> dict:
    return open_run(workdir).params


def test_a_checkpoint_holds_adapters_and_the_name_of_their_base(adapted, run):
    store = Store(adapted / "checkpoints")
    folder = store.path(20)
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"params", "opt_state", "counters"}
    stored = store.meta(20)["base"]
    assert (stored["folder"], stored["step"]) == (str(run), 20)
    size = lambda path: sum(p.stat().st_size for p in Path(path).rglob("*") if p.is_file())
    assert size(folder) < size(Store(run / "checkpoints").path(20))
    base, merged = parameters(run), parameters(adapted)
    changed = {name: bool(np.any(base["layers"]["attention"][name] != x)) for name, x in merged["layers"]["attention"].items()}
    assert changed == {name: name in ("query", "key", "value", "output") for name in changed}
    np.testing.assert_array_equal(merged["layers"]["mlp"]["up"], base["layers"]["mlp"]["up"])


def test_every_command_takes_them_and_merged_they_say_the_same(adapted, run, adapted_args, tmp_path, command, refused):
    other, merged = tmp_path / "other", tmp_path / "merged"
    assert main(adapted_args(other, "--config.seed=5")) == 0  # another over the same base
    scores = {w: command("evaluate", f"--workdir={w}")[0]["loss"] for w in (run, adapted, other)}
    assert scores[adapted] < scores[run] and scores[other] < scores[run] and scores[adapted] != scores[other]
    said, _ = command("convert", "merge", f"--workdir={adapted}", f"--to={merged}")
    assert said["rank"] == 2 and said["step"] == 20
    assert abs(command("evaluate", f"--workdir={merged}")[0]["loss"] - scores[adapted]) < 1e-6
    text = lambda w: command("generate", f"--workdir={w}", "--prompt=3 gr", "--max_new_tokens=6")[0]["samples"]
    assert text(adapted) == text(merged)
    assert command("verify", f"--workdir={merged}")[0]["checkpoints"].keys() == {"20"}
    refused(USAGE, "has no adapters", "convert", "merge", f"--workdir={merged}", f"--to={tmp_path}/again")
    refused(USAGE, "exists already", "convert", "merge", f"--workdir={adapted}", f"--to={merged}")
    assert main(adapted_args(tmp_path / "upon", base=merged)) == 0  # a merged run is a base like any other


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(adapted, adapted_args, tmp_path):
    workdir = shutil.copytree(adapted, tmp_path / "cut")
    shutil.rmtree(workdir / "checkpoints" / "20")
    assert main(adapted_args(workdir)) == 0
    got, wanted = (Store(w / "checkpoints") for w in (workdir, adapted))
    assert got.meta(20)["base"] == wanted.meta(20)["base"]
    for a, b in zip(*(map(np.asarray, leaves(w)) for w in (workdir, adapted)), strict=True):
        np.testing.assert_array_equal(a, b)


def leaves(workdir) -> list:
    import jax

    return jax.tree.leaves(parameters(workdir))


def test_base_and_adapters_may_move_together(adapted, run, tmp_path, command):
    for folder in (adapted, run):
        shutil.copytree(folder, tmp_path / folder.name)
    config = tmp_path / adapted.name / "config.json"
    config.write_text(config.read_text().replace(str(run), f"/nowhere/{run.name}"))
    here, there = (command("evaluate", f"--workdir={w}")[0]["loss"] for w in (tmp_path / adapted.name, adapted))
    assert here == there


@pytest.mark.parametrize("action", ["evaluate", "generate", "train"])
def test_on_another_base_nothing_starts(adapted, run, adapted_args, train_args, tmp_path, refused, action):
    """If the base was trained again or is gone, one line says what is missing."""
    workdir, base = shutil.copytree(adapted, tmp_path / "mine"), tmp_path / "base"
    config = workdir / "config.json"
    config.write_text(config.read_text().replace(str(run), str(base)))
    call = {"train": adapted_args(workdir, base=base), "generate": ["generate", f"--workdir={workdir}", "--prompt=a"]}
    call = call.get(action, [action, f"--workdir={workdir}"])
    whose = f"its adapters belong to the weights of {run} at step 20"
    if action != "train":  # train reads the config of the base first
        refused(DATA, whose, *call)
    assert main(train_args(base, "--config.seed=3", "--config.log.every=20")) == 0
    refused(DATA, f"and those of {base} are others", *call)
    shutil.rmtree(base / "checkpoints" / "20")
    refused(DATA, f"and {base} has 10; put that checkpoint back", *call)


def test_mistakes_are_told_before_anything_is_written(adapted, adapted_args, train_args, tmp_path, refused):
    new = tmp_path / "new"
    refused(USAGE, "config.lora.rank=4: adapters belong to the weights of a run", *train_args(new, "--config.lora.rank=4"))
    refused(USAGE, "'*/q' matches no weight that can have an adapter", *adapted_args(new, "--config.lora.targets=('*/q',)"))
    refused(USAGE, "config.lora.targets=(): expected at least one pattern", *adapted_args(new, "--config.lora.targets=()"))
    refused(DATA, "convert merge --workdir=", *train_args(new, f"--config={FROM_RUN}:{adapted}"))
    refused(USAGE, "this run has lora.rank=2, the command asks for 4", *adapted_args(adapted, "--config.lora.rank=4"))
    assert not new.exists()
