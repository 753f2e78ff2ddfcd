"""A training step: accumulation and dispatch length change no result; a non-finite step changes only the counters.

K steps in a dispatch, B rows, T positions
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt4o_jax.data.batches import Batch
from gpt4o_jax.length import micro_batches, row_numbers
from gpt4o_jax.model import gpt
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.training import program
from gpt4o_jax.training import step as training_step
from gpt4o_jax.training.optimizer import make_optimizer
from gpt4o_jax.training.schedules import schedule_factor
from gpt4o_jax.training.state import create
from gpt4o_jax.training.step import gradients, loss_sum, make_step

B, T, V, TOTAL = 8, 10, 40, 20
CONFIG = RunConfig(
    model=ModelConfig(vocab_size=V, context_length=T, n_layers=2, d_model=16, n_heads=2, output_init="scaled", init_std=0.1),
    optimizer=OptimizerConfig(name="muon", warmup_steps=3, ema_decay=0.9),
    train=TrainConfig(batch_size=B, loss_chunk=4),
)
MODEL = gpt.GPT(CONFIG.model, Compute("cpu", "float32"))
BYTES = np.arange(V) % 5


def batches(steps: int) -> Batch:
    """[steps, B, T], rows padded after various lengths."""
    random = np.random.default_rng(0)
    tokens = random.integers(4, V, (steps, B, T + 1)).astype(np.int32)
    index = np.broadcast_to(np.arange(T, dtype=np.int32), (steps, B, T))
    real = index < random.integers(1, T + 1, (steps, B, 1))
    return Batch(tokens[..., :-1], tokens[..., 1:], real.astype(np.float32), index, real.astype(np.int32))


def part(batch: Batch, at) -> Batch:
    return jax.tree.map(lambda x: x[at], batch)


def with_weight(batch: Batch, step: int, value: float) -> Batch:
    weights = batch.weights.copy()
    weights[step, 0, 0] = value
    return dataclasses.replace(batch, weights=weights)


@pytest.fixture(scope="module")
def start():
    """(a fresh state, the jitted step), under a mesh of one device."""
    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        optimizer = make_optimizer(CONFIG.optimizer, gpt.logical_axes(MODEL))
        fresh = functools.partial(create, functools.partial(gpt.init, MODEL), optimizer, ema=True)
        step = make_step(MODEL, optimizer, CONFIG, TOTAL, BYTES)
        yield jax.jit(fresh)(jax.random.key(0)), jax.jit(step)


def equal_bits(a, b):
    as_numbers = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(as_numbers(x), as_numbers(y)), a, b)


def test_accumulation_changes_no_gradient(start):
    """Token-weighted, although the micro-batches have different numbers of tokens."""
    params, batch = start[0].params, part(batches(1), 0)

    def run(accumulate):
        config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, accumulate=accumulate))
        return jax.jit(lambda p: gradients(MODEL, p, batch, config, jax.random.key(0)))(params)

    losses, grads, weight = run(1)
    total = jax.jit(lambda p: loss_sum(MODEL, p, batch, T)[0])(params)
    np.testing.assert_allclose(losses["loss"], total / batch.weights.sum(), rtol=1e-6)
    assert weight == batch.weights.sum()
    for accumulate in (2, 4):
        other_losses, other, other_weight = run(accumulate)
        np.testing.assert_allclose(other_losses["loss"], losses["loss"], rtol=1e-6)
        assert other_weight == weight
        jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max(), rtol=0), grads, other)


def test_one_dispatch_of_four_steps_is_four_dispatches_of_one(start):
    """Bit for bit, parameters, optimizer, average and metrics."""
    state, step = start
    data = batches(4)
    together, metrics = step(state, data)
    records = []
    for s in range(4):
        state, record = step(state, part(data, np.s_[s : s + 1]))
        records.append(record)
    equal_bits(together, state)
    equal_bits(metrics, jax.tree.map(lambda *x: jnp.concatenate(x), *records))
    assert int(together.step) == 4


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_non_finite_step_changes_nothing_but_the_counters(start, poison):
    """Steps 1 and 2 are poisoned: after them only the counters have moved, and step 3 works again."""
    state, step = start
    data = batches(4)
    good, _ = step(state, part(data, np.s_[:1]))
    bad, metrics = step(good, with_weight(with_weight(part(data, np.s_[1:3]), 0, poison), 1, poison))
    for name in ("params", "opt_state", "ema", "rng"):
        equal_bits(getattr(bad, name), getattr(good, name))
    assert (int(bad.step), int(bad.skipped_steps), int(bad.skipped_in_a_row)) == (3, 2, 2)
    assert metrics["skipped_in_a_row"].tolist() == [1, 2]
    after, metrics = step(bad, part(data, np.s_[3:]))
    assert (int(after.step), int(after.skipped_steps), int(after.skipped_in_a_row)) == (4, 2, 0)
    assert np.isfinite(metrics["loss"][0]) and all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(after.params))
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (after.params, bad.params)), strict=True))
    # The learning rate follows the run's step counter, not the number of applied steps.
    np.testing.assert_allclose(metrics["lr_factor"][0], schedule_factor(CONFIG.optimizer, TOTAL, 3), rtol=1e-6)


def test_the_average_follows_its_formula(start):
    """ema <- 0.9 ema + 0.1 params after every step, from the initial parameters on."""
    state, step = start
    data = batches(3)
    average = jax.tree.map(np.asarray, state.params)
    equal_bits(state.ema, state.params)
    for s in range(3):
        state, _ = step(state, part(data, np.s_[s : s + 1]))
        average = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * np.asarray(p), average, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), state.ema, average)


def test_metrics_say_what_happened(start):
    state, step = start
    data = batches(4)
    after, metrics = step(state, data)
    np.testing.assert_array_equal(metrics["weight"], data.weights.sum(axis=(1, 2)))
    np.testing.assert_array_equal(metrics["bytes"], (BYTES[data.targets] * data.weights).sum(axis=(1, 2)))
    losses, grads, _ = jax.jit(lambda p: gradients(MODEL, p, part(data, 0), CONFIG, jax.random.key(0)))(state.params)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose([metrics["loss"][0], metrics["grad_norm"][0]], [losses["loss"], norm], rtol=1e-5)
    first, _ = step(state, part(data, np.s_[:1]))
    moved = sum(np.sum(np.square(a - b)) for a, b in zip(*map(jax.tree.leaves, (first.params, state.params)), strict=True))
    np.testing.assert_allclose(metrics["update_norm"][0], np.sqrt(moved), rtol=1e-4)
    assert int(after.step) == 4


def test_every_buffer_of_the_state_can_be_donated(start):
    """The step's output replaces its input, so a run holds its state only once."""
    state, step = start
    state = jax.tree.map(jnp.copy, state)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batches(1)).compile()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= size
    compiled(state, batches(1))
    assert all(x.is_deleted() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_z_loss_is_minimised_and_told_apart(start, accumulate):
    """loss stays the negative log-likelihood; the gradient is that of both terms, as autodiff finds it from dense logits."""
    params, batch, z = start[0].params, part(batches(1), 0), 0.1
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, z_loss=z, accumulate=accumulate))

    def dense(p):
        hidden, _, _ = MODEL.apply({"params": p}, batch.tokens, batch.positions, batch.segments)
        logits = hidden @ p["unembedding"]
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        nll = normaliser - jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        mean = lambda x: jnp.sum(x * batch.weights) / batch.weights.sum()
        return mean(nll) + mean(z * normaliser**2), {"loss": mean(nll), "z_loss": mean(z * normaliser**2)}

    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        losses, grads, _ = jax.jit(lambda p: gradients(MODEL, p, batch, config, jax.random.key(0)))(params)
        wanted, parts = jax.jit(jax.grad(dense, has_aux=True))(params)
    assert set(losses) == {"loss", "z_loss"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), losses, parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max(), rtol=0), wanted, grads)


