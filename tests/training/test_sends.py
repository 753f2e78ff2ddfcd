"""What a training step sends, read off the program that XLA compiled for eight CPU devices: nobody gathers what is split.

B rows of a batch, T positions, D model width, F MLP width, L layers
"""

import functools
import math
import re

import jax
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import MeshConfig, ModelConfig, RunConfig, TrainConfig
from gpt4o_jax.config_mesh import PRESETS
from gpt4o_jax.training.collectives import _members, collectives
from gpt4o_jax.training.program import build

# Sizes of which no product is another by chance.
L, D, F, V, B, T = 4, 32, 88, 208, 16, 40


@functools.cache
def program(preset: str):
    mixture = dict(n_experts=4, expert_d_ff=56) if preset == "expert" else {}
    model = ModelConfig(
        vocab_size=V, context_length=T, n_layers=L, d_model=D, n_heads=4, d_ff=F, remat="full", compute_dtype="float32", **mixture
    )
    train = TrainConfig(batch_size=B, loss_chunk=T, steps_per_dispatch=1)
    config = RunConfig(model=model, train=train, mesh=MeshConfig(preset=preset))
    built = build(config, parallel.make_mesh(config.mesh))
    with jax.set_mesh(built.mesh):
        return built, built.lower(100, np.ones(V, np.int32)).compile().as_text()


def gathered(text: str) -> list[int]:
    """Numbers of entries of all arrays that all-gathers give, but for those of one device from itself."""
    lines = [line for line in text.splitlines() if " all-gather(" in line and len(_members(line, "all-gather", 8)) > 1]
    shapes = [line.split(" = ")[1].split(" all-gather(")[0] for line in lines]
    return [math.prod(map(int, dims.split(","))) for shape in shapes for dims in re.findall(r"\w\[([\d,]+)\]", shape)]


@pytest.mark.parametrize("preset", PRESETS)
def test_no_device_gathers_all_layers_or_the_whole_batch(preset):
    built, text = program(preset)
    stacked = {leaf.size for leaf in jax.tree.leaves(built.shapes.params["layers"]) if leaf.ndim > 2}
    sizes = gathered(text)
    assert bool(sizes) == (preset != "dp"), "the text is read"
    assert not stacked & set(sizes), "a stack of all layers"
    assert max(sizes, default=0) < B * T * D, "activations of all rows"


@pytest.mark.parametrize("preset", PRESETS)
def test_bytes_move_along_the_axes_of_the_preset_alone(preset):
    built, text = program(preset)
    found = collectives(text, dict(built.mesh.shape), np.arange(8).reshape(built.mesh.devices.shape))
    used = {axis for c in found if c["bytes"] > 1000 for axis in c["axes"].split("+")}
    assert used == {axis for axis, n in built.mesh.shape.items() if n > 1}
