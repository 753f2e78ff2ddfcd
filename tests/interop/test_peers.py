"""Against transformers itself: new random models are imported, and our exports are loaded strictly there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax import run
from gpt4o_jax.interop import files, huggingface
from tests.interop.cases import CASES
from tests.interop.conftest import load, logits, with_tokenizer
from tests.interop.test_fixtures import KEPT, SHORT, same_as_theirs

PYTHON = os.environ.get("PEERS_PYTHON") or (sys.executable if importlib.util.find_spec("torch") else "")
DTYPES = {"float32": "F32", "bfloat16": "BF16"}  # of an export: convert's names and safetensors' names
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
    """Models with another seed than the fixtures, each imported and exported as by `convert`, with transformers' logits."""
    folder = tmp_path_factory.mktemp("peers")
    transformers("make", folder, 7)
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: first)  # the commands use every device there is
        for name in CASES:
            huggingface.import_folder(with_tokenizer(folder / name), folder / f"{name}-run")
            opened = run.open_run(folder / f"{name}-run")
            for dtype in DTYPES:
                out = folder / f"{name}-{dtype}"
                with jax.set_mesh(opened.mesh):
                    huggingface.export_folder(opened, out, name.partition("-")[0], dtype, max_file_bytes=8000)
                np.save(out / "tokens.npy", np.load(folder / name / "expected.npz")["tokens"])
    transformers("score", *(folder / f"{name}-{dtype}" for name in CASES for dtype in DTYPES))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_new_random_model_computes_the_same_here(made, name):
    same_as_theirs(made / name, np.load(made / name / "expected.npz"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_what_is_exported_loads_strictly_and_computes_the_same_there(made, name, dtype):
    """In float32, what the original model computes; in bfloat16, what we compute with parameters rounded to it."""
    after, expected = np.load(made / f"{name}-{dtype}" / "scored.npy"), np.load(made / name / "expected.npz")
    entries = files.Weights(made / f"{name}-{dtype}").entries.values()
    assert {e.dtype for e in entries} == {DTYPES[dtype]} and len({e.file for e in entries}) > 1
    before, atol = expected["logits"], 1e-5
    if dtype == "bfloat16":
        model, params, _ = load(made / name)
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), params)
        tokens = expected["tokens"]
        before, atol = logits(model, rounded, np.concatenate([tokens, tokens[:1]]), [512, SHORT, 512])[:2, KEPT], 1e-4
    real = np.arange(512)[KEPT] < SHORT
    np.testing.assert_allclose(after[0], before[0], atol=atol, rtol=0)
    np.testing.assert_allclose(after[1, real], before[1, real], atol=atol, rtol=0)
