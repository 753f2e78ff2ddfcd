"""The reported load of experts is that of the real tokens, and the router's bias evens it.

B batch, T positions, E experts
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt4o_jax.data.batches import Batch
from gpt4o_jax.model import gpt, moe
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.training.optimizer import make_optimizer
from gpt4o_jax.training.state import create
from gpt4o_jax.training.step import gradients, loss_sum, make_step

B, T, V, E, K = 4, 10, 40, 4, 2
FLOAT32 = Compute("cpu", "float32")
MODEL = ModelConfig(
    vocab_size=V, context_length=T, n_layers=3, d_model=16, n_heads=2, d_ff=12, output_init="scaled", init_std=0.3,
    n_experts=E, experts_per_token=K, moe_every=2, n_shared_experts=1, router_bias=True,
)  # fmt: skip
EVERY = dataclasses.replace(MODEL, n_layers=2, moe_every=1)
CONFIG = RunConfig(
    model=MODEL,
    optimizer=OptimizerConfig(warmup_steps=0, decay_mask="all"),
    train=TrainConfig(batch_size=B, router_bias_rate=0.01),
)


def make(config=MODEL):
    model = gpt.GPT(config, FLOAT32)
    return model, jax.jit(functools.partial(gpt.init, model))(jax.random.key(0))


def batch_of(lengths, seed=0) -> Batch:
    """Rows with these numbers of real tokens; the rest is padding."""
    tokens = np.random.default_rng(seed).integers(4, V, (len(lengths), T + 1)).astype(np.int32)
    index = np.broadcast_to(np.arange(T, dtype=np.int32), (len(lengths), T))
    real = index < np.array(lengths)[:, None]
    return Batch(tokens[:, :-1], tokens[:, 1:], real.astype(np.float32), index, real.astype(np.int32))


def close(got, wanted):
    assert np.max(np.abs(got - wanted)) <= 1e-5 * np.max(np.abs(wanted))


@functools.partial(jax.jit, static_argnums=0)
def routings(model, params, batch):
    return model.apply({"params": params}, batch.tokens, batch.positions, batch.segments)[2]["routings"]


def test_padding_does_not_count(one_device):
    """Rows of 3 and 5 tokens, padded to 10, load the experts as they do alone, whatever the padding contains."""
    model, params = make()
    padded = routings(model, params, batch_of([3, 5]))
    parts = []
    for row, length in enumerate((3, 5)):
        alone = jax.tree.map(lambda x, row=row, length=length: x[row : row + 1, :length], batch_of([3, 5]))
        parts.append(routings(model, params, alone))
    jax.tree.map(lambda got, a, b: close(got, a + b), padded, *parts)
    assert jnp.sum(padded["layers"]["block_1"]["moe"].tokens_E) == (3 + 5) * K
    assert set(padded) == {"layers"}, "the third layer has no experts"


def test_losses_are_their_papers(one_device):
    """Switch's E sum f P and ST-MoE's mean of squared log-normalisers, from the router's own logits."""
    model, params = make(dataclasses.replace(EVERY, n_layers=1, n_shared_experts=0))
    batch = batch_of([T, 4])
    real = batch.segments > 0
    inputs = (batch.tokens, batch.positions, batch.segments)
    out, inside = jax.jit(lambda p: model.apply({"params": p}, *inputs, capture_intermediates=True))(params)
    x = np.asarray(inside["intermediates"]["layers"]["mlp_norm"]["__call__"][0][0], np.float64)[real]
    logits = x @ np.asarray(params["layers"]["moe"]["router"][0], np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    chosen = np.argsort(-p, axis=1)[:, :K]
    share = np.bincount(chosen.reshape(-1), minlength=E) / chosen.size
    balance, z = moe.losses(out[2]["routings"])
    close(balance, E * np.sum(share * p.mean(axis=0)))
    close(z, np.mean(np.log(np.exp(logits).sum(axis=1)) ** 2))


def test_the_objective_weighs_the_losses_by_the_batchs_tokens(one_device):
    model, params = make()
    batch = batch_of([T, 4])
    balance, z = moe.losses(routings(model, params, batch))
    loss = jax.jit(functools.partial(loss_sum, model, loss_chunk=T))
    plain, parts = loss(params, batch)
    total, _ = loss(params, batch, balance_loss=0.5, router_z_loss=0.25)
    close(total - plain, 14 * (0.5 * balance + 0.25 * z))
    close(parts["balance_loss"], 14 * balance)


def test_accumulated_micro_batches_count_the_load_of_all(one_device):
    model, params = make()
    batch = batch_of([3, 5, 10, 1])

    def load(accumulate):
        config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, accumulate=accumulate))
        return jax.jit(lambda p: gradients(model, p, batch, config, jax.random.key(0))[0]["load"])(params)

    jax.tree.map(np.testing.assert_array_equal, load(2), load(1))


