"""What a training step sends, read from the program that XLA compiled for eight CPU devices: no device gathers what is sharded.

B rows of a batch, T positions, D model width, F MLP width, L layers
"""

import contextlib
import functools
import itertools
import math
import os
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from gpt4o_jax import parallel
from gpt4o_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt4o_jax.config_mesh import PRESETS
from gpt4o_jax.model import gpt
from gpt4o_jax.training.collectives import _members, collectives
from gpt4o_jax.training.program import build

# Sizes chosen so that no two products coincide.
L, D, HEADS, F, V, B, T = 4, 32, 4, 88, 208, 16, 40
MESHES = {preset: MeshConfig(preset=preset) for preset in PRESETS}
MESHES["context=4"] = MeshConfig(context=4, fsdp=2, data=1)
MESHES["three axes"] = MeshConfig(stage=2, fsdp=2, tensor=2, data=1)


@contextlib.contextmanager
def heard():
    """A list that finally holds what XLA wrote to stderr; the cache is off, because XLA only writes when it compiles."""
    told, usual = [], os.dup(2)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            yield told
            file.seek(0)
            told.append(file.read().decode())
    finally:
        os.dup2(usual, 2)
        os.close(usual)
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


# Each has L periods of layers. Tests of a single kind take experts on the preset with an expert axis, otherwise dense.
KINDS = {
    "dense": {},
    "experts": dict(n_experts=4, expert_d_ff=56),
    "windowed experts": dict(
        n_experts=6, expert_d_ff=56, moe_every=2, layer_pattern=("local", "global"), window=8, n_layers=2 * L
    ),
}


@functools.cache
def program(name: str, kind: str = "", optimizer: str = "adamw"):
    kind = kind or ("experts" if name == "expert" else "dense")
    sizes = dict(vocab_size=V, context_length=T, n_layers=L, d_model=D, n_heads=HEADS, d_ff=F)
    model = ModelConfig(**sizes | KINDS[kind], remat="full", compute_dtype="float32")
    train = TrainConfig(batch_size=B, loss_chunk=T, steps_per_dispatch=1)
    config = RunConfig(model=model, train=train, mesh=MESHES[name], optimizer=OptimizerConfig(name=optimizer))
    built = build(config, parallel.make_mesh(config.mesh))
    with jax.set_mesh(built.mesh):
        lowered = built.lower(100, np.ones(V, np.int32))
    with heard() as told:
        text = lowered.compile().as_text()
    return built, text, told[0]


def gathered(text: str) -> list[int]:
    """Sizes of the results of all all-gathers, except those among a single device."""
    lines = [line for line in text.splitlines() if " all-gather(" in line and len(_members(line, "all-gather", 8)) > 1]
    shapes = [line.split(" = ")[1].split(" all-gather(")[0] for line in lines]
    return [math.prod(map(int, dims.split(","))) for shape in shapes for dims in re.findall(r"\w\[([\d,]+)\]", shape)]


def test_a_way_that_the_partitioner_does_not_know_is_heard():
    """{8 rows} to {columns over two axes, depth over the third}: a check that the next test can detect anything."""
    mesh = parallel.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    between = lambda x, *specs: functools.reduce(lambda x, s: jnp.sin(jax.lax.with_sharding_constraint(x, s)), specs, x)
    f = lambda x: between(x, jax.P(("data", "fsdp", "tensor")), jax.P(None, ("tensor", "fsdp"), "data"))
    with jax.set_mesh(mesh), heard() as told:
        jax.jit(f).lower(jax.ShapeDtypeStruct((8, 8, 8), jnp.float32)).compile()
    assert "nvoluntary full rematerialization" in told[0]


WAYS = [(name, "", "adamw") for name in MESHES]
WAYS += [(name, *how) for name in PRESETS for how in [("windowed experts", "adamw"), ("", "muon")]]


@pytest.mark.parametrize(("name", "kind", "optimizer"), WAYS)
def test_no_array_is_made_whole_for_want_of_a_way_between_two_shardings(name, kind, optimizer):
    assert "nvoluntary full rematerialization" not in program(name, kind, optimizer)[2]


