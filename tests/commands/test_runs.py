"""`runs` finds every run, shows what differs, and recognises unfinished runs."""

import json
import shutil

import pytest

from gpt4o_jax import comparison
from gpt4o_jax.errors import ExitCode


@pytest.fixture
def folder(run, tmp_path):
    """Three runs: finished, stopped after a step, killed before the first record; and things that are not runs."""
    for name in ("a/finished", "a/stopped", "b"):
        shutil.copytree(run, tmp_path / name)
    change(tmp_path / "a/stopped", optimizer={"peak_lr": 0.5})
    first = (tmp_path / "a/stopped/metrics.jsonl").read_text().splitlines()[0]
    (tmp_path / "a/stopped/metrics.jsonl").write_text(first + "\n")
    change(tmp_path / "b", model={"tied": True}, optimizer={"peak_lr": 0.5})
    (tmp_path / "b/metrics.jsonl").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"of": "another program"}')
    return tmp_path


def change(workdir, **sections):
    config = json.loads((workdir / "config.json").read_text())
    for name, values in sections.items():
        config[name] |= values
    (workdir / "config.json").write_text(json.dumps(config))


def test_runs_are_found_and_compared_best_first(folder, command, run):
    result, table = command("runs", folder, folder / "b")
    finished, *others = result["runs"]
    final = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert finished["workdir"] == str(folder / "a/finished") and finished["finished"] is True
    assert {n: finished[n] for n in ("loss", "bits_per_byte")} == {n: final[n] for n in ("loss", "bits_per_byte")}
    assert (finished["step"], finished["tokens"]) == (20, 20 * 4 * 16) and 0 < finished["goodput"] < 1
    assert [(r["state"], r["loss"]) for r in others] == [("step 10 of 20", None), ("step 0 of ?", None)]
    assert [r["config"] for r in result["runs"]] == [
        {"model.tied": tied, "optimizer.peak_lr": lr} for tied, lr in ((False, 1e-3), (False, 0.5), (True, 0.5))
    ]
    head, *rows = table.splitlines()
    assert head.split()[-2:] == ["model.tied", "optimizer.peak_lr"] and [r.split()[0] for r in rows] == [
        "a/finished", "a/stopped", "b",
    ]  # fmt: skip
    assert result["plot"] == str(folder / "runs.png") and (folder / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_diverged_or_are_measured_by_another_number_come_behind(folder, command):
    shutil.copytree(folder / "a/finished", folder / "a/diverged")
    shutil.copytree(folder / "a/finished", folder / "a/rewarded")
    of_a_world = {"source": "world", "path": "numbers"}
    change(folder / "a/rewarded", objective={"method": "grpo", "group": 4}, init={"from": "x"}, data=of_a_world)
    for name, of in (("diverged", {"bits_per_byte": float("nan")}), ("rewarded", {"reward": 0.25})):
        path = folder / "a" / name / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [r | of if r["kind"] == "eval" else r for r in records]
        if name == "rewarded":
            kept = [{k: v for k, v in r.items() if k != "bits_per_byte"} | of for r in kept]
        path.write_text("".join(json.dumps(r) + "\n" for r in kept))
    result, table = command("runs", folder / "a")
    names = [r["workdir"].split("/")[-1] for r in result["runs"]]
    assert names == ["finished", "diverged", "rewarded", "stopped"] and result["runs"][2]["reward"] == 0.25
    assert "reward" in table.splitlines()[0].split()


def test_a_knob_that_is_a_newline_stays_in_its_line(folder, command):
    change(folder / "b", data={"separator": "\n\n"})
    _, table = command("runs", folder)
    head, *rows = table.splitlines()
    assert "data.separator" in head and [r.split()[0] for r in rows] == ["a/finished", "a/stopped", "b"]
    assert "'\\n\\n'" in rows[2]


def test_one_run_given_twice_is_one(run, command, tmp_path):
    result, table = command("runs", run, f"{run}/../{run.name}", f"--out={tmp_path}/x.png")
    assert len(result["runs"]) == 1 and result["runs"][0]["config"] == {}
    assert table.splitlines()[1].startswith("run ") and (tmp_path / "x.png").exists()


def test_links_to_folders_above_lead_nowhere_else(run, command, tmp_path):
    shutil.copytree(run, tmp_path / "one")
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(tmp_path)
    assert len(command("runs", tmp_path)[0]["runs"]) == 1


def test_what_cannot_be_compared(folder, refused):
    data, usage = ExitCode.DATA, ExitCode.USAGE
    refused(usage, "runs: DIR is missing", "runs")
    refused(usage, "runs: unknown flag --dir", "runs", "--dir=x")
    refused(usage, "unexpected argument '-x'", "runs", "-x")
    refused(usage, "expected a file name that ends in .png", "runs", folder, "--out=x.pdf")
    refused(data, "nowhere: no such folder", "runs", folder / "nowhere")
    refused(data, "other: no run in or below it", "runs", folder, folder / "other")
    (folder / "b/config.json").write_text("{")
    refused(data, "b/config.json: damaged (not JSON)", "runs", folder)
    assert not (folder / "runs.png").exists()


@pytest.mark.parametrize("line", ['{"kind": "train", "st', "[1]", "7", '{"step": 30}', '{"kind": "test", "step": 1}', "\xff\0"])
def test_a_broken_line_between_others_is_named(folder, refused, line):
    path = folder / "a/finished/metrics.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text(first + line + "\n" + "".join(rest), encoding="latin-1")
    refused(ExitCode.DATA, "metrics.jsonl, line 2: damaged, got", "runs", folder)


def test_a_diverged_run_can_be_plotted(folder):
    nan = json.dumps({"kind": "train", "step": 30, "tokens": 1, "tokens_per_second": 1.0, "bits_per_byte": float("nan")})
    with (folder / "b/metrics.jsonl").open("a") as f:
        f.write(nan + "\n")
    runs = comparison.find([str(folder)])
    assert comparison.plot({str(i): [r] for i, r in enumerate(runs)}).startswith(b"\x89PNG")
