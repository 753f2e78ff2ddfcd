"""Muon gets the hidden matrices, AdamW everything else; both are optax's; decay and clipping reach what the config says."""

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
from gpt4o_jax.training.optimizer import decay_mask, make_optimizer, optimizer_labels

D, N, K, H, F, V, L = 16, 4, 2, 6, 24, 40, 3
MODEL = gpt.GPT(
    ModelConfig(
        vocab_size=V, context_length=8, n_layers=L, d_model=D, n_heads=N, n_kv_heads=K, head_dim=H, d_ff=F,
        mlp="swiglu", norm="layer", positions="learned", bias=True, output_init="scaled",
    ),
    Compute("cpu", "float32"),
)  # fmt: skip
# Every hidden matrix of a layer: what its product sums over, what it produces.
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


def updates_of(optimizer, params, steps):
    """What the optimizer returns on each of a few steps of random gradients."""
    state, update, found = optimizer.init(params), jax.jit(optimizer.update), []
    for s in range(steps):
        updates, state = update(random_like(params, s), state, params)
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
    """All singular values near sqrt(max(1, columns / rows)): rows and columns are those of the product."""
    config = OptimizerConfig(name="muon", muon_lr=1.0, weight_decay=0.0, clip_norm=0.0)
    [update] = updates_of(make_optimizer(config, axes), params, 1)
    for name, (rows, columns) in MATRICES.items():
        for layer in by_name(update)[name]:
            values = np.linalg.svd(layer.reshape(rows, columns), compute_uv=False) / max(1, columns / rows) ** 0.5
            assert values.min() > 0.5 and values.max() < 1.5, name


@pytest.mark.parametrize("name, mask", [("adamw", "matrices"), ("adamw", "hidden"), ("adamw", "all"), ("muon", "matrices")])
def test_adamw_is_optax_adamw(axes, params, name, mask):
    """On every leaf for adamw, on every leaf that is no hidden matrix for muon."""
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


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_gradients_are_clipped_by_their_global_norm(axes, params, name):
    """Beyond the limit only the direction counts; below it nothing happens. Over all leaves together, before either optimizer."""
    config = OptimizerConfig(name=name, clip_norm=2.0, eps=1.0)  # so large an eps makes AdamW see sizes
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
