"""Experts on several devices give the same outputs, gradients and routing as on one, whatever the load.

M tokens on all devices, E experts, k experts of a token, D model width, F hidden width of an expert, B rows, T positions
"""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import MeshConfig, ModelConfig
from gpt4o_jax.model import moe
from gpt4o_jax.ops import experts as ops
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.parallel import experts as exchange
from tests.parallel.meshes import mesh_of

M, E, K, D, F = 48, 8, 2, 12, 16
LOADS = {"even": (0, E), "one expert": (2, 3), "none for the first and last": (1, E - 1)}


def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape) * 0.3


def inputs(load: str, gated: bool):
    """(x, gates, three matrices), chosen experts, distinct for each token."""
    low, high = LOADS[load]
    chosen = jnp.argsort(jax.random.uniform(jax.random.key(0), (M, high - low)), axis=1)[:, :K].astype(jnp.int32) + low
    shares = normal(2, *chosen.shape)
    return (normal(1, M, D), shares, normal(3, E, D, F) if gated else None, normal(4, E, D, F), normal(5, E, F, D)), chosen


def exchanged_by_all_gather(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """jax.lax.ragged_all_to_all as documented, for backends where XLA lacks it."""
    me, index = jax.lax.axis_index(axis_name), jnp.arange(len(output))
    everyones = lambda x: jax.lax.all_gather(x, axis_name)
    rows, starts, sizes, places = map(everyones, (operand, input_offsets, send_sizes, output_offsets))
    for i in range(jax.lax.axis_size(axis_name)):
        at = index - places[i, me]
        here = (at >= 0) & (at < jnp.minimum(sizes[i, me], recv_sizes[i]))
        output = jnp.where(here[:, None], jnp.take(rows[i], starts[i, me] + at, axis=0, mode="clip"), output)
    return output


def value_and_gradients(f, arrays, chosen):
    def loss(*arrays):
        x, gates, *weights = arrays
        y = f(x, chosen, gates, *weights)
        return jnp.sum(jnp.sin(y)), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))(*arrays)
    return y, gradients


def close(got, wanted):
    assert np.max(np.abs(got - wanted)) <= 1e-5 * np.max(np.abs(wanted))


def assert_equal_to_one_device(ways, load, gated, chunk, platform):
    arrays, chosen = inputs(load, gated)
    how = (jnp.tanh, Compute(platform, "float32", ragged=platform != "cpu"))
    rows, weights = ("batch", None), ("expert", None, None)
    with jax.set_mesh(parallel.make_mesh(MeshConfig(expert=ways), jax.devices()[:ways])):
        local = lambda x, chosen, gates, *w: ops.in_chunks(
            lambda *rows: exchange.experts(*rows, *w, *how), chunk, x, chosen, gates
        )
        got = value_and_gradients(parallel.per_shard(local, [rows] * 3 + [weights] * 3, rows), arrays, chosen)
    jax.tree.map(close, jax.device_get(got), value_and_gradients(lambda *a: ops.experts(*a, *how), arrays, chosen))


@pytest.mark.parametrize(
    ("ways", "load", "gated", "chunk", "platform"),
    [
        (4, "even", True, None, "cpu"),
        (4, "one expert", False, None, "cpu"),
        (8, "none for the first and last", True, None, "cpu"),
        (4, "even", True, 5, "cpu"),  # 12 tokens per device in three chunks
        (2, "one expert", True, 7, "cpu"),  # 24 in four
        (4, "even", True, None, "gpu"),
        (2, "none for the first and last", False, 7, "gpu"),
        (4, "one expert", True, None, "gpu"),
    ],
)
def test_equal_to_one_device(ways, load, gated, chunk, platform, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", exchanged_by_all_gather)
    assert_equal_to_one_device(ways, load, gated, chunk, platform)


def test_rows_that_come_back_in_another_order_are_seen(monkeypatch):
    monkeypatch.setattr(exchange, "_back", lambda how, y_rD, route: y_rD[: len(route.to_n)])
    with pytest.raises(AssertionError):
        assert_equal_to_one_device(4, "even", True, None, "cpu")


# ---------------------------------------------------------------- a layer, with its router

B, T = 8, 8
LAYER = ModelConfig(
    d_model=16, n_heads=2, expert_d_ff=F, mlp="swiglu", n_experts=E, experts_per_token=K, n_shared_experts=1, router_bias=True
)
SEGMENTS = (np.arange(T) < np.random.default_rng(0).integers(2, T + 1, (B, 1))).astype(np.int32)
MESHES = {
    "expert=4 fsdp=2": dict(expert=4, fsdp=2),
    "expert=2 fsdp=2 tensor=2": dict(expert=2, fsdp=2, tensor=2),
    "expert=2 fsdp=2 context=2, in chunks": dict(expert=2, fsdp=2, context=2),
    "expert=2 fsdp=2 tensor=2, odd rows": dict(expert=2, fsdp=2, tensor=2),
}


def layer(mesh, c: ModelConfig, length: int):
    """(output and Routing, gradients of parameters and input) for rows of `length` tokens."""
    module = moe.Experts(c, Compute("cpu", "float32"), nn.initializers.normal(0.3))
    x_BTD, segments_BT = normal(7, B, T, 16)[:, :length], SEGMENTS[:, :length]

    def loss(params, x_BTD):
        y_BTD, routing = module.apply({"params": params}, x_BTD, segments_BT, False)
        return jnp.sum(jnp.sin(y_BTD)) + sum(moe.losses({"moe": jax.tree.map(lambda r: r[None], routing)})), (y_BTD, routing)

    with jax.set_mesh(mesh):
        params = nn.unbox(jax.jit(lambda: module.init(jax.random.key(0), x_BTD, segments_BT, False))())["params"]
        grads, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x_BTD)
        return jax.device_get((out, grads))


