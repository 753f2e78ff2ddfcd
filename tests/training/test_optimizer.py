"""Every optimizer equals optax's, leaf by leaf and layer by layer; Muon gets the hidden matrices; decay and clipping apply as
configured; the schedule's factor scales the learning rate."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import ModelConfig, OptimizerConfig
from gpt4o_jax.model import gpt
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.training.optimizer import OPTIMIZERS, decay_mask, eval_params, make_optimizer, optimizer_labels
from gpt4o_jax.training.state import TrainState

D, N, K, H, F, V, L = 16, 4, 2, 6, 24, 40, 3
MODEL = gpt.GPT(
    ModelConfig(
        vocab_size=V, context_length=8, n_layers=L, d_model=D, n_heads=N, n_kv_heads=K, head_dim=H, d_ff=F,
        mlp="swiglu", norm="layer", positions="learned", bias=True, output_init="scaled",
    ),
    Compute("cpu", "float32"),
)  # fmt: skip
# Every hidden matrix of a layer: input and output size of its product.
MATRICES = {
    "attention.query": (D, N * H),
    "attention.key": (D, K * H),
    "attention.value": (D, K * H),
    "attention.output": (N * H, D),
    "mlp.up": (D, F),
    "mlp.gate": (D, F),
    "mlp.down": (F, D),
}
TABLES = {"embedding", "positions", "unembedding"}


@pytest.fixture(scope="module")
def axes():
    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        yield gpt.logical_axes(MODEL)


@pytest.fixture(scope="module")
def params(axes):
    return jax.jit(functools.partial(gpt.init, MODEL))(jax.random.key(0))


def random_like(tree, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), tree)


def by_name(tree):
    """'attention.query' or 'embedding' -> leaf."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(k.key for k in path if k.key != "layers"): leaf for path, leaf in named}


def updates_of(optimizer, params, steps, **more):
    """The optimizer's updates in each of a few steps with random gradients."""
    state, update, found = optimizer.init(params), jax.jit(optimizer.update), []
    for s in range(steps):
        updates, state = update(random_like(params, s), state, params, **more)
        params = optax.apply_updates(params, updates)
        found.append(updates)
    return found


def close(got, wanted, tolerance=1e-5):
    np.testing.assert_allclose(got, wanted, atol=tolerance * float(jnp.max(jnp.abs(wanted))), rtol=0)


def test_routing_leaf_by_leaf(axes):
    labels = by_name(optimizer_labels(axes))
    assert {name for name, label in labels.items() if label == "muon"} == set(MATRICES)
    assert {label for name, label in labels.items() if name not in MATRICES} == {"adamw"}
    assert set(labels) > TABLES


def test_muon_is_optax_muon_on_each_layers_matrix(axes, params):
    config = OptimizerConfig(name="muon", muon_lr=0.02, muon_momentum=0.9, weight_decay=0.3, clip_norm=0.0)
    got = updates_of(make_optimizer(config, axes), params, 3)
    reference = optax.contrib.muon(0.02, beta=0.9, weight_decay=0.3)
    update = jax.jit(reference.update)
    for name, shape in MATRICES.items():
        for layer in range(L):
            matrix = by_name(params)[name][layer].reshape(shape)
            state = reference.init(matrix)
            for s in range(3):
                wanted, state = update(by_name(random_like(params, s))[name][layer].reshape(shape), state, matrix)
                matrix = optax.apply_updates(matrix, wanted)
                close(by_name(got[s])[name][layer].reshape(shape), wanted)


def test_muon_makes_orthogonal_updates_of_the_right_size(axes, params):
    """All singular values near sqrt(max(1, columns / rows)), with the rows and columns of the product."""
    config = OptimizerConfig(name="muon", muon_lr=1.0, weight_decay=0.0, clip_norm=0.0)
    [update] = updates_of(make_optimizer(config, axes), params, 1)
    for name, (rows, columns) in MATRICES.items():
        for layer in by_name(update)[name]:
            values = np.linalg.svd(layer.reshape(rows, columns), compute_uv=False) / max(1, columns / rows) ** 0.5
            assert values.min() > 0.5 and values.max() < 1.5, name


