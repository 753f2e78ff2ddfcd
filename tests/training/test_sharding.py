"""Every device creates and keeps its own part of the state, and the numbers do not depend on the sharding.

That loss, gradients and training are the same on any mesh: tests/parallel/test_meshes.py.
"""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from gpt4o_jax.config_mesh import AXES, PRESETS
from gpt4o_jax.errors import RunError
from gpt4o_jax.model import gpt
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.parallel import mesh as mesh_module
from gpt4o_jax.training.optimizer import OPTIMIZERS, make_optimizer
from gpt4o_jax.training.program import build
from tests.parallel.meshes import MODELS, initial_state, mesh_of, one_device, with_optimizer

MESHES = {"fsdp": dict(preset="fsdp"), "all three": dict(data=2, fsdp=2, tensor=2)}


# Every preset, with experts if it has an axis for them.
BORN = {preset: (dict(preset=preset), "experts" if preset == "expert" else "dense") for preset in PRESETS}
BORN["all three"] = (MESHES["all three"], "experts")


@functools.cache
def born_in_shards(sizes: tuple, model: str):
    mesh, model = mesh_of(**dict(sizes)) if sizes else one_device(), gpt.GPT(MODELS[model], Compute("cpu", "float32"))
    with jax.set_mesh(mesh):
        shardings = parallel.shardings(gpt.logical_axes(model), mesh)
        return jax.device_get(jax.jit(functools.partial(gpt.init, model), out_shardings=shardings)(jax.random.key(0)))


@pytest.mark.parametrize("name", BORN)
def test_random_init_does_not_depend_on_the_mesh(name):
    """Bit for bit, although every device creates only its own shards."""
    sizes, model = BORN[name]
    jax.tree.map(np.testing.assert_array_equal, born_in_shards(tuple(sizes.items()), model), born_in_shards((), model))


@pytest.mark.parametrize(
    ("names", "spec"),
    [
        (("batch", "residual", "embed"), (("data", "fsdp", "expert"), ("context", "tensor"), None)),  # an activation
        (("vocab", "embed"), ("tensor", "fsdp")),
        (("embed", "heads", "mlp"), ("fsdp", "tensor", None)),
        (("mlp", "heads"), ("tensor", None)),  # the order of the array's axes decides, not the table's
        (("batch", "expert"), (("data", "fsdp", "expert"), None)),
        (("expert", "batch"), ("expert", ("data", "fsdp"))),  # of several mesh axes, the second gets those that are left
        (("layers", "staged_batch"), ("stage", ("data", "fsdp", "expert"))),
        ((None, "norm", "heads"), (None, None, "tensor")),
    ],
)
def test_an_axis_of_the_mesh_goes_to_the_first_that_wants_it(names, spec):
    assert parallel.spec(names) == jax.P(*spec)


@pytest.mark.parametrize("name", MESHES)
def test_a_device_makes_its_own_shards_and_no_more(name):
    """As counted by the compiler: a device's output is its part of the state, and its temporaries are no larger."""
    big = ModelConfig(vocab_size=512, context_length=32, n_layers=4, d_model=64, n_heads=4, d_ff=256, compute_dtype="float32")
    built = build(RunConfig(model=big, mesh=MeshConfig(**MESHES[name])), mesh_of(**MESHES[name]))
    with jax.set_mesh(built.mesh):
        memory = jax.jit(built.fresh).lower(jax.random.key(0)).compile().memory_analysis()
        state = built.fresh(jax.random.key(0))
    matrices = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(built.shapes) if x.ndim > 1)
    parts = 8 if name == "fsdp" else 4  # in "all three", data holds copies
    assert memory.output_size_in_bytes <= 1.02 * matrices / parts
    assert memory.temp_size_in_bytes <= matrices / parts
    whole, held = 0, collections.Counter()  # and as counted from the arrays, including norms and counters
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        whole += leaf.nbytes
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert len(held) == 8 and max(held.values()) <= (1 / parts + 0.02) * whole