@functools.cache
def layer_on_one_device(length: int):
    return layer(parallel.make_mesh(devices=jax.devices()[:1]), LAYER, length)


def assert_layer_equal(name: str):
    length = 7 if "odd" in name else T
    c = dataclasses.replace(LAYER, expert_chunk=3) if "chunks" in name else LAYER
    got, wanted = layer(mesh_of(**MESHES[name]), c, length), layer_on_one_device(length)
    np.testing.assert_array_equal(got[0][1].tokens_E, wanted[0][1].tokens_E)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(got), strict=True):
        assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(a)), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", MESHES)
def test_a_layer_equals_one_device(name):
    assert_layer_equal(name)


@pytest.mark.parametrize(
    ("name", "collective", "over"),
    [
        ("expert=2 fsdp=2 tensor=2", "psum_scatter", "tensor"),  # over parts of the hidden width
        ("expert=2 fsdp=2 tensor=2, odd rows", "psum", "tensor"),
        ("expert=4 fsdp=2", "psum", ("data", "fsdp", "expert", "context")),  # for the load
        ("expert=4 fsdp=2", "psum_scatter", "fsdp"),  # for weight gradients
    ],
)
def test_a_dropped_sum_is_seen(name, collective, over, monkeypatch):
    real = getattr(jax.lax, collective)

    def without(x, axes, **more):
        if axes != over:
            return real(x, axes, **more)
        if collective == "psum":
            return x
        part = x.shape[more["scatter_dimension"]] // jax.lax.axis_size(axes)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * part, part, more["scatter_dimension"])

    monkeypatch.setattr(jax.lax, collective, without)
    with pytest.raises(AssertionError):
        assert_layer_equal(name)


OTHER = {"ragged-all-to-all": "all-to-all", "all-to-all": "ragged-all-to-all"}


@pytest.mark.parametrize(
    ("topology", "kind"),
    [("v5e:2x2", "ragged-all-to-all"), ("v5e:4x8", "all-to-all")],  # libtpu has no ragged exchange on large v5e slices
)
def test_a_tpu_exchanges_what_is_there(topology, kind):
    """If it can, the program that libtpu compiles sends only the actual rows, not buffers with room for all."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (requirements-tpu.txt): no TPU compiler here")
    knobs = {
        "model.vocab_size": 256, "model.n_layers": 2, "model.d_model": 128, "model.n_heads": 1, "model.context_length": 128,
        "model.n_experts": 4, "model.d_ff": 128, "mesh.expert": 2, "mesh.fsdp": -1, "train.batch_size": 32,
    }  # fmt: skip
    root = Path(__file__).parents[2]
    flags = [f"--config.{name}={value}" for name, value in knobs.items()]
    program = [sys.executable, "-m", "gpt4o_jax", "plan", f"--config={root}/configs/base.py", f"--topology={topology}", *flags]
    done = subprocess.run(program, cwd=root, capture_output=True, text=True, env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"})
    assert done.returncode == 0, done.stderr
    collectives = json.loads(done.stdout.splitlines()[-1])["collectives"]
    assert [{c["axes"] for c in collectives if c["kind"] == k} for k in (kind, OTHER[kind])] == [{"expert"}, set()]