GROWING = dataclasses.replace(CONFIG, train=TrainConfig(batch_size=B, loss_chunk=4, accumulate=4, batch_warmup_steps=6))


def growing_batches(steps: int) -> Batch:
    """The rows of batches(), without those of absent micro-batches while the batch is still growing."""
    data = batches(steps)
    absent = np.array([[number is None for number in row_numbers(GROWING.train, s)] for s in range(steps)])
    return jax.tree.map(lambda x: np.where(absent[..., None], np.zeros_like(x), x), data)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_growing_batch_gives_the_gradients_of_its_rows_alone(start, count):
    params = start[0].params
    step = next(s for s in range(7) if micro_batches(GROWING.train, s) == count)
    batch = part(growing_batches(7), step)
    alone = jax.tree.map(lambda x: x[np.arange(B) % 4 < count], batch)
    got = jax.jit(lambda p, n: gradients(MODEL, p, batch, GROWING, jax.random.key(0), n))(params, count)
    wanted = jax.jit(lambda p: gradients(MODEL, p, alone, CONFIG, jax.random.key(0)))(params)
    assert got[2] == wanted[2] == batch.weights.sum()
    np.testing.assert_allclose(got[0]["loss"], wanted[0]["loss"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max(), rtol=0), wanted[1], got[1])


def test_absent_micro_batches_cost_nothing_and_no_new_compilation(start, monkeypatch):
    """Forward passes are counted as they run; one compiled step serves every size of the batch."""
    counted, original = [], training_step.loss_sum

    def counting(*args, **knobs):
        jax.debug.callback(lambda: counted.append(1))
        return original(*args, **knobs)

    monkeypatch.setattr(training_step, "loss_sum", counting)
    optimizer = make_optimizer(GROWING.optimizer, gpt.logical_axes(MODEL))
    step, state, data = jax.jit(make_step(MODEL, optimizer, GROWING, TOTAL, BYTES)), start[0], growing_batches(8)
    for s in range(8):
        counted.clear()
        state, metrics = step(state, part(data, np.s_[s : s + 1]))
        jax.block_until_ready(state.params)
        jax.effects_barrier()
        assert len(counted) == micro_batches(GROWING.train, s) == [1, 1, 2, 2, 3, 3, 4, 4][s]
        assert metrics["weight"][0] == data.weights[s].sum() and np.isfinite(metrics["loss"][0])
    assert step._cache_size() == 1
    # The schedule counts steps, whatever their size.
    np.testing.assert_allclose(metrics["lr_factor"][0], schedule_factor(GROWING.optimizer, TOTAL, 7), rtol=1e-6)


@pytest.mark.parametrize(
    "method, rows, packed", [("next_token", "windows", False), ("next_token", "first_fit", True), ("dpo", "windows", True)]
)
def test_attention_compares_documents_where_rows_may_hold_several(method, rows, packed):
    """Rows of preference pairs hold several, whatever data.rows says about text."""
    model = dataclasses.replace(CONFIG.model, compute_dtype="float32")
    changes = dict(model=model, data=DataConfig(rows=rows), objective=ObjectiveConfig(method=method))
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    assert program.build(dataclasses.replace(CONFIG, **changes), mesh).model.compute.packed == packed