@pytest.mark.parametrize("name, mask", [("adamw", "matrices"), ("adamw", "hidden"), ("adamw", "all"), ("muon", "matrices")])
def test_adamw_is_optax_adamw(axes, params, name, mask):
    """On every leaf for adamw; on every leaf except hidden matrices for muon."""
    config = OptimizerConfig(name=name, peak_lr=3e-3, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3, decay_mask=mask, clip_norm=0.0)
    decays = decay_mask(config, axes)
    reference = optax.adamw(3e-3, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3, mask=decays)
    for got, wanted in zip(*(updates_of(o, params, 3) for o in (make_optimizer(config, axes), reference)), strict=True):
        for leaf, x in by_name(wanted).items():
            if name == "adamw" or leaf not in MATRICES:
                close(by_name(got)[leaf], x)


def test_decay_masks(axes):
    decayed = lambda mask: {n for n, on in by_name(decay_mask(OptimizerConfig(decay_mask=mask), axes)).items() if on}
    assert decayed("hidden") == set(MATRICES)
    assert decayed("matrices") == set(MATRICES) | TABLES
    assert decayed("all") == set(by_name(decay_mask(OptimizerConfig(), axes)))


def test_lion_is_its_papers_algorithm(axes, params):
    """Algorithm 2 of arXiv:2302.06675 in numpy, with each step's learning rate as a share of the peak."""
    config = OptimizerConfig(name="lion", peak_lr=3e-3, b1=0.8, b2=0.9, weight_decay=0.3, decay_mask="all", clip_norm=0.0)
    for factor in (1.0, 0.25):
        got = updates_of(make_optimizer(config, axes), params, 3, lr_factor=factor)
        for name, leaf in by_name(params).items():
            p, m = np.asarray(leaf), 0
            for s in range(3):
                g = np.asarray(by_name(random_like(params, s))[name])
                step = -3e-3 * factor * (np.sign(0.8 * m + 0.2 * g) + 0.3 * p)
                m = 0.9 * m + 0.1 * g
                close(by_name(got[s])[name], step)
                p = p + step


@pytest.fixture(scope="module")
def wide():
    """(axis names, parameters) of a model whose hidden matrices and embedding are wide enough to be factored."""
    c = dataclasses.replace(MODEL.config, vocab_size=140, n_layers=2, d_model=128, n_heads=4, head_dim=32, d_ff=192)
    model = gpt.GPT(c, MODEL.compute)
    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        yield gpt.logical_axes(model), jax.jit(functools.partial(gpt.init, model))(jax.random.key(0))


@pytest.mark.parametrize("b1", [0.9, 0.0])
def test_adafactor_is_optax_adafactor_on_each_layers_matrix(wide, b1):
    axes, params = wide
    config = OptimizerConfig(name="adafactor", peak_lr=0.01, b1=b1, weight_decay=0.3, decay_mask="all", clip_norm=0.0)
    # optax does not multiply the decay by the learning rate.
    reference = optax.adafactor(0.01, multiply_by_parameter_scale=False, momentum=b1 or None, weight_decay_rate=0.3 * 0.01)
    got, update = updates_of(make_optimizer(config, axes), params, 3), jax.jit(reference.update)
    stacked = set(by_name(params["layers"]))
    for name, leaf in by_name(params).items():
        for layer in range(2) if name in stacked else [()]:
            rows = 192 if name == "mlp.down" else 128
            view = lambda x: x[layer].reshape(rows, -1) if name in MATRICES else x[layer]  # all heads as one matrix
            weight = view(leaf)
            state = reference.init(weight)
            for s in range(3):
                wanted, state = update(view(by_name(random_like(params, s))[name]), state, weight)
                weight = optax.apply_updates(weight, wanted)
                close(view(by_name(got[s])[name]), wanted)


def test_adafactor_keeps_a_row_and_a_column_for_each_matrix(wide):
    axes, params = wide
    state = make_optimizer(OptimizerConfig(name="adafactor", b1=0.0), axes).init(params)
    shapes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    moments = lambda name: {shape for path, shape in shapes.items() if path.endswith(name)}
    assert moments("['attention']['query']") == {(2, 128), (2, 1)}
    assert moments("['mlp']['down']") == {(2, 192), (2, 128), (2, 1)}
    assert moments("['embedding']") == {(140,), (128,), (1,)}
    assert moments("['attention']['key']") == {(2, 1), (2, 128, 2, 32)}  # 64 columns: not factored, same shape as the weight
    size = sum(np.prod(shape) for shape in shapes.values())
    assert size < 0.2 * sum(x.size for x in jax.tree.leaves(params))


