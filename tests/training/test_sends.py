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
L, D, HEADS, F, V, B, T = 4, 32, 4, 88, 208, 16, 40
MESHES = {preset: MeshConfig(preset=preset) for preset in PRESETS} | {"context=4": MeshConfig(context=4, fsdp=2, data=1)}


@functools.cache
def program(name: str):
    mixture = dict(n_experts=4, expert_d_ff=56) if name == "expert" else {}
    model = ModelConfig(
        vocab_size=V,
        context_length=T,
        n_layers=L,
        d_model=D,
        n_heads=HEADS,
        d_ff=F,
        remat="full",
        compute_dtype="float32",
        **mixture,
    )
    train = TrainConfig(batch_size=B, loss_chunk=T, steps_per_dispatch=1)
    config = RunConfig(model=model, train=train, mesh=MESHES[name])
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


def sent(name: str, kind: str, axis: str) -> tuple[int, int]:
    """(how often, bytes of a device) of this kind of collective over this one axis."""
    built, text = program(name)
    found = collectives(text, dict(built.mesh.shape), np.arange(8).reshape(built.mesh.devices.shape))
    return next((c["count"], c["bytes"]) for c in found if (c["kind"], c["axes"]) == (kind, axis))


def test_a_ring_sends_keys_round_three_times_and_their_gradients_once():
    """Forwards, computed again, backwards: keys, values and their segments to all other devices; and gradients home again."""
    C, rows = 4, B // 2
    key, segment = rows * (T // C) * D * 4, rows * HEADS * (T // C) * 4
    zigzag = 2 * 5  # both halves of a row of tokens, positions, segments, targets and weights
    count = L * (3 * 3 * (C - 1) + 2 * C) + zigzag
    size = L * (3 * (C - 1) * (2 * key + segment) + C * 2 * key) + zigzag * rows * (T // C // 2) * 4
    # A compiler may see that segments are the same in all layers, and send them once.
    assert sent("context=4", "collective-permute", "context") == pytest.approx((count, size), rel=0.1)


def test_rows_go_to_their_experts_and_back_three_times():
    """Forwards, computed again, and their gradients. XLA:CPU sends all that a device might have for another."""
    p, k = 2, 2
    room = p * (B // 8 * T * k) * D * 4
    assert sent("expert", "all-to-all", "expert") == (L * 3 * 2, L * 3 * 2 * room)


def test_stages_pass_each_micro_batch_on_and_its_gradient_back():
    S, M = 2, 4
    passed = B // 4 // M * T * D * 4
    assert sent("pipeline", "collective-permute", "stage") == (2 * (M + S - 1), 2 * (M + S - 1) * passed)
