"""Fixture models from transformers with a tokenizer added, and what our decoder computes with them.

B batch, T positions
"""

import functools
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.data.tokenizer import char_tokenizer
from gpt4o_jax.interop import config_json, files, weights
from gpt4o_jax.model import gpt
from gpt4o_jax.ops.compute import Compute

FIXTURES = Path(__file__).parent / "fixtures"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz \n."  # 29, for the models' 61 ids


def with_tokenizer(folder: Path) -> Path:
    char_tokenizer(CHARACTERS).save(folder / "tokenizer.model")
    return folder


@pytest.fixture
def hf(tmp_path):
    """Name of a fixture -> a copy of it, with a tokenizer, to convert or to damage."""

    def copy(name: str, to: str = "hf") -> Path:
        shutil.copytree(FIXTURES / name, tmp_path / to)
        return with_tokenizer(tmp_path / to)

    return copy


def load(folder: Path, mesh=None):
    """(model, parameters, family) of a folder, on one device unless a mesh is given; weights are read as `convert` reads them."""
    family, config = config_json.read(folder)
    mesh = mesh or parallel.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = gpt.GPT(config, Compute("cpu", "float32"))
        return model, weights.load(files.Weights(folder), family, model, mesh), family


@functools.lru_cache
def _forward(model):
    return jax.jit(
        lambda params, tokens, positions, segments: gpt.unembed(
            model, params, model.apply({"params": params}, tokens, positions, segments)[0]
        )
    )


def logits(model, params, tokens_BT: np.ndarray, lengths_B) -> np.ndarray:
    """[B, T, V] for rows whose first `lengths_B` tokens count; the rest is padding."""
    B, T = tokens_BT.shape
    index_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    segments_BT = (index_BT < np.asarray(lengths_B)[:, None]).astype(np.int32)
    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        return np.asarray(_forward(model)(params, tokens_BT.astype(np.int32), index_BT, segments_BT))
