"""`plan` in a separate process, because it sets variables that jax reads on import."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt4o_jax.commands import plan

ROOT = Path(__file__).parents[2]
SIZE = {
    "model.vocab_size": 256, "model.n_layers": 2, "model.d_model": 128, "model.n_heads": 1, "model.context_length": 128,
    "mesh.data": 1, "mesh.fsdp": 4, "train.batch_size": 8,
}  # fmt: skip


def call(*args: str, **knobs) -> tuple[int, str, str]:
    config = [f"--config.{k}={v}" for k, v in (SIZE | knobs).items()]
    program = [sys.executable, "-m", "gpt4o_jax", "plan", f"--config={ROOT}/configs/base.py", *config, *args]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"})
    return done.returncode, done.stdout, done.stderr


def test_a_tiny_model_fits_a_real_slice():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (requirements-tpu.txt): no TPU compiler here")
    code, out, _ = call("--topology=v5e:2x2")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["fits"] and result["attention"] == "splash" and not result["estimate"]
    assert result["rates"]["flops"] == 197e12 and "/docs/v5e" in result["rates"]["source"]
    assert result["bytes"]["total"] < result["hbm"] and {c["kind"] for c in result["collectives"]} >= {"all-gather", "all-reduce"}


def test_without_libtpu_it_says_that_it_estimates():
    if importlib.util.find_spec("libtpu") is not None:
        pytest.skip("libtpu is installed")
    code, out, err = call("--topology=v5e:4x4", **{"mesh.fsdp": 16, "train.batch_size": 16})
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["estimate"] and "ESTIMATE" in err and "fits" not in result and "roofline" not in result
    assert result["collectives"] and result["chips"] == 16 and result["mesh"]["fsdp"] == 8


def test_the_bubble_of_a_pipeline_is_told():
    code, out, err = call("--topology=v5e:2x2", **{"mesh.fsdp": 2, "mesh.stage": 2, "mesh.pipeline_microbatches": 2})
    told = json.loads(out.splitlines()[-1])["pipeline"]
    assert code == 0 and (told["stages"], told["repeats"], told["micro_batches"]) == (2, 1, 2)
    assert told["bubble"] == pytest.approx(1 / 3)
    assert "2 stages, repeats: 1, 2 micro-batches: bubble 33.3%" in err, err


def test_shardings_are_shown_parameter_by_parameter():
    code, out, _ = call("--topology=v5e:4x4", "--show=sharding", **{"mesh.fsdp": 4, "mesh.tensor": 4, "model.n_heads": 4})
    *table, last = out.splitlines()
    shown = {row["parameter"]: row for row in json.loads(last)["sharding"]}
    assert code == 0 and [line.split()[0] for line in table] == ["parameter", *shown]
    up = shown["layers/mlp/up"]
    assert (up["shape"], up["logical"]) == ([2, 128, 512], ["layers", "embed", "mlp"])
    parts = 16  # devices, with and without libtpu
    assert up["bytes_a_device"] == 4 * 2 * 128 * 512 // parts


def test_an_axis_of_the_mesh_that_two_axes_of_a_parameter_want_is_told():
    """Only if it splits anything: fsdp is 4, expert is 1."""
    code, out, _ = call("--topology=v5e:2x2", "--show=sharding", **{"model.mtp_heads": 1})
    *table, last = out.splitlines()
    shown = {row["parameter"]: row for row in json.loads(last)["sharding"]}
    (name,) = [name for name, row in shown.items() if row["note"]]
    row = shown[name]
    assert code == 0 and (row["logical"][-2:], row["mesh"][-2:]) == (["embed", "embed"], ["fsdp", None])
    assert row["note"] == "fsdp taken by embed"
    assert [line.split()[0] for line in table if row["note"] in line] == [name]


def test_weights_that_adapters_stand_beside_are_shown_as_frozen():
    code, out, err = call("--topology=v5e:2x2", "--show=sharding", **{"lora.rank": 4, "init.from": "runs/base"})
    assert code == 0 and "planned as" not in err, err
    header, *table, last = out.splitlines()
    assert "planned_as" not in json.loads(last)
    frozen = {row["parameter"]: row["frozen"] for row in json.loads(last)["sharding"]}
    assert frozen["layers/mlp/up"] and not frozen["layers/mlp/up/A"]
    assert header.split()[-6:] == ["mesh", "note", "frozen", "bytes", "a", "device"]
    assert {line.split()[0]: line.split()[-2] == "yes" for line in table} == frozen


def test_preferences_and_rewards_are_said_to_be_planned_as_ordinary_training():
    grpo = {"objective.method": "grpo", "init.from": "runs/base", "data.source": "world", "data.path": "numbers"}
    code, out, err = call("--topology=v5e:2x2", "--show=sharding", **grpo)
    assert code == 0 and json.loads(out.splitlines()[-1])["planned_as"] == "next_token"
    assert err.count("planned as ordinary training") == 1 and "the weights that it starts from are" in err


@pytest.mark.parametrize(
    ("flags", "knobs", "told"),
    [
        (["--topology=v9:2x2"], {}, "expected FAMILY"),
        (["--topology=v5e:2x2"], {"mesh.fsdp": 3}, "does not fit 4 device(s)"),
        (["--topology=v5e:2x2"], {"train.batch_size": 6}, "train.batch_size=6 is not a multiple of 4"),
        (
            ["--topology=v5e:2x2", "--slices=3"],
            {"mesh.fsdp": 4, "mesh.tensor": 3, "model.n_heads": 3, "model.d_model": 384},
            "3 slices",
        ),
        (["--topology=v5e:2x2", "--show=colours"], {}, "expected sharding"),
    ],
    ids=["topology", "mesh", "rows", "slices", "show"],
)
def test_mistakes_are_one_line(flags, knobs, told):
    code, out, err = call(*flags, **knobs)
    lines = [line for line in err.splitlines() if "ESTIMATE" not in line]
    assert code == 2 and out == "" and len(lines) == 1 and told in lines[0]


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("sleep 60", "not compiled within 1 s (--try_seconds)"),
        ("echo plan: no; echo 'gpt4o_jax: not even' >&2; exit 2", "not possible: gpt4o_jax: not even"),
        ("kill -ABRT $$", "not possible: exit code -6"),
    ],
    ids=["hangs", "refuses", "aborts"],
)
def test_a_remedy_that_cannot_be_compiled_is_told_in_a_line(tmp_path, monkeypatch, script, told):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    flags = {"config": "configs/base.py", "topology": "v5e:2x2", "slices": 1, "try_seconds": 1}
    assert plan._tried(flags, {"model.remat": "dots"}) == told


@pytest.mark.parametrize(
    ("results", "fits_with", "told"),
    [
        (
            ["late", {"fits": False}, "late", {"fits": False}],
            None,
            "fits; 2 of 4 remedies were not compiled, and may: raise --try",
        ),
        ([{"fits": False}, {"fits": False}], None, "none of 2 remedies fits; take a larger slice, or several (--slices)"),
        (["late", {"fits": True}], {"n": 1}, "fits with --config.n=1; of 1 milder ones 1 were not compiled, and may fit too"),
        ([{"fits": False}, {"fits": True}, "late"], {"n": 1}, "fits with --config.n=1\n"),
    ],
    ids=["some late", "none fits", "fits after one that was late", "fits"],
)
def test_a_remedy_that_was_not_compiled_is_not_said_not_to_fit(monkeypatch, capsys, results, fits_with, told):
    monkeypatch.setattr("gpt4o_jax.training.plan.remedies", lambda *_: ({"n": i} for i in range(len(results))))
    size = {"bytes": {"total": 3e9}, "hbm": 2e9, "roofline": {}, "remat": "full"}
    answers = iter(r if isinstance(r, str) else r | size for r in results)
    monkeypatch.setattr(plan, "_tried", lambda *_: next(answers))
    found = plan._try_remedies(None, {}, {}, {})
    assert told in capsys.readouterr().err
    assert (found["fits_with"] and found["fits_with"]["knobs"]) == fits_with
    compiled = results[: 2 if fits_with else None]
    assert found["tried"] == [
        {"knobs": {"n": i}} | ({"fits": None, "reason": r} if isinstance(r, str) else {"fits": r["fits"], "total": 3e9})
        for i, r in enumerate(compiled)
    ]


def test_without_sizes_of_the_mesh_slices_lie_along_data_and_each_has_the_batch_of_the_config():
    flags = ["--config=configs/gpt4o.py:xl", "--topology=v5p:8x8x8", "--slices=4", "--show=sharding"]
    done = subprocess.run([sys.executable, "-m", "gpt4o_jax", "plan", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["batch_size"] == 2048
    assert "4 slices along data, each with the mesh of the config; batch_size=2048: 512 a slice" in done.stderr
    assert "(--config.mesh.data=4 --config.mesh.fsdp=512 --config.train.batch_size=2048)" in done.stderr, "as train is to have it"


def test_sizes_of_the_mesh_are_those_of_all_slices():
    code, out, err = call("--topology=v5e:2x2", "--slices=2", "--show=sharding", **{"mesh.data": 1, "mesh.fsdp": 8})
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and (result["batch_size"], result["mesh"]["fsdp"]) == (8, 8) and "slices along" not in err