def too_large(built, text: str) -> tuple[set[int], set[int]]:
    """Gathered sizes that match (stacks of all layers of a device, whole or split by axes other than fsdp; activations of more
    rows than a device has).
    """
    shape, sizes = built.mesh.shape, set(gathered(text))
    others = [shape[axis] for axis in ("tensor", "expert", "stage")]
    cuts = {math.prod(part) for n in range(4) for part in itertools.combinations(others, n)}
    layers = jax.tree.leaves(built.shapes.params["layers"])
    alone = jax.tree.leaves({name: part for name, part in built.shapes.params.items() if name != "layers"})
    stacked = {leaf.size // n for leaf in layers if leaf.ndim > 2 for n in cuts}
    weights = {size // n for size in [leaf.size for leaf in alone] + [leaf.size // L for leaf in layers] for n in cuts}
    rows = B // math.prod(shape[axis] for axis in ("data", "fsdp", "expert"))
    return stacked & sizes, {size for size in sizes - weights if size > rows * T * D}


@pytest.mark.parametrize(("kind", "optimizer"), [("", "adamw"), ("windowed experts", "adamw"), ("", "muon")])
@pytest.mark.parametrize("preset", PRESETS)
def test_no_device_gathers_all_layers_or_the_whole_batch(preset, kind, optimizer):
    built, text, _ = program(preset, kind, optimizer)
    assert bool(gathered(text)) == (preset != "dp"), "the text is read"
    assert too_large(built, text) == (set(), set())


@pytest.mark.parametrize("preset", PRESETS)
def test_bytes_move_along_the_axes_of_the_preset_alone(preset):
    built, text, _ = program(preset)
    found = collectives(text, dict(built.mesh.shape), np.arange(8).reshape(built.mesh.devices.shape))
    used = {axis for c in found if c["bytes"] > 1000 for axis in c["axes"].split("+")}
    assert used == {axis for axis, n in built.mesh.shape.items() if n > 1}


def _axes_of_layers(preset: str):
    built = program(preset)[0]
    with jax.set_mesh(built.mesh):
        return gpt.logical_axes(built.model)["layers"]


@pytest.mark.parametrize("preset", ["fsdp", "fsdp_tensor"])
def test_a_gather_of_all_layers_is_seen(monkeypatch, preset):
    """Over fsdp alone: if tensor splits them too, a device then has a part of each."""
    real, axes = gpt.GPT.apply, _axes_of_layers(preset)
    not_over_fsdp = lambda names: parallel.spec(tuple(None if name == "embed" else name for name in names))
    specs = jax.tree.map(not_over_fsdp, axes, is_leaf=lambda x: isinstance(x, tuple))

    def apply(model, variables, *args, **more):
        layers = jax.tree.map(jax.lax.with_sharding_constraint, variables["params"]["layers"], specs)
        return real(model, {"params": variables["params"] | {"layers": layers}}, *args, **more)

    monkeypatch.setattr(gpt.GPT, "apply", apply)
    built, text, _ = program.__wrapped__(preset)
    assert too_large(built, text)[0]


def test_a_gather_of_half_the_width_of_all_rows_is_seen(monkeypatch):
    real = gpt.between_blocks
    all_rows = lambda x: jax.lax.with_sharding_constraint(real(x), jax.P(None, None, "tensor"))
    monkeypatch.setattr(gpt, "between_blocks", all_rows)
    built, text, _ = program.__wrapped__("fsdp_tensor")
    assert B * T * D // 2 in too_large(built, text)[1]


def sent(name: str, kind: str, axis: str) -> tuple[int, int]:
    """(count, bytes per device) of this kind of collective over this axis alone."""
    built, text, _ = program(name)
    found = collectives(text, dict(built.mesh.shape), np.arange(8).reshape(built.mesh.devices.shape))
    return next((c["count"], c["bytes"]) for c in found if (c["kind"], c["axes"]) == (kind, axis))


def test_a_ring_sends_keys_round_three_times_and_their_gradients_once():
    """Forward, recomputed, backward: keys, values and their segments go to all other devices; gradients also return home."""
    C, rows = 4, B // 2
    key, segment = rows * (T // C) * D * 4, rows * HEADS * (T // C) * 4
    zigzag = 2 * 5  # both halves of a row of tokens, positions, segments, targets and weights
    count = L * (3 * 3 * (C - 1) + 2 * C) + zigzag
    size = L * (3 * (C - 1) * (2 * key + segment) + C * 2 * key) + zigzag * rows * (T // C // 2) * 4
    # A compiler may notice that segments are the same in all layers and send them once.
    assert sent("context=4", "collective-permute", "context") == pytest.approx((count, size), rel=0.1)


def test_rows_go_to_their_experts_and_back_three_times():
    """Forward, recomputed, and gradients. XLA:CPU sends everything that a device might have for another."""
    p, k = 2, 2
    room = p * (B // 8 * T * k) * D * 4
    assert sent("expert", "all-to-all", "expert") == (L * 3 * 2, L * 3 * 2 * room)


def test_stages_pass_each_micro_batch_on_and_its_gradient_back():
    S, M = 2, 4
    passed = B // 4 // M * T * D * 4
    assert sent("pipeline", "collective-permute", "stage") == (2 * (M + S - 1), 2 * (M + S - 1) * passed)
