"""A pipeline computes what one device computes, with a schedule that skips no item.

Gradients agree leaf by leaf to 1e-5 of the leaf's largest entry. More meshes and models: tests/parallel/test_meshes.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import MeshConfig, ModelConfig, RunConfig, TrainConfig, freeze
from gpt4o_jax.config_mesh import AXES
from gpt4o_jax.config_rules import validate_sizes
from gpt4o_jax.data.batches import Batch
from gpt4o_jax.errors import RunError
from gpt4o_jax.model import gpt, stages, vocabulary
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.parallel import pipeline
from gpt4o_jax.training.step import gradients

B, T, V = 16, 8, 48
MODELS = {
    "dense": dict(residual_mix=True, value_embeddings=1),
    "windowed": dict(layer_pattern=("local", "global"), window=3, remat="full"),
}
CASES = {
    "stage 2, fsdp 2, tensor 2": ("dense", dict(stage=2, fsdp=2, tensor=2, pipeline_microbatches=2)),
    "stage 2, fsdp 2, tensor 2, twice round": (
        "dense",
        dict(stage=2, fsdp=2, tensor=2, pipeline_repeats=2, pipeline_microbatches=2),
    ),
    "stage 2, context 2, fsdp 2": ("windowed", dict(stage=2, context=2, fsdp=2, pipeline_microbatches=4)),
}


def packed() -> Batch:
    """Rows of three documents of different lengths, and padding."""
    random = np.random.default_rng(0)
    tokens = random.integers(4, V, (B, T + 1)).astype(np.int32)
    segments = np.sort(random.integers(1, 4, (B, T)), axis=1).astype(np.int32)
    positions = np.stack([np.arange(T) - np.searchsorted(row, row) for row in segments]).astype(np.int32)
    segments[np.arange(T) >= random.integers(T // 2, T + 1, (B, 1))] = 0
    return Batch(tokens[:, :-1], tokens[:, 1:], (segments > 0).astype(np.float32), positions, segments)


def loss_and_gradients(name: str, mesh_config: MeshConfig, devices: int):
    shape = dict(vocab_size=V, context_length=T, n_layers=4, d_model=16, n_heads=4, n_kv_heads=2, output_init="scaled")
    train = TrainConfig(batch_size=B, loss_chunk=T)
    config = RunConfig(model=ModelConfig(**shape, init_std=0.2, **MODELS[name]), train=train, mesh=mesh_config)
    mesh = parallel.make_mesh(mesh_config, jax.devices()[:devices])
    order = (mesh_config.pipeline_repeats, mesh_config.pipeline_microbatches)
    model = gpt.GPT(config.model, Compute("cpu", "float32"), order)
    named = lambda names: jax.sharding.NamedSharding(mesh, parallel.spec(names))
    with jax.set_mesh(mesh):
        shardings = parallel.shardings(gpt.logical_axes(model), mesh)
        params = jax.jit(functools.partial(gpt.init, model), out_shardings=shardings)(jax.random.key(1))
        f = functools.partial(gradients, model, config=config, key=jax.random.key(0))
        f = jax.jit(f, out_shardings=(named(()), shardings, named(())))
        return jax.device_get(f(params, jax.device_put(packed(), named(("batch", "seq")))))


@functools.cache
def on_one_device(name: str):
    return loss_and_gradients(name, MeshConfig(), 1)


def worst(wanted, grads) -> tuple[float, str]:
    """The largest difference of a leaf relative to its largest entry, and which leaf."""
    leaves = zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(grads), strict=True)
    return max((np.max(np.abs(a - b)) / np.max(np.abs(a)), jax.tree_util.keystr(path)) for (path, a), b in leaves)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_one_device(case, capfd):
    name, mesh = CASES[case]
    parts, grads, weight = loss_and_gradients(name, MeshConfig(**dict(data=1) | mesh), 8)
    assert "nvoluntary full rematerialization" not in capfd.readouterr().err
    wanted_parts, wanted, wanted_weight = on_one_device(name)
    assert weight == wanted_weight
    np.testing.assert_allclose(parts["loss"], wanted_parts["loss"], rtol=1e-5)
    distance, leaf = worst(wanted, grads)
    assert distance <= 1e-5, leaf


def _with_permuted(what: str):
    """pipeline.pipeline with each micro-batch in its neighbour's place."""
    real = pipeline.pipeline

    def wrong(stage, layers, x_Mb, others_Mb, order):
        if what == "what enters":
            return real(stage, layers, jnp.roll(x_Mb, 1, axis=0), others_Mb, order)
        done_Mb, told = real(stage, layers, x_Mb, others_Mb, order)
        return jnp.roll(done_Mb, 1, axis=0), told

    return wrong


