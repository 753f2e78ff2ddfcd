"""Next to transformers itself: new random models in, and what we write back, loaded strictly there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt4o_jax.interop import config_json, files, weights
from tests.interop.cases import CASES
from tests.interop.conftest import load
from tests.interop.test_fixtures import KEPT, SHORT, same_as_theirs

PYTHON = os.environ.get("PEERS_PYTHON") or (sys.executable if importlib.util.find_spec("torch") else "")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(
        not PYTHON, reason="no torch here; install requirements-peers.txt, or name an interpreter in PEERS_PYTHON"
    ),
]


def transformers(*arguments) -> None:
    script = Path(__file__).with_name("make_fixtures.py")
    done = subprocess.run(
        [PYTHON, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models of another seed than the fixtures', and each as we write it after reading it, with transformers' logits."""
    folder = tmp_path_factory.mktemp("peers")
    transformers("make", folder, 7)
    for name in CASES:
        model, params, family = load(folder / name)
        theirs, out = weights.Theirs(family, params, model.config, np.dtype("float32")), folder / f"{name}-out"
        out.mkdir()
        files.write(out, theirs.shapes.items(), theirs.load, np.dtype("float32"), max_bytes=8000)
        (out / "config.json").write_text(json.dumps(config_json.from_model(family, model.config)))
        np.save(out / "tokens.npy", np.load(folder / name / "expected.npz")["tokens"])
    transformers("score", *(folder / f"{name}-out" for name in CASES))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_new_random_model_computes_the_same_here(made, name):
    same_as_theirs(made / name, np.load(made / name / "expected.npz"))


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_loads_strictly_and_computes_the_same_there(made, name):
    before, after = np.load(made / name / "expected.npz")["logits"], np.load(made / f"{name}-out" / "scored.npy")
    real = np.arange(512)[KEPT] < SHORT
    np.testing.assert_allclose(after[0], before[0], atol=1e-5, rtol=0)
    np.testing.assert_allclose(after[1, real], before[1, real], atol=1e-5, rtol=0)
