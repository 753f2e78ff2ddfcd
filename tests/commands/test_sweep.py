"""`sweep` runs each variant and seed once, survives failures and signals, and its report says which differences are real."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gpt4o_jax import sweep_report
from gpt4o_jax.__main__ import main
from gpt4o_jax.commands import config_file, sweep
from gpt4o_jax.config import freeze, to_dict
from gpt4o_jax.errors import ExitCode

USAGE, DATA = ExitCode.USAGE, ExitCode.DATA

BASE = """
from gpt4o_jax.config import base_config

def get_config(layers="1"):
    c = base_config()
    c.seed = 5
    c.model.n_layers, c.model.d_model, c.model.n_heads, c.model.context_length = int(layers), 16, 2, 16
    c.tokenizer.kind, c.data.source, c.data.path, c.data.separator = "char", "text", "TEXT", "\\n"
    c.data.shingle_bytes, c.data.holdout_fraction = 0, 0.2
    c.train.length, c.train.batch_size, c.log.tensorboard = "20 steps", 4, False
    c.sample.max_new_tokens = 3
    return c

def sweep():
    VARIANTS
"""
THREE = 'yield "plain", {{}}\n    yield "x", {{"optimizer.peak_lr": {}}}\n    yield "last", {{}}'
PLAIN = 'yield "plain", {}\n    yield "fast", {"optimizer.peak_lr": 1e-2, "model.tied": True}'

# Stands in for `train`: copies a finished run, with the seed in its score; crashes or waits if its knobs say so.
TRAINER = """
import json, shutil, signal, sys, time
from pathlib import Path

flags = dict(a.split("=", 1) for a in sys.argv[1:])
workdir, seed, lr = Path(flags["--workdir"]), int(flags["--config.seed"]), flags.get("--config.optimizer.peak_lr")
if lr == "0.666":
    print("gpt4o_jax: diverged", file=sys.stderr)
    sys.exit(4)
if lr == "0.9":
    raise OSError("no such luck")
if lr == "0.75" and not (workdir / "started").exists():
    workdir.mkdir(parents=True)
    (workdir / "started").touch()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(76))
    time.sleep(60)