@pytest.mark.parametrize("what", ["what enters", "what comes out"])
def test_a_wrong_order_of_micro_batches_shows_in_the_gradients(monkeypatch, what):
    _, wanted, wanted_weight = on_one_device("dense")
    monkeypatch.setattr(stages, "pipeline", _with_permuted(what))
    _, grads, weight = loss_and_gradients("dense", MeshConfig(stage=4, data=2), 8)
    assert weight == wanted_weight and worst(wanted, grads)[0] > 1e-3


@pytest.mark.parametrize(("rows", "share"), [(8, 1 / 4), (6, 1)])
def test_stages_share_the_head(rows, share):
    """As counted by the compiler: each does a quarter of one device's work, or all of it if rows do not divide."""
    c, compute = ModelConfig(vocab_size=V, d_model=16, tied=True), Compute("cpu", "float32")
    flat = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    hidden, ints, floats = flat(np.float32, rows, T, 16), flat(np.int32, rows, T), flat(np.float32, rows, T)

    def work(sizes: MeshConfig, devices: int) -> float:
        loss = lambda table, *args: vocabulary.head_losses(c, compute, {"embedding": table}, *args, chunk=T).total
        with jax.set_mesh(parallel.make_mesh(sizes, jax.devices()[:devices])):
            compiled = jax.jit(jax.grad(loss)).lower(flat(np.float32, V, 16), hidden, ints, floats).compile()
        return compiled.cost_analysis()["flops"]

    assert work(MeshConfig(data=1, stage=4), 4) == pytest.approx(share * work(MeshConfig(), 1), rel=0.05)


@pytest.mark.parametrize(("S", "R", "M"), [(2, 1, 1), (4, 1, 3), (4, 1, 8), (2, 2, 2), (4, 3, 8), (3, 2, 2)])
def test_the_schedule_has_every_item_once_in_every_stage(S, R, M):
    order = pipeline.Schedule(S, R, M)
    enters = {(r, m): r * order.between + m for r in range(R) for m in range(M)}
    assert len(set(enters.values())) == R * M
    assert max(enters.values()) + S == order.steps
    assert order.bubble == 1 - R * M / order.steps
    if M >= S:
        np.testing.assert_allclose(order.bubble, (S - 1) / (R * M + S - 1))
    assert all(enters[r + 1, m] >= step + S for (r, m), step in enters.items() if r + 1 < R), "back before it goes round again"


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"mesh.pipeline_repeats": 2}, "does nothing without stages"),
        ({"mesh.stage": 2, "mesh.pipeline_microbatches": 3}, "nearest: pipeline_microbatches=2"),
        ({"mesh.stage": 2, "mesh.pipeline_repeats": 2, "train.batch_size": 1}, "train.batch_size=2"),
        ({"mesh.stage": 2, "mesh.pipeline_repeats": 3}, "nearest: model.n_layers=6"),
        ({"mesh.stage": 3}, "nearest: model.n_layers=6"),
    ],
)
def test_what_does_not_fit_is_one_line(knobs, said):
    with pytest.raises(RunError, match=said):
        config = freeze({"model.vocab_size": 64, "model.n_layers": 4, "train.batch_size": 8} | knobs)
        validate_sizes(config, dict.fromkeys(AXES, 1) | {"stage": config.mesh.stage})
