"""launch/skypilot.yaml as SkyPilot itself reads it.

Needs a separate environment (`python -m venv sky && sky/bin/pip install skypilot==0.14.1`), with its interpreter named by
SKYPILOT_PYTHON: it has too many dependencies to be installed with the tests.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

PYTHON = os.environ.get("SKYPILOT_PYTHON", "")
FILE = Path(__file__).parents[2] / "launch" / "skypilot.yaml"
READER = """
import json, sys, sky
task = sky.Task.from_yaml(sys.argv[1])
print(json.dumps(task.to_yaml_config()))
"""

pytestmark = [pytest.mark.system, pytest.mark.skipif(not PYTHON, reason="SKYPILOT_PYTHON names no environment with skypilot")]


def read(file: Path, home: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    return subprocess.run([PYTHON, "-c", READER, str(file)], cwd=FILE.parents[1], env=environment, capture_output=True, text=True)


def test_skypilot_reads_the_file(tmp_path):
    done = read(FILE, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    task = json.loads(done.stdout.splitlines()[-1])
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == {"H100": 8} and task["resources"]["use_spot"]
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 20, "recover_on_exit_codes": [75, 76, 137, 143]}


@pytest.mark.parametrize("right, wrong", [("num_nodes", "num_node"), ("use_spot", "use_spott")])
def test_a_misspelt_field_is_refused(tmp_path, right, wrong):
    (tmp_path / "bad.yaml").write_text(FILE.read_text().replace(right, wrong))
    done = read(tmp_path / "bad.yaml", tmp_path)
    assert done.returncode and f"Instead of '{wrong}', did you mean '{right}'?" in done.stderr