shutil.copytree(RUN, workdir, dirs_exist_ok=True)
config = json.loads((workdir / "config.json").read_text())
config["seed"] = seed
config["optimizer"]["peak_lr"] = float(lr or 1e-3)
(workdir / "config.json").write_text(json.dumps(config))
*lines, last = (workdir / "metrics.jsonl").read_text().splitlines()
final = json.loads(last) | {"bits_per_byte": 2 + seed / 100 - (0.5 if lr == "0.01" else 0.0)}
(workdir / "metrics.jsonl").write_text("\\n".join([*lines, json.dumps(final), ""]))
(workdir / "trained").write_text(str(time.time()))
"""


@pytest.fixture
def sweep_file(tmp_path, text):
    def write(variants: str = PLAIN) -> Path:
        path = tmp_path / "sweep.py"
        path.write_text(BASE.replace("TEXT", str(text)).replace("VARIANTS", textwrap.dedent(variants)))
        return path

    return write


@pytest.fixture
def trainer(tmp_path, monkeypatch, run):
    """Child processes that take milliseconds."""
    script = tmp_path / "trainer.py"
    script.write_text(f"RUN = {str(run)!r}\n{TRAINER}")
    monkeypatch.setattr(sweep.Job, "command", property(lambda job: [sys.executable, "-S", str(script), *job.flags]))
    monkeypatch.setattr("gpt4o_jax.run.check_same", lambda *_: None)  # `run` does not quite match the sweep's config


# ---------------------------------------------------------------- the plan


def test_print_gives_commands_that_train_understands(sweep_file, capsys, tmp_path):
    args = ("sweep", f"--sweep={sweep_file()}:2", f"--workdir={tmp_path}/it is here", "--seeds=2", "--config.train.batch_size=8")
    assert main([*args, "--print"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and not (tmp_path / "it is here").exists()
    flags = [dict(a.removeprefix("--").split("=", 1) for a in shlex.split(line)[4:]) for line in lines]
    assert [Path(f["workdir"]).relative_to(tmp_path / "it is here").as_posix() for f in flags] == [
        "plain/5", "fast/5", "plain/6", "fast/6",
    ]  # fmt: skip
    configs = [
        config_file.read(f["config"], {k.removeprefix("config."): v for k, v in f.items() if k.startswith("config.")})
        for f in flags
    ]
    assert [(c.seed, c.optimizer.peak_lr, c.model.tied, c.model.n_layers, c.train.batch_size) for c in configs] == [
        (5, 1e-3, False, 2, 8), (5, 1e-2, True, 2, 8), (6, 1e-3, False, 2, 8), (6, 1e-2, True, 2, 8),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("variants", "fragment"),
    [
        ('yield "a", {"model.d_modle": 3}', "variant 'a': --config.model.d_modle: no such key (did you mean model.d_model?)"),
        ('yield "a", {"model.d_model": "wide"}', "variant 'a': --config.model.d_model=wide: not an integer"),
        ('yield "a", {"model.d_model": 15}', "variant 'a': config.model.d_model=15 is not a multiple of n_heads=2"),
        (
            'yield "a", {"optimizer.muon_lr": 0.1}',
            "variant 'a': config.optimizer.muon_lr=0.1 does nothing with optimizer.name=adamw",
        ),
        ('yield "a", {"model.mlp": "gleu"}', "variant 'a': config.model.mlp: got 'gleu', expected one of"),
        ('yield "a", {}; yield "a", {"seed": 1}', "two variants are called 'a'"),
        ('yield "a", {"seed": 1}', "sets seed, but --seeds sets it"),
        ('yield "a", {"eval.every": 10}', "sets eval.every, but the command line sets it too, to 20"),
        ('yield "a/b", {}', "variant 'a/b': expected a name of letters, digits"),
        ('yield "..", {}', "variant '..': expected a name"),
        ('yield "report.md", {}', "variant 'report.md' has the name of a file of the sweep's own"),
        ("yield 3, {}", "variant 3: expected a name"),
        ("yield from ()", "sweep() yields nothing"),
        ("return 3", "TypeError: 'int' object is not iterable"),
        ('yield "a"', "ValueError: not enough values"),
        ('yield "a", {}; 1 / 0', "line 15: ZeroDivisionError"),
    ],
)
def test_mistakes_are_found_before_anything_runs(sweep_file, refused, tmp_path, variants, fragment):
    path = sweep_file(variants)
    refused(USAGE, fragment, "sweep", f"--sweep={path}", f"--workdir={tmp_path}/w", "--config.eval.every=20")
    assert not (tmp_path / "w").exists()


def test_wrong_files_and_folders(sweep_file, refused, tmp_path, run):
    path = sweep_file()
    refused(USAGE, "--sweep is missing", "sweep", "--workdir=x")
    refused(USAGE, "--sweep=nowhere.py: no such file", "sweep", "--sweep=nowhere.py", "--workdir=x")
    (tmp_path / "config.py").write_text("def get_config():\n    pass\n")
    refused(
        USAGE, "no sweep() in it; those in configs/ablations/ have one", "sweep", f"--sweep={tmp_path}/config.py", "--workdir=x"
    )
    refused(USAGE, "not empty and no sweep's folder", "sweep", f"--sweep={path}", f"--workdir={run}")
    refused(USAGE, "a file, expected a folder", "sweep", f"--sweep={path}", f"--workdir={path}")
    shutil.copytree(run, tmp_path / "w" / "plain" / "5")
    (tmp_path / "w" / sweep_report.NOTE).write_text("{}")
    refused(USAGE, "plain/5: this run has seed=0, the command asks for 5", "sweep", f"--sweep={path}", f"--workdir={tmp_path}/w")


# ---------------------------------------------------------------- running


def test_real_runs_are_trained_once(sweep_file, command, tmp_path):
    args = ("sweep", f"--sweep={sweep_file()}", f"--workdir={tmp_path}/w", "--seeds=1")
    result, err = command(*args)
    assert err.count("] run ") == 2 and "step 20/20" in err
    finals = {v: json.loads((tmp_path / f"w/{v}/5/metrics.jsonl").read_text().splitlines()[-1]) for v in ("plain", "fast")}
    assert {v: r["bits_per_byte"] for v, r in result["variants"].items()} == {v: f["bits_per_byte"] for v, f in finals.items()}
    assert result["variants"]["fast"]["difference"]["p"] is None, "one run says nothing about noise"
    report = (tmp_path / "w/report.md").read_text()
    assert "## `fast`, where it differs from `plain`\n\n```\nmodel.tied = True\noptimizer.peak_lr = 0.01\n```" in report
    assert "Not finished" not in report and (tmp_path / "w/report.png").exists()
    again, err = command(*args)
    assert again == result and "] run " not in err


def test_runs_of_printed_commands_are_skipped_and_reported(sweep_file, trainer, command, tmp_path, capsys):
    path, workdir = sweep_file(), tmp_path / "w"
    args = ("sweep", f"--sweep={path}", f"--workdir={workdir}", "--seeds=1")
    plain, _ = sweep.plan(str(path), workdir, 1, {})
    subprocess.run(plain.command, check=True)  # as a launcher would
    assert main([*args, "--print"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert f"--workdir={workdir}/fast/5" in line, "what is finished is not printed again"
    result, err = command(*args)
    assert err.count("] run ") == 1 and {v["n"] for v in result["variants"].values()} == {1}
    assert (workdir / "report.md").exists()


def test_a_failure_does_not_end_the_sweep(sweep_file, trainer, command, tmp_path, capsys):
    path, workdir = (
        sweep_file(THREE.format(0.666)),
        tmp_path / "w",
    )
    assert main(["sweep", f"--sweep={path}", f"--workdir={workdir}", "--seeds=2"]) == ExitCode.DIVERGED
    last = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 6 runs failed" in last and "w/x/5 (exit code 4: gpt4o_jax: diverged)" in last
    assert sorted(p.parent.relative_to(workdir).as_posix() for p in workdir.rglob("trained")) == [
        "last/5", "last/6", "plain/5", "plain/6",
    ]  # fmt: skip
    report = (workdir / "report.md").read_text()
    assert "## Not finished\n\n- x/5: exit code 4: gpt4o_jax: diverged\n- x/6: exit code 4" in report
    assert "| x | 0 | - | - | - | - | - | - |" in report
    command("report", f"--workdir={workdir}")
    assert (workdir / "report.md").read_text() == report, "the reasons are kept"
    sweep_file(THREE.format(0.01))
    result, err = command("sweep", f"--sweep={path}", f"--workdir={workdir}", "--seeds=2")
    assert err.count("] run ") == 2 and result["variants"]["x"]["n"] == 2, "only what failed ran again"


def test_a_crash_is_not_taken_for_an_exit_code_of_ours(sweep_file, trainer, tmp_path, capsys):
    path = sweep_file('yield "plain", {"optimizer.peak_lr": 0.9}')
    assert main(["sweep", f"--sweep={path}", f"--workdir={tmp_path}/w", "--seeds=1"]) == ExitCode.CRASHED == 1
    assert "exit code 1: OSError: no such luck" in capsys.readouterr().err.splitlines()[-1]


def test_a_signal_is_passed_on_and_the_same_command_goes_on(sweep_file, trainer, command, tmp_path, capsys):
    path, workdir = (
        sweep_file(THREE.format(0.75)),
        tmp_path / "w",
    )

    def interrupt():
        while not (workdir / "x/5/started").exists():
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    args = ("sweep", f"--sweep={path}", f"--workdir={workdir}", "--seeds=1")
    assert main(list(args)) == ExitCode.SIGNAL
    assert "sweep stopped by SIGTERM in run 2 of 3; run the same command again" in capsys.readouterr().err.splitlines()[-1]
    assert (workdir / "plain/5/trained").exists() and not (workdir / "last").exists()
    assert "- x/5: not begun\n- last/5: not begun" in (workdir / "report.md").read_text()
    first = (workdir / "plain/5/trained").read_text()
    result, err = command(*args)
    assert err.count("] run ") == 2 and all(v["n"] == 1 for v in result["variants"].values())
    assert (workdir / "plain/5/trained").read_text() == first


# ---------------------------------------------------------------- the report


def test_means_spreads_and_significance(sweep_file, trainer, command, tmp_path):
    result, _ = command("sweep", f"--sweep={sweep_file()}", f"--workdir={tmp_path}/w", "--seeds=3")
    plain, fast = result["variants"]["plain"], result["variants"]["fast"]
    assert plain["n"] == 3 and plain["bits_per_byte"] == pytest.approx(2.06) and plain["stdev"] == pytest.approx(0.01)
    assert plain["difference"] is None and fast["difference"]["mean"] == pytest.approx(-0.5)
    assert "| fast | 3 | 1.5600 ± 0.0100 | -0.5000 | -0.5227 to -0.4773 | 4.3e-07 |" in (tmp_path / "w/report.md").read_text()


def test_runs_of_grpo_are_compared_by_its_own_measure(sweep_file, trainer, command, tmp_path):
    command("sweep", f"--sweep={sweep_file()}", f"--workdir={tmp_path}/w", "--seeds=1")
    knobs = {"objective": {"method": "grpo"}, "init": {"from": "x"}, "data": {"source": "world", "path": "numbers"}}
    config = freeze(knobs | {"model": {"vocab_size": 300}})
    for path in (tmp_path / "w").glob("*/5/config.json"):
        path.write_text(json.dumps(to_dict(config)))
        record = {"tokens": 1, "tokens_per_second": 1, "total_steps": 20, "seconds": 1, "reward": 5.0}
        lines = [json.dumps(record | {"kind": kind, "step": 20}) for kind in ("train", "eval")]
        path.with_name("metrics.jsonl").write_text("\n".join([*lines, ""]))
    result, _ = command("report", f"--workdir={tmp_path}/w")
    assert result["measure"] == "reward" and result["variants"]["fast"]["reward"] == 5
    assert "| variant | n | reward |" in (tmp_path / "w/report.md").read_text()


def test_difference_is_welchs_test():
    """Against the formula with Student's distribution integrated numerically."""
    a, b = [1.0, 1.3, 0.9, 1.1], [1.4, 1.7, 1.35]
    d = sweep_report.difference(a, b)
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    t = (np.mean(a) - np.mean(b)) / np.sqrt(va + vb)
    dof = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    x = np.linspace(-2000, 2000, 4_000_001)
    density = (1 + x**2 / dof) ** (-(dof + 1) / 2)
    density /= np.trapezoid(density, x)
    inside = np.trapezoid(density[np.abs(x) <= abs(t)], x[np.abs(x) <= abs(t)])
    assert d.mean == pytest.approx(np.mean(a) - np.mean(b)) and d.p == pytest.approx(1 - inside, rel=1e-2)
    assert d.low < d.mean < d.high < 0


@pytest.mark.parametrize("a, b", [([1.0], [2.0, 3.0]), ([1.0, 2.0], [1.0]), ([1.0, 1.0], [1.0, 1.0])])
def test_too_little_for_a_test(a, b):
    d = sweep_report.difference(a, b)
    assert (d.low, d.high, d.p) == (None, None, None) and d.mean == np.mean(a) - np.mean(b)


@pytest.mark.parametrize("note", ["{", "[]", '{"runs": 3, "sweep": "x"}'])
def test_a_damaged_note_is_one_line(tmp_path, note):
    (tmp_path / sweep_report.NOTE).write_text(note)
    with pytest.raises(Exception, match="damaged") as e:
        sweep_report.read(tmp_path)
    assert e.value.code == DATA