@pytest.mark.parametrize("size", ["data", "fsdp", "tensor"])
def test_sharded_equals_one_device(size):
    """The loss, every gradient and the load."""
    batch, results = batch_of([T, 4, 7, 2]), []
    for axis, n in (("data", 1), (size, 2)):
        sizes = dict(data=1, fsdp=1, tensor=1) | {axis: n}
        mesh = parallel.make_mesh(dataclasses.replace(CONFIG.mesh, **sizes), jax.devices()[:n])
        with jax.set_mesh(mesh):
            model = gpt.GPT(EVERY, FLOAT32)
            place = parallel.shardings(gpt.logical_axes(model), mesh)
            params = jax.jit(functools.partial(gpt.init, model), out_shardings=place)(jax.random.key(0))
            loss = functools.partial(loss_sum, model, batch=batch, loss_chunk=T, balance_loss=0.1)
            results.append(jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(params)))
    assert jax.tree.reduce(max, jax.tree.map(lambda x: np.abs(x).max(), results[0])) > 0
    for got, wanted in zip(jax.tree.leaves(results[1]), jax.tree.leaves(results[0]), strict=True):
        assert np.max(np.abs(got - wanted)) <= 1e-5 * max(np.max(np.abs(wanted)), 1e-30)


# ---------------------------------------------------------------- the router's bias


def steps(config, batch, n=1):
    """The state before and after n steps on the same batch, and the metrics."""
    model = gpt.GPT(config.model, FLOAT32)
    optimizer = make_optimizer(config.optimizer, gpt.logical_axes(model))
    state = jax.jit(functools.partial(create, functools.partial(gpt.init, model), optimizer, ema=False))(jax.random.key(0))
    step = jax.jit(make_step(model, optimizer, config, 100, np.ones(V)))
    return state, *step(state, jax.tree.map(lambda x: np.broadcast_to(x, (n, *x.shape)), batch))


def test_the_bias_moves_against_the_error_of_the_load_and_nothing_else_moves_it(one_device):
    """By its rate, up for an expert with less than the mean load, despite weight decay on everything."""
    batch = batch_of([T, 4, 7, 2])
    before, after, _ = steps(CONFIG, batch)
    tokens = routings(gpt.GPT(MODEL, FLOAT32), before.params, batch)["layers"]["block_1"]["moe"].tokens_E
    bias = lambda state: state.params["layers"]["block_1"]["moe"]["balance"]
    np.testing.assert_array_equal(bias(before), 0)
    np.testing.assert_allclose(bias(after), 0.01 * np.sign(np.mean(tokens, axis=1, keepdims=True) - tokens), rtol=1e-6)
    _, later, _ = steps(CONFIG, batch, 2)
    assert set(np.round(np.asarray(bias(later)).reshape(-1) / 0.01)) <= {-2, -1, 0, 1, 2}


def test_a_skipped_step_leaves_the_bias(one_device):
    batch = batch_of([T, 4, 7, 2])
    batch = dataclasses.replace(batch, weights=np.where(batch.weights > 0, np.nan, 0).astype(np.float32))
    before, after, metrics = steps(CONFIG, batch)
    assert metrics["skipped_steps"] == 1
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)


def test_the_bias_evens_the_load(one_device):
    """With a learning rate of 0 nothing else can."""
    still = OptimizerConfig(peak_lr=0.0, schedule="constant", warmup_steps=0, weight_decay=0.0)
    config = dataclasses.replace(CONFIG, optimizer=still)
    _, _, metrics = steps(config, batch_of([T] * 8), 60)
    assert metrics["expert_load_max"][-10:].mean() < metrics["expert_load_max"][0] - 0.3
    assert metrics["expert_load_entropy"][-10:].mean() > metrics["expert_load_entropy"][0]


def test_metrics_of_the_load():
    even, one = np.full((2, E), 5.0), np.eye(E)[:1] * 7
    metrics = moe.load_metrics({"layers": {"moe": even}})
    assert [float(v) for v in metrics.values()] == pytest.approx([1, 1, 0])
    metrics = moe.load_metrics({"layers": {"moe": one}})
    assert [float(v) for v in metrics.values()] == pytest.approx([E, 0, (E - 1) / E])
