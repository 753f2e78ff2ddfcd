"""`report` describes any run: finished, stopped, killed before its first record, diverged, or a whole sweep."""

import json
import shutil

import pytest

from gpt4o_jax import sweep_report
from gpt4o_jax.errors import ExitCode


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def keep(workdir, chosen):
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in chosen))


def test_a_finished_run_is_described_as_training_did(copy, run, command):
    written = {name: (run / name).read_bytes() for name in ("report.md", "loss.png", "training.png")}
    for name in written:
        (copy / name).unlink()
    result, _ = command("report", f"--workdir={copy}")
    final = records(run)[-1]
    assert (result["step"], result["loss"], result["accuracy"]) == (20, final["loss"], final["accuracy"])
    assert (copy / "report.md").read_text() == written.pop("report.md").decode().replace("# run\n", "# copy\n")
    assert {name: (copy / name).read_bytes() for name in written} == written


def test_what_a_report_says(run):
    text = (run / "report.md").read_text()
    final, last = records(run)[-1], records(run)[-2]
    rates = ", ".join(f"{r['tokens_per_second']:,.0f}" for r in records(run) if r["kind"] == "train")
    for line in (
        f"| tokens/s, over the run | {rates} |",
        "# run\n\n| held out, step 20 | |",
        f"| bits per byte | **{final['bits_per_byte']:.4f}** |",
        "| steps, tokens | 20, 1,280 |",
        f"step {last['goodput/step']:.1%}",
        f"| goodput: the share of it spent in training steps | {last['goodput/step']:.1%} |",
        "![loss](loss.png)",
        "![learning rate, gradient norm, throughput](training.png)",
        "model.d_model = 16\n",
        "## Samples at step 20\n\n```text\n[0] 1 green",
    ):
        assert line in text, line
    assert "model.n_kv_heads" not in text and "Not finished" not in text


def test_samples_are_shown_over_time(copy, command):
    for step in range(0, 200, 10):
        (copy / f"samples/{step}.txt").write_text(f"words of step {step}\n")
    command("report", f"--workdir={copy}")
    text = (copy / "report.md").read_text()
    assert [int(line.split()[-1]) for line in text.splitlines() if line.startswith("## Samples")] == [190, 140, 100, 50, 0]
    assert "words of step 100" in text


@pytest.mark.parametrize("kept, state", [(1, "step 10 of 20"), (0, "step 0 of ?")])
def test_a_run_on_its_way(copy, command, kept, state):
    keep(copy, records(copy)[:kept])
    shutil.rmtree(copy / "samples")
    result, _ = command("report", f"--workdir={copy}")
    assert result["step"] == 10 * kept and result["loss"] is None
    text = (copy / "report.md").read_text()
    assert text.startswith(f"# copy\n\nNot finished: {state}.\n") and "held out" not in text
    assert ("training.png" in text) == bool(kept)


def test_a_diverged_run(copy, command):
    nan = {name: float("nan") for name in ("loss", "bits_per_byte", "grad_norm")}
    keep(copy, [r | nan if r["kind"] == "train" else r for r in records(copy)])
    command("report", f"--workdir={copy}")


def test_a_sweep(copy, command, tmp_path):
    note = {"sweep": "x.py", "runs": {"base": ["copy"], "other": ["nothing yet"]}}
    (tmp_path / sweep_report.NOTE).write_text(json.dumps(note))
    result, _ = command("report", f"--workdir={tmp_path}")
    assert result["variants"]["base"]["n"] == 1 and result["variants"]["other"]["n"] == 0
    assert "- nothing yet: not begun" in (tmp_path / "report.md").read_text()


def test_no_run_is_one_line(refused, tmp_path):
    refused(ExitCode.DATA, "not a run folder (no config.json)", "report", f"--workdir={tmp_path}")
    refused(ExitCode.DATA, "no such folder", "report", f"--workdir={tmp_path}/x")
    assert not any(tmp_path.iterdir())
