"""A sweep stopped by a signal saves the current run; the same command then ends with the same bits."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

pytestmark = pytest.mark.system

SWEEP = """
from gpt4o_jax.config import base_config

def get_config():
    c = base_config()
    c.tokenizer.kind = "byte"
    c.data.source, c.data.path, c.data.holdout, c.data.shingle_bytes = "text", "TEXT", "tail", 0
    c.model.n_layers, c.model.d_model, c.model.n_heads, c.model.context_length = 1, 32, 2, 32
    c.train.length, c.train.batch_size, c.train.steps_per_dispatch = "600 steps", 4, 1
    c.log.every, c.log.tensorboard = 1, False
    c.eval.every, c.sample.every, c.sample.max_new_tokens, c.checkpoint.every = 0, 0, 8, 0
    return c

def sweep():
    yield "low", {}
    yield "high", {"optimizer.peak_lr": 3e-3}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be that is the question " * 400)
    (tmp_path / "sweep.py").write_text(SWEEP.replace("TEXT", str(tmp_path / "text.txt")))
    return tmp_path


def start(folder, name: str) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    environment |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache")}
    command = [
        sys.executable,
        "-m",
        "gpt4o_jax",
        "sweep",
        f"--sweep={folder}/sweep.py",
        f"--workdir={folder / name}",
        "--seeds=1",
    ]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def losses(folder) -> dict[str, list]:
    read = lambda path: [(r["kind"], r["step"], r["loss"]) for r in map(json.loads, path.read_text().splitlines())]
    return {variant: read(folder / variant / "0" / "metrics.jsonl") for variant in ("low", "high")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_and_the_sweep_goes_on(folder, number):
    undisturbed = start(folder, "undisturbed")
    out, err = undisturbed.communicate(timeout=600)
    assert undisturbed.returncode == 0, err

    stopped = start(folder, "stopped")
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(_until(stopped.stderr, "step 50/600")))
    reader.start()
    reader.join(timeout=300)
    os.killpg(stopped.pid, number)  # as a terminal or a scheduler does
    _, err = stopped.communicate(timeout=300)
    assert stopped.returncode == 75, err
    assert f"sweep stopped by {number.name} in run 1 of 2" in err.splitlines()[-1] and ", saved; run the same" in err
    (checkpoint,) = (folder / "stopped/low/0/checkpoints").iterdir()
    assert 50 <= int(checkpoint.name) < 600 and not (folder / "stopped/high").exists()

    again = start(folder, "stopped")
    result, err = again.communicate(timeout=600)
    assert again.returncode == 0 and f"continuing from step {checkpoint.name} of 600" in err, err
    assert losses(folder / "stopped") == losses(folder / "undisturbed")
    wanted, got = (json.loads(text.splitlines()[-1])["variants"] for text in (out, result))
    assert [v["bits_per_byte"] for v in got.values()] == [v["bits_per_byte"] for v in wanted.values()]


def _until(stream, text: str) -> list[str]:
    lines = []
    for line in stream:
        lines.append(line)
        if text in line:
            break
    return lines