# Number of shards along each axis of a leaf on the mesh "all three".
SHARDS = {
    "['embedding']": (2, 2),
    "['positions']": (1, 2),
    "['layers']['attention']['query']": (1, 2, 2, 1),
    "['layers']['attention']['key']": (1, 2, 2, 1),
    "['layers']['attention']['output']": (1, 2, 1, 2),
    "['layers']['mlp']['up']": (1, 2, 2),
    "['layers']['mlp']['down']": (1, 2, 2),
    "['layers']['attention_norm']['scale']": (1, 1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_part_of_the_state_lies_in_the_shards_of_its_parameter(optimizer):
    """Parameters, averages and optimizer moments alike; the rest is scalars, and Adafactor's rows and columns."""
    mesh = mesh_of(**MESHES["all three"])
    with jax.set_mesh(mesh):
        _, _, state, _ = initial_state(with_optimizer("dense", optimizer), mesh)
    shapes = {jax.tree_util.keystr(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(state.params)}
    seen = dict.fromkeys(SHARDS, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state, state.ema)):
        name = next((n for n in shapes if jax.tree_util.keystr(path).endswith(n)), None)
        if name is None or (optimizer == "adafactor" and leaf.shape != shapes[name]):
            assert leaf.sharding.is_fully_replicated and leaf.ndim <= 2
            assert leaf.ndim == 0 or optimizer == "adafactor"
        elif name in SHARDS:
            parts = tuple(n // part for n, part in zip(leaf.shape, leaf.addressable_shards[0].data.shape, strict=True))
            assert parts == SHARDS[name], jax.tree_util.keystr(path)
            seen[name] += 1
    for name, times in seen.items():
        matrix = len(SHARDS[name]) > 2  # for these Muon keeps one moment, for the rest two like AdamW
        kept = {"lion": 1, "muon": 1 if matrix else 2}.get(optimizer, 2)
        assert times == 2 + kept, name
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state.params))


@dataclasses.dataclass(frozen=True)
class Device:
    """The attributes that a mesh needs of a device that is not here."""

    id: int
    platform: str
    slice_index: int
    process_index: int
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0
    device_kind: str = "TPU v5 lite"


def crossed(monkeypatch, devices: list[Device], **sizes: int) -> set[str]:
    """The mesh axes that cross from slice to slice."""
    monkeypatch.setattr(mesh_module, "Mesh", lambda laid, axes, axis_types: laid)
    laid = mesh_module.make_mesh(MeshConfig(**sizes), devices)
    slices = np.array([d.slice_index for d in laid.flat]).reshape(laid.shape)
    return {axis for i, axis in enumerate(AXES) if np.any(slices != np.take(slices, [0], axis=i))}


@pytest.mark.parametrize(
    ("sizes", "outermost"),
    [
        (dict(data=2, fsdp=8), "data"),
        (dict(data=2, fsdp=2, tensor=4), "data"),
        (dict(data=4, context=2, tensor=2), "data"),
        (dict(data=1, fsdp=4, context=2, stage=2), "fsdp"),
        (dict(data=1, fsdp=2, expert=8), "fsdp"),
    ],
)
def test_only_the_outermost_axis_runs_from_slice_to_slice(monkeypatch, sizes, outermost):
    """Two slices of v5e:2x4, as JAX describes them."""
    devices = [Device(i, "tpu", i // 8, i // 4, (i % 2, i // 2 % 4, 0)) for i in range(16)]
    assert crossed(monkeypatch, devices, **sizes) == {outermost}
    with pytest.raises(RunError, match="2 slices: they lie along"):
        crossed(monkeypatch, devices, data=1, tensor=16)


@pytest.mark.parametrize(
    ("sizes", "axes", "told"),
    [
        (dict(data=2, fsdp=4), {"data"}, ""),
        (dict(data=2, context=2, tensor=2), {"data"}, ""),
        (dict(data=1, fsdp=4, tensor=2), {"fsdp"}, ""),
        (dict(data=1, tensor=8), {"tensor"}, "mesh.tensor=8 runs from host to host.* let tensor be at most its 4 GPUs"),
        (dict(data=1, tensor=4, stage=2), {"tensor"}, "mesh.tensor=4 .* let tensor x stage be at most its 4 GPUs"),
        (dict(data=1, context=2, tensor=4), {"context"}, "mesh.context=2 .* let context x tensor be at most its 4 GPUs"),
    ],
)
def test_gpus_of_several_hosts_are_one_mesh(monkeypatch, capsys, sizes, axes, told):
    """To JAX, each host's GPUs are a separate slice, and jax.make_mesh accepts only one slice."""
    devices = [Device(i, "gpu", i // 4, i // 4) for i in range(8)]
    assert crossed(monkeypatch, devices, **sizes) == axes
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(told) and re.search(told, "".join(lines))


# Meshes that split matrices by rows, by columns and by both, and stacks of layers and experts, which do not divide evenly.
SPLIT = [dict(fsdp=8), dict(data=2, tensor=4), dict(fsdp=4, tensor=2), dict(fsdp=2, tensor=2, stage=2), dict(expert=4, fsdp=2)]


@pytest.mark.parametrize("sizes", SPLIT, ids=str)
def test_muon_makes_the_same_update_of_sharded_matrices(sizes):
    """To rounding: a device has the matrices that it orthogonalises whole, but in other numbers at once."""
    grads, config = born_in_shards((), "experts"), OptimizerConfig(name="muon", weight_decay=0.0, clip_norm=0.0)

    def updates(mesh):
        with jax.set_mesh(mesh):
            axes = gpt.logical_axes(gpt.GPT(MODELS["experts"], Compute("cpu", "float32")))
            muon, shardings = make_optimizer(config, axes), parallel.shardings(axes, mesh)
            update = lambda grads: muon.update(grads, muon.init(grads), grads)[0]
            return jax.device_get(jax.jit(update, in_shardings=(shardings,), out_shardings=shardings)(grads))

    def close(got, wanted):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())

    jax.tree.map(close, updates(mesh_of(**sizes)), updates(one_device()))
