"""The same numbers on any mesh: eight (fake) devices, however they are arranged, compute what one device computes.

Gradients agree leaf by leaf to 1e-5 of the leaf's largest entry. Ten steps of training may drift apart by at most four
times as much as one device drifts from itself when the rows of its batches are permuted.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt4o_jax.data.batches import Batch
from gpt4o_jax.model import gpt
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.training.optimizer import OPTIMIZERS, make_optimizer
from gpt4o_jax.training.program import build
from gpt4o_jax.training.state import create, state_shardings
from gpt4o_jax.training.step import gradients, make_step

B, T, V, STEPS = 8, 8, 48, 10
MODEL = gpt.GPT(
    ModelConfig(
        vocab_size=V, context_length=T, n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, positions="learned",
        output_init="scaled", init_std=0.2,
    ),
    Compute("cpu", "float32"),
)  # fmt: skip
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "data and tensor": MeshConfig(data=4, tensor=2),
    "all three": MeshConfig(data=2, fsdp=2, tensor=2),
}


def config(optimizer: str, accumulate: int = 1) -> RunConfig:
    return RunConfig(
        model=MODEL.config,
        optimizer=OptimizerConfig(name=optimizer, peak_lr=3e-3, schedule="constant", warmup_steps=2, ema_decay=0.9),
        train=TrainConfig(batch_size=B, loss_chunk=3, accumulate=accumulate),
    )


def batches(permuted: int | None = None) -> Batch:
    """[STEPS, B, T], every step the same rows of different lengths; permuted: in another order."""
    random = np.random.default_rng(0)
    tokens = random.integers(4, V, (B, T + 1)).astype(np.int32)
    index = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    real = index < random.integers(2, T + 1, (B, 1))
    order = np.arange(B) if permuted is None else np.random.default_rng(permuted).permutation(B)
    arrays = (tokens[:, :-1], tokens[:, 1:], real.astype(np.float32), index, real.astype(np.int32))
    return Batch(*(np.stack([x[order]] * STEPS) for x in arrays))


def mesh_of(name: str | None):
    return parallel.make_mesh(MESHES[name]) if name else parallel.make_mesh(devices=jax.devices()[:1])


def initial_state(mesh, c: RunConfig):
    """(state, its shardings, optimizer), as training makes them. Needs the mesh in force."""
    axes = gpt.logical_axes(MODEL)
    optimizer = make_optimizer(c.optimizer, axes)
    fresh = functools.partial(create, functools.partial(gpt.init, MODEL), optimizer, ema=True)
    shardings = state_shardings(jax.eval_shape(fresh, jax.random.key(0)), axes, mesh)
    return jax.jit(fresh, out_shardings=shardings)(jax.random.key(0)), shardings, optimizer


@functools.cache
def loss_and_gradients(name: str | None, accumulate: int):
    mesh = mesh_of(name)
    with jax.set_mesh(mesh):
        shardings = parallel.shardings(gpt.logical_axes(MODEL), mesh)
        params = jax.jit(functools.partial(gpt.init, MODEL), out_shardings=shardings)(jax.random.key(1))
        batch = jax.device_put(jax.tree.map(lambda x: x[0], batches()), sharding(mesh, ("batch", "seq")))
        whole = jax.sharding.NamedSharding(mesh, jax.P())
        f = functools.partial(gradients, MODEL, config=config("adamw", accumulate), key=jax.random.key(0))
        return jax.device_get(jax.jit(f, out_shardings=(whole, shardings, whole))(params, batch))


def sharding(mesh, names):
    return jax.sharding.NamedSharding(mesh, parallel.spec(names))


def train(name: str | None, optimizer: str, permutations=(None,)):
    """(losses, parameters) of ten steps from the same start, for each order of the rows."""
    mesh, c = mesh_of(name), config(optimizer)
    with jax.set_mesh(mesh):
        state, shardings, transformation = initial_state(mesh, c)
        step = make_step(MODEL, transformation, c, STEPS, np.ones(V))
        rows, whole = sharding(mesh, (None, "batch", "seq")), jax.sharding.NamedSharding(mesh, jax.P())
        jitted = jax.jit(step, in_shardings=(shardings, rows), out_shardings=(shardings, whole))
        results = []
        for permuted in permutations:
            after, metrics = jitted(state, jax.device_put(batches(permuted), rows))
            results.append(jax.device_get((metrics["loss"], after.params)))
        return results


def distance(a, b) -> float:
    """Euclidean, over all parameters, in float64."""
    squares = jax.tree.map(lambda x, y: np.sum(np.square(x.astype(np.float64) - y)), a, b)
    return math.sqrt(sum(jax.tree.leaves(squares)))


@pytest.mark.parametrize("name", MESHES)
def test_loss_and_gradients_equal_one_device(name):
    losses, grads, weight = loss_and_gradients(name, 1)
    wanted_losses, wanted, wanted_weight = loss_and_gradients(None, 1)
    np.testing.assert_allclose(losses["loss"], wanted_losses["loss"], rtol=1e-5)
    assert weight == wanted_weight
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(grads), strict=True):
        assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(a)), jax.tree_util.keystr(path)


def test_accumulation_on_a_mesh_equals_one_device():
    _, grads, _ = loss_and_gradients("data and tensor", 2)
    _, wanted, _ = loss_and_gradients(None, 1)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(grads), strict=True):
        assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(a)), jax.tree_util.keystr(path)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_drifts_no_more_than_a_permutation_of_rows(optimizer):
    (losses, params), *controls = train(None, optimizer, (None, 1, 2, 3))
    assert losses[-1] < losses[0]
    for name in ("fsdp", "all three") if optimizer in ("adamw", "muon") else ("all three",):
        [(other_losses, other_params)] = train(name, optimizer)
        assert distance(params, other_params) <= 4 * max(distance(params, p) for _, p in controls)
        assert np.max(np.abs(losses - other_losses)) <= 4 * max(np.max(np.abs(losses - x)) for x, _ in controls)


@pytest.mark.parametrize("name", ["fsdp", "all three"])
def test_random_init_does_not_depend_on_the_mesh(name):
    """Bit for bit, though every device makes only its own shards."""

    def born_in_shards(mesh):
        with jax.set_mesh(mesh):
            shardings = parallel.shardings(gpt.logical_axes(MODEL), mesh)
            return jax.device_get(jax.jit(functools.partial(gpt.init, MODEL), out_shardings=shardings)(jax.random.key(0)))

    jax.tree.map(np.testing.assert_array_equal, born_in_shards(mesh_of(name)), born_in_shards(mesh_of(None)))


@pytest.mark.parametrize("name", ["fsdp", "all three"])
def test_a_device_makes_its_own_shards_and_no_more(name):
    """As the compiler counts: what creation returns on a device is its part of the state, and so is the room that it takes."""
    big = ModelConfig(vocab_size=512, context_length=32, n_layers=4, d_model=64, n_heads=4, d_ff=256, compute_dtype="float32")
    built = build(RunConfig(model=big, mesh=MESHES[name]), mesh_of(name))
    with jax.set_mesh(built.mesh):
        memory = jax.jit(built.fresh).lower(jax.random.key(0)).compile().memory_analysis()
    matrices = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(built.shapes) if x.ndim > 1)
    parts = 8 if name == "fsdp" else 4  # of all three, data holds copies
    assert memory.output_size_in_bytes <= 1.02 * matrices / parts
    assert memory.temp_size_in_bytes <= matrices / parts


# Where each axis of a leaf lies on the mesh "all three": 2 stands for two shards, 1 for the axis whole.
SHARDS = {
    "['embedding']": (2, 2),
    "['unembedding']": (2, 2),
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
    """Parameters, averages and optimizer moments alike; what is left is scalars, and Adafactor's rows and columns."""
    mesh = mesh_of("all three")
    with jax.set_mesh(mesh):
        state, _, _ = initial_state(mesh, config(optimizer))
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
        matrix = len(SHARDS[name]) > 2  # of these Muon keeps one moment, of the rest two like AdamW
        kept = {"lion": 1, "muon": 1 if matrix else 2}.get(optimizer, 2)
        assert times == 2 + kept, name
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state.params))
