"""The GPU script runs anywhere at toy size, without torch and without writing a record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.system


def test_gpu_speed_at_toy_size():
    before = (ROOT / "benchmarks" / "results.jsonl").read_text()
    environment = os.environ | {"PEERS_PYTHON": "/bin/false"}
    command = [sys.executable, "benchmarks/gpu_speed.py", "tiny"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    entry = json.loads(done.stdout)
    details = entry["details"]
    assert entry["name"] == "tiny_mfu" and entry["value"] == details["mfu"] > 0
    assert (details["batch"], details["steps"]) == (2, 4) and details["peak_bytes"] > 0
    assert details["torch_compiled_tokens_per_second"].startswith("not measured")
    assert (ROOT / "benchmarks" / "results.jsonl").read_text() == before


def test_gpu_speed_of_an_unknown_shape():
    done = subprocess.run([sys.executable, "benchmarks/gpu_speed.py", "huge"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "gpu_speed.py: no shape huge; shapes: gpu_124m, gpu_1300m, tiny\n"
