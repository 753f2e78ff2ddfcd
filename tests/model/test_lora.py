"""Adapters compute what the merged weights compute, on any mesh; fresh ones change nothing. Only they are trained.

B rows, T positions, V vocabulary
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt4o_jax.config_finetune import LoraConfig
from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.model import gpt, lora
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.training import program
from gpt4o_jax.training.optimizer import OPTIMIZERS
from gpt4o_jax.training.step import gradients, loss_sum
from tests.parallel.meshes import B, T, V, assert_equal, batch, mesh_of

FLOAT32 = Compute("cpu", "float32")
SMALL = ModelConfig(
    vocab_size=V, context_length=T, n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, init_std=0.2, compute_dtype="float32"
)
# Every kind of layer: dense and gated, experts and shared experts, attention with biases, a multi-token-prediction head.
MIXED = dataclasses.replace(
    SMALL, n_experts=4, expert_d_ff=12, n_shared_experts=1, moe_every=2, mlp="swiglu", mtp_heads=1, qkv_bias=True,
    output_init="scaled",
)  # fmt: skip
LORA = LoraConfig(rank=3, alpha=6.0)
MODEL = gpt.GPT(MIXED, FLOAT32)


def trees(c: LoraConfig, spread: float):
    """(base, adapters) with random B of this spread. Needs a current mesh."""
    base = jax.jit(functools.partial(gpt.init, MODEL))(jax.random.key(1))
    adapters = lora.init(c, gpt.logical_axes(MODEL), base, jax.random.key(2))
    random = np.random.default_rng(0)
    given = lambda path, x: spread * random.normal(size=x.shape).astype(np.float32) if path[-1].key == "B" else x
    return base, jax.tree_util.tree_map_with_path(given, adapters)


@functools.partial(jax.jit, static_argnums=2)
def outputs(params, rows, ahead: bool = True):
    hidden, _, aux = MODEL.apply({"params": params}, rows.tokens, rows.positions, rows.segments, ahead=ahead)
    return gpt.unembed(MODEL, params, hidden), aux["ahead_nBTD"]


def close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.max(np.abs(b)), rtol=0)


def test_fresh_adapters_change_nothing(one_device):
    base, adapters = trees(LORA, 0.0)
    got, wanted = (outputs(p, batch(True)) for p in (lora.beside(base, adapters, LORA.scale), base))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_every_hidden_matrix_can_have_one_and_counts(one_device):
    """Adapters change what the model computes just as the merged weights do, and every adapter changes its weight."""
    axes = gpt.logical_axes(MODEL)
    ends = {path.split("/", 1)[1] for path in lora.adaptable(axes)}
    attention = {f"attention/{name}" for name in ("query", "key", "value", "output")}
    gated = lambda name: {f"{name}/{matrix}" for matrix in ("gate", "up", "down")}
    layers = [attention | gated("mlp"), attention | gated("moe") | gated("moe/shared")]
    wanted = {f"block_{i}/{end}" for i, layer in enumerate(layers) for end in layer}
    assert ends == wanted | {f"block/{end}" for end in layers[1]} | {"join"}
    base, adapters = trees(LORA, 0.1)
    plain, rows = outputs(base, batch(True)), batch(True)
    got = outputs(lora.beside(base, adapters, LORA.scale), rows)
    merged = lora.merged(jax.tree.map(np.copy, base), adapters, LORA.scale)
    jax.tree.map(close, got, outputs(merged, rows))
    assert np.max(np.abs(got[0] - plain[0])) > 0.1
    differ = jax.tree.map(lambda a, b: bool(np.any(a != b)), merged, base)
    flat = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(differ)}
    assert {path for path, changed in flat.items() if changed} == set(lora.adaptable(axes))


def test_merging_is_undone_to_1e_6(one_device):
    base, adapters = trees(LORA, 0.5)
    kept = jax.tree.map(np.copy, base)
    back = lora.merged(lora.merged(base, adapters, LORA.scale), adapters, -LORA.scale)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=0), back, kept)


def test_gradients_are_those_through_the_merged_weights(one_device):
    base, adapters = trees(LORA, 0.1)
    rows = batch(True)
    loss = lambda params: loss_sum(MODEL, params, rows, 8, mtp_weight=0.3)[0]
    got = jax.jit(jax.grad(lambda a: loss(lora.beside(base, a, LORA.scale))))(adapters)
    wanted = jax.jit(jax.grad(lambda a: loss(lora.merged.__wrapped__(base, a, LORA.scale))))(adapters)
    jax.tree.map(close, got, wanted)


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=2, expert=4), dict(data=4, stage=2)])
def test_any_mesh_computes_the_same(sizes):
    """With stages, all layers are of one kind."""
    model = gpt.GPT(SMALL if "stage" in sizes else MIXED, FLOAT32)
    c = RunConfig(model=model.config, train=TrainConfig(batch_size=B, loss_chunk=3), lora=LORA)

    def compute(mesh):
        with jax.set_mesh(mesh):
            axes = gpt.logical_axes(model)
            base = jax.jit(functools.partial(gpt.init, model), out_shardings=parallel.shardings(axes, mesh))(jax.random.key(1))
            by_adapter = parallel.shardings(lora.logical_axes(LORA, axes), mesh)
            adapters = lora.init(LORA, axes, base, jax.random.key(2))
            adapters = jax.device_put(jax.tree.map(lambda x: x + 0.1, adapters), by_adapter)
            rows = jax.device_put(batch(True), jax.sharding.NamedSharding(mesh, parallel.spec(("batch", "seq"))))
            f = jax.jit(lambda a, base: gradients(model, a, rows, c, jax.random.key(0), base=base))
            return jax.device_get(f(adapters, base))

    assert_equal(compute(mesh_of(**sizes)), compute(parallel.make_mesh(devices=jax.devices()[:1])))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_adapters_are_trained(name):
    """By every optimizer, with weight decay and an average: the base keeps its bits and has no optimizer state."""
    schedule = "constant" if name == "schedule_free" else "cosine"
    optimizer = OptimizerConfig(name=name, warmup_steps=0, schedule=schedule, ema_decay=0.0 if name == "schedule_free" else 0.9)
    train = TrainConfig(batch_size=B, loss_chunk=8, steps_per_dispatch=2)
    c = RunConfig(model=SMALL, optimizer=optimizer, train=train, lora=LORA)
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        made = program.build(c, mesh)
        state = made.fresh(jax.random.key(0))
        before = jax.tree.map(np.copy, (state.base, state.params))
        rows = jax.tree.map(lambda x: np.stack([x, x]), batch(True))
        after, metrics = made.compile(10, np.ones(V, np.int32))(state, jax.device_put(rows, made.batch_sharding))
    jax.tree.map(np.testing.assert_array_equal, after.base, before[0])
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), after.params, before[1])
    assert all(jax.tree.leaves(moved))
    assert metrics["loss"][1] < metrics["loss"][0]
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert size(after.opt_state) <= 2 * size(after.params) + 100 < size(after.base)


def test_at_rank_16_few_numbers_are_trained_and_less_memory_is_needed():
    """GPT-2's size, rank 16 everywhere; parameters, optimizer and gradients counted from arrays."""
    sizes = ModelConfig(
        vocab_size=50_257, context_length=1024, n_layers=12, d_model=768, n_heads=12, tied=True, compute_dtype="float32"
    )
    mesh = parallel.make_mesh(devices=jax.devices()[:1])

    def count(rank: int):
        shapes = program.build(RunConfig(model=sizes, lora=LoraConfig(rank=rank)), mesh).shapes
        size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
        bytes_of = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
        gradients = bytes_of(shapes.params)
        return size(shapes.params), bytes_of((shapes.base, shapes.params, shapes.opt_state)) + gradients

    (whole, whole_bytes), (few, few_bytes) = count(0), count(16)
    said = (round(100 * few / whole, 1), round(100 * few_bytes / whole_bytes))
    assert said == (2.1, 27)  # as in README; the targets are 3 and 60


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        (("*/attention/query", "*/attention/value"), {"layers/attention/query", "layers/attention/value"}),
        (("layers/mlp/*",), {"layers/mlp/up", "layers/mlp/down"}),
        (("*/value", "*/v*"), {"layers/attention/value"}),
    ],
)
def test_patterns_choose_by_path(one_device, targets, paths):
    axes = gpt.logical_axes(gpt.GPT(SMALL, FLOAT32))
    assert set(lora.chosen(LoraConfig(rank=1, targets=targets), axes)) == paths


@pytest.mark.parametrize("pattern", ["attention/q", "*/attention_norm/scale", "embedding", ""])
def test_a_pattern_that_matches_nothing_is_told(one_device, pattern):
    axes = gpt.logical_axes(gpt.GPT(SMALL, FLOAT32))
    with pytest.raises(RunError, match=r"matches no weight that can have an adapter.*layers/attention/query") as e:
        lora.chosen(LoraConfig(rank=1, targets=("*/mlp/up", pattern)), axes)
    assert e.value.code == ExitCode.USAGE