ODD = {
    "extra heads": {"mtp_heads": 1},
    "an unfinished period": {"n_layers": 5, "layer_pattern": ("local", "global"), "window": 8},
    "wide experts": {"n_experts": 2, "experts_per_token": 2, "d_model": 128, "head_dim": 32, "d_ff": 128},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("odd", ODD)
def test_weights_of_another_depth_than_the_layers_have_updates_too(name, odd):
    model = gpt.GPT(dataclasses.replace(MODEL.config, mlp="relu2", bias=False, **ODD[odd]), MODEL.compute)
    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        axes, shapes = gpt.logical_axes(model), jax.eval_shape(functools.partial(gpt.init, model), jax.random.key(0))
        optimizer = make_optimizer(OptimizerConfig(name=name), axes)
        state = jax.eval_shape(optimizer.init, shapes)
        updates, state = jax.eval_shape(optimizer.update, shapes, state, shapes)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, shapes)


def schedule_free_by_hand(params, lr, b1, b2, eps, decay, steps):
    """Algorithm 1 of arXiv:2405.15682 in float64 numpy, without warm-up, decay at y: yields (y, x) after each step."""
    z = x = y = np.asarray(params, np.float64)
    v, weights = 0.0, 0.0
    for s in range(steps):
        g = yield y, x
        v = b2 * v + (1 - b2) * g * g
        z = z - lr[s] * (g / (np.sqrt(v / (1 - b2 ** (s + 1))) + eps) + decay * y)
        weight = max(lr[: s + 1]) ** 2
        weights += weight
        x = x + weight / weights * (z - x)
        y = (1 - b1) * z + b1 * x
    yield y, x


def test_schedule_free_is_its_papers_algorithm_and_is_used_by_its_average(axes, params):
    steps, factors = 4, [0.5, 1.0, 1.0, 0.5]
    config = OptimizerConfig(
        name="schedule_free", schedule="constant", peak_lr=0.01, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3,
        decay_mask="all", clip_norm=0.0,
    )  # fmt: skip
    optimizer = make_optimizer(config, axes)
    update = jax.jit(optimizer.update)
    runs = {
        name: schedule_free_by_hand(p, [0.01 * f for f in factors], 0.8, 0.9, 1e-6, 0.3, steps)
        for name, p in by_name(params).items()
    }
    for run in runs.values():
        next(run)
    opt_state, used = optimizer.init(params), params
    for s, factor in enumerate(factors):
        grads = random_like(params, s)
        updates, opt_state = update(grads, opt_state, used, lr_factor=factor)
        used = optax.apply_updates(used, updates)
        state = TrainState(s, used, opt_state, None, None, 0, 0)
        for name, run in runs.items():
            trained, average = run.send(np.asarray(by_name(grads)[name], np.float64))
            close(by_name(used)[name], trained, 1e-5)
            close(by_name(eval_params(config, state))[name], average, 1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_factor_of_a_step_multiplies_its_learning_rate(axes, params, name):
    rates = lambda share: {"peak_lr": 3e-3 * share, "muon_lr": 0.02 * share}
    full, half = (make_optimizer(OptimizerConfig(name=name, **rates(share)), axes) for share in (1.0, 0.5))
    for got, wanted in zip(updates_of(full, params, 2, lr_factor=0.5), updates_of(half, params, 2), strict=True):
        jax.tree.map(close, got, wanted)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_gradients_are_clipped_by_their_global_norm(axes, params, name):
    """Above the limit only the direction counts; below it nothing changes. Over all leaves together, before either optimizer."""
    config = OptimizerConfig(name=name, clip_norm=2.0, eps=1.0)  # an eps this large makes AdamW sensitive to gradient sizes
    optimizer = make_optimizer(config, axes)
    free = make_optimizer(OptimizerConfig(name=name, clip_norm=0.0, eps=1.0), axes)
    state, free_state = optimizer.init(params), free.init(params)
    grads = random_like(params, 0)
    norm = optax.tree.norm(grads)
    scaled = lambda factor: jax.tree.map(lambda g: g * factor, grads)
    update, free_update = jax.jit(optimizer.update), jax.jit(free.update)
    wanted, _ = free_update(scaled(2.0 / norm), free_state, params)
    for factor in (1.0, 50.0):
        jax.tree.map(close, update(scaled(factor), state, params)[0], wanted)
    small = scaled(0.5 / norm)
    jax.tree.map(close, update(small, state, params)[0], free_update(small, free_state, params)[0])
