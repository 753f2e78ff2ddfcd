"""Every mesh computes the same run: the loss and all gradients on eight devices, however arranged, equal those on one.

Each mesh is paired with a model so that every axis meets every kind of model; tests/system has the full product.
"""

import itertools

import jax
import jax.numpy as jnp
import pytest

from gpt4o_jax.config_mesh import AXES, PRESETS
from gpt4o_jax.model import vocabulary
from tests.parallel import meshes
from tests.parallel.meshes import assert_equal, batch, config, loss_and_gradients, mesh_of, on_one_device

# (mesh sizes, model, whether rows are packed)
CASES = [
    (dict(preset="dp"), "dense", True),
    (dict(preset="fsdp"), "experts", False),
    (dict(preset="tensor"), "experts", True),
    (dict(preset="fsdp_tensor"), "windowed", True),
    (dict(preset="context"), "dense", True),
    (dict(preset="expert"), "dense", True),
    (dict(preset="pipeline"), "dense", False),
    (dict(data=2, fsdp=2, tensor=2), "dense", False),
    (dict(fsdp=2, tensor=4), "some experts", False),
    (dict(fsdp=2, context=4), "experts", True),
    (dict(data=2, context=2, tensor=2), "windowed", False),
    (dict(expert=4, fsdp=2), "experts", True),
    (dict(expert=2, fsdp=2, tensor=2), "experts", False),
    (dict(expert=2, fsdp=2, tensor=2), "windowed", True),
    (dict(expert=2, fsdp=2, context=2), "some experts", True),
    (dict(stage=2, fsdp=2, tensor=2), "windowed", True),
    (dict(stage=2, context=2, fsdp=2), "dense", True),
    (dict(stage=2, expert=2, data=2), "some experts", True),
    (dict(stage=4, data=2), "experts", True),
]
named = lambda case: " ".join(f"{k}={v}" for k, v in case[0].items()) + f", {case[1]}{', packed' if case[2] else ''}"


@pytest.mark.parametrize("case", CASES, ids=named)
def test_loss_and_gradients_equal_one_device(case):
    sizes, model, packed = case
    assert_equal(loss_and_gradients(config(model), mesh_of(**sizes), batch(packed)), on_one_device(model, packed))


def test_the_cases_name_every_preset():
    assert {c[0]["preset"] for c in CASES if "preset" in c[0]} == set(PRESETS)


def test_every_axis_meets_every_kind_of_model():
    split = [(mesh_of(**sizes).shape, model) for sizes, model, _ in CASES]
    met = {(axis, model) for shape, model in split for axis in AXES if shape[axis] > 1}
    assert met == set(itertools.product(AXES, meshes.MODELS))


def test_accumulation_on_a_mesh_equals_one_device():
    got = loss_and_gradients(config("windowed", accumulate=2), mesh_of(fsdp=2, tensor=2), batch(True))
    assert_equal(got, on_one_device("windowed", True))


# Over twenty steps a misrouted token or gradient would show; tests/system covers every mesh and optimizer.
@pytest.mark.parametrize(
    ("sizes", "model", "optimizer", "packed"),
    [
        (dict(data=2, fsdp=2, tensor=2), "dense", "muon", False),
        (dict(expert=2, fsdp=2, tensor=2), "experts", "adamw", True),
        (dict(context=2, stage=2, fsdp=2), "windowed", "adamw", True),
        (dict(expert=2, fsdp=2, context=2), "some experts", "adamw", False),
    ],
)
def test_training_drifts_no_more_than_a_permutation_of_rows(sizes, model, optimizer, packed):
    meshes.assert_drifts_no_more_than_permuted_rows(meshes.with_optimizer(model, optimizer), mesh_of(**sizes), packed)


@pytest.mark.parametrize(
    ("sizes", "packed"), [(dict(expert=2, fsdp=2, context=2), False), (dict(stage=2, data=2, expert=2), True)]
)
def test_every_token_goes_to_the_experts_of_one_device(sizes, packed):
    """Even with the tokens of a row in zig-zag order, and with interleaved micro-batches."""
    meshes.assert_routes_equal("some experts", mesh_of(**sizes), packed)


# ---------------------------------------------------------------- mistakes that the comparison must detect


def unequal(monkeypatch, mistake, sizes, model="dense"):
    """mistake: (module, name, replacement). It must show in the gradients, since the batch is the same."""
    _, wanted, weight = on_one_device(model, True)
    monkeypatch.setattr(*mistake)
    _, grads, got_weight = loss_and_gradients(config(model), mesh_of(**sizes), batch(True))
    assert got_weight == weight
    assert meshes.worst_gradient(grads, wanted)[0] > 1e-3


@pytest.mark.parametrize("name", ["psum", "psum_scatter", "all_gather"])
def test_a_collective_of_the_vocabulary_over_the_wrong_axis_is_seen(monkeypatch, name):
    real = getattr(jax.lax, name)
    swap = lambda axis: "fsdp" if axis == "tensor" else "tensor" if axis == "fsdp" else axis
    wrong = lambda x, mesh_axis, /, **more: real(x, swap(mesh_axis), **more)
    unequal(monkeypatch, (vocabulary.jax.lax, name, wrong), dict(fsdp=2, tensor=2, data=2))


def test_a_dropped_sum_over_rows_is_seen(monkeypatch):
    real = jax.lax.psum
    wrong = lambda x, axis: x if isinstance(axis, tuple) else real(x, axis)
    unequal(monkeypatch, (vocabulary.jax.lax, "psum", wrong), dict(data=8))


def averaged_per_shard(weights):
    """As if each device averaged over its own tokens, so that those of short rows count more."""
    return weights / jnp.sum(weights) / 8


def without_one(weights):
    return jnp.where(jnp.arange(weights.size).reshape(weights.shape) == jnp.argmax(weights), 0, weights)


@pytest.mark.parametrize("wrong", [averaged_per_shard, without_one])
def test_wrong_token_weights_in_the_loss_of_a_shard_are_seen(monkeypatch, wrong):
    real = vocabulary.cross_entropy
    mistaken = lambda hidden, unembed, targets, weights, *how: real(hidden, unembed, targets, wrong(weights), *how)
    unequal(monkeypatch, (vocabulary, "cross_entropy", mistaken), dict(data=8))
