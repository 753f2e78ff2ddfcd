"""DPO and GRPO as a user starts them: from a run that answers, to a run like any other, resumed bit for bit."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

from gpt4o_jax.__main__ import main
from gpt4o_jax.checkpoint import manifest
from gpt4o_jax.checkpoint.store import Store
from gpt4o_jax.errors import ExitCode
from gpt4o_jax.finetuning import preference
from gpt4o_jax.run import open_run
from tests.commands.conftest import FROM_RUN

CONFIGS = {"dpo": FROM_RUN.with_name("preference.py"), "grpo": FROM_RUN.with_name("reinforced.py")}

USAGE, DATA = ExitCode.USAGE, ExitCode.DATA
WORLD = (
    "--config.data.source=world",
    "--config.data.path=numbers",
    "--config.data.world_items=400",
)  # enough for all letters of the numbers
WORLD += ("--config.model.context_length=256", "--config.sample.prompts=('a',)")


@pytest.fixture(scope="session")
def taught(train_args, as_on_a_laptop, tmp_path_factory):
    """A run trained on conversations, from which the others start."""
    workdir = tmp_path_factory.mktemp("taught") / "run"
    with as_on_a_laptop():
        assert main(train_args(workdir, *WORLD, "--config.data.rows=first_fit")) == 0
    return workdir


@pytest.fixture(scope="session")
def tuned_args(train_args, taught):
    def arguments(workdir, method: str, *more: str, base=taught) -> list[str]:
        knobs = {"method": method, "beta": 0.1} | ({"group": 2, "answer_tokens": 6} if method == "grpo" else {})
        knobs |= {} if "--config.data.source=conversations" in more else {"held_out": 12}
        knobs = [f"--config.objective.{k}={v}" for k, v in knobs.items()]
        rates = ("--config.optimizer.peak_lr=0.01", "--config.optimizer.warmup_steps=0", "--config.log.every=10")
        return train_args(
            workdir,
            f"--config={CONFIGS[method]}:{base}",
            *WORLD,
            *knobs,
            *rates,
            "--config.checkpoint.best=",
            "--config.train.steps_per_dispatch=10",
            *(["--config.data.world_items=100000"] if method == "grpo" else []),
            *more,
        )

    return arguments


def records(workdir, kind: str) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def newest(workdir) -> list:
    return [np.asarray(x) for x in jax.tree.leaves(open_run(workdir).params)]


@pytest.mark.parametrize(("method", "more"), [("dpo", ()), ("grpo", ("--config.lora.rank=2",)), ("grpo", ())])
def test_a_run_is_one_like_any_other(taught, tuned_args, tmp_path, command, refused, monkeypatch, method, more):
    workdir = tmp_path / "tuned"
    made, err = command(*tuned_args(workdir, method, *more))
    assert f"weights from {taught} at step 20" in err and made["step"] == 20
    train, (held,) = records(workdir, "train"), records(workdir, "eval")
    if method == "dpo":
        known = [p.name for p in (workdir / "reference").iterdir()]
        assert known == [manifest.digest(taught / "checkpoints" / "20")[:16]], "log-probabilities of these weights"
        assert all(np.isfinite(r["loss"]) and 0 <= r["preference_accuracy"] <= 1 for r in train)
        assert 0 <= held["preference_accuracy"] <= 1 and 0 < held["pairs"] <= 12
    else:
        assert all(0 <= r["reward"] <= 1 and r["kl"] >= 0 for r in train) and 0 <= held["reward"] <= 1
        assert {f"reward/{row}" for row in ("en-de", "es-en")} < held.keys()
    assert all("bits_per_byte" not in r for r in train)
    assert (workdir / "report.md").exists() and (workdir / "loss.png").exists()
    assert Store(workdir / "checkpoints").meta(20)["base"]["step"] == 20
    assert command("generate", f"--workdir={workdir}", "--prompt=a", "--max_new_tokens=2")[0]["samples"]
    assert command("runs", tmp_path)[0]
    scores, told = command("evaluate", f"--workdir={workdir}")
    wanted = {"preference_accuracy", "pairs"} if method == "dpo" else {"reward", "reward/en-de"}
    assert wanted < scores.keys() and scores["step"] == 20 and "chose by this hold-out" not in told
    assert method != "dpo" or 0 < scores["pairs"] <= 12
    refused(USAGE, "--stride=3 is about text", "evaluate", f"--workdir={workdir}", "--stride=3")
    if more:
        merged = f"--workdir={tmp_path / 'merged'}"
        command("convert", "merge", f"--workdir={workdir}", f"--to={tmp_path / 'merged'}")
        assert command("generate", merged, "--prompt=a", "--max_new_tokens=2")[0]["samples"]
        refused(DATA, "weights have no hold-out, nor have those merged of a run of preferences or rewards", "evaluate", merged)
        assert "numbers" in command("evaluate", merged, "--tasks=numbers", "--limit=1")[0]["tasks"], "as the line says"
    shutil.rmtree(workdir / "checkpoints" / "20")
    with monkeypatch.context() as patch:  # the reference's log-probabilities are kept, not computed again
        patch.setattr(preference, "_said", None)
        wanted = newest_of(command, tuned_args, workdir, method, more)
    again = newest_of(command, tuned_args, tmp_path / "again", method, more)
    for a, b in zip(wanted, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_dpo_goes_on_without_the_weights_that_it_began_from(taught, tuned_args, tmp_path, command):
    """Their log-probabilities are kept; only adapters still need the weights themselves."""
    base, workdir = shutil.copytree(taught, tmp_path / "base"), tmp_path / "tuned"
    command(*tuned_args(workdir, "dpo", base=base))
    wanted = newest(workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    shutil.rmtree(base / "checkpoints" / "20")
    again = newest_of(command, functools.partial(tuned_args, base=base), workdir, "dpo", ())
    for a, b in zip(wanted, again, strict=True):
        np.testing.assert_array_equal(a, b)


def newest_of(command, tuned_args, workdir, method, more) -> list:
    command(*tuned_args(workdir, method, *more))
    return newest(workdir)


def test_preferences_come_from_files(tuned_args, tmp_path, command, refused):
    file, workdir = tmp_path / "pairs.jsonl", tmp_path / "tuned"
    ask = lambda text: {"messages": [{"role": "user", "content": text}], "chosen": "one", "rejected": f"two {text}"}
    words = [a + b for a in "abdefghi" for b in "abdef"]
    file.write_text("".join(json.dumps(ask(word)) + "\n" for word in words))
    of_file = ("--config.data.source=conversations", f"--config.data.path={file}", "--config.data.world_items=100000")
    _, err = command(*tuned_args(workdir, "dpo", *of_file))
    held, train = records(workdir, "eval")[-1], records(workdir, "train")
    apart = tmp_path / "apart.jsonl"
    apart.write_text("".join(json.dumps(ask(word)) + "\n" for word in words[:5]))
    _, told = command(*tuned_args(tmp_path / "apart", "dpo", *of_file, f"--config.data.holdout_path={apart}"))
    assert records(tmp_path / "apart", "eval")[-1]["pairs"] == 5 and " 40 training pairs" in told
    assert (
        held["preference_accuracy"] == pytest.approx(1)
        and held["preference_margin"] > 0.1
        and train[-1]["loss"] < train[0]["loss"]
    )
    scores, _ = command("evaluate", f"--workdir={workdir}")
    assert {name: scores[name] for name in ("preference_accuracy", "pairs")} == pytest.approx(
        {name: held[name] for name in ("preference_accuracy", "pairs")}
    )
    assert held["pairs"] + int(err.split(" training pairs")[0].split()[-1]) == 40
    with file.open("a") as f:
        f.write('{"messages": []}\n')
    refused(DATA, f"{file}:41: messages: expected the turns", *tuned_args(tmp_path / "new", "dpo", *of_file))
    file.write_text(json.dumps(ask("e" * 600)) + "\n")
    refused(DATA, "pairs, and no", *tuned_args(tmp_path / "new", "dpo", *of_file))


MISTAKES = [
    ("goes on from a model that answers already", ("--config.init.from=",)),
    ("objective.method=grpo needs questions whose answers can be checked", ("--config.data.source=conversations",)),
    ("objective.group=3 does not divide train.batch_size=4; nearest: group=2", ("--config.objective.group=3",)),
    ("questions never end; give steps", ("--config.train.length=1 epochs",)),
    ("train.z_loss=0.1: config.objective.method=grpo has no such part; leave it at 0.0", ("--config.train.z_loss=0.1",)),
    ("data.loss_on=all: config.objective.method=grpo learns from answers", ("--config.data.loss_on=all",)),
    ("data.world_items=400: config.objective.method=grpo asks ever new questions", ("--config.data.world_items=400",)),
    ("data.rows=windows: config.objective.method=grpo keeps every conversation whole", ("--config.data.rows=windows",)),
    (
        "train.mtp_weight=0.3: config.objective.method=grpo trains no heads of multi-token prediction; set mtp_weight=0",
        ("--config.model.mtp_heads=1", "--config.train.mtp_weight=0.3"),
    ),
    ("data.rows='first_fit' does nothing with objective.method=grpo", ("--config.data.rows=first_fit",)),
    ("eval.stride=8 does nothing with objective.method=grpo; set objective.method=next_token", ("--config.eval.stride=8",)),
    (
        "data.holdout_fraction=0.3 does nothing with data.path=numbers, which never ends; set objective.held_out",
        ("--config.data.holdout_fraction=0.3",),
    ),
    ("there are reward, reward/en-de, reward/de-en,", ("--config.checkpoint.best=reward/en-xx",)),
    ("world 'nmbers' does not exist (did you mean numbers?)", ("--config.data.path=nmbers",)),
]


def test_preferences_need_a_beta(tuned_args, tmp_path, refused):
    told = "config.objective.beta=0.0: config.objective.method=dpo learns nothing with it; expected above 0, such as 0.1"
    refused(USAGE, told, *tuned_args(tmp_path / "new", "dpo", "--config.objective.beta=0"))


@pytest.mark.parametrize(("fragment", "more"), MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_written(tuned_args, tmp_path, refused, fragment, more):
    refused(USAGE, fragment, *tuned_args(tmp_path / "new", "grpo", *more))
    assert not (tmp_path / "new").exists()
