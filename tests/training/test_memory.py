"""Memory savers do not change training: remat policies, and optimizer state on the host or in fewer bits.

B rows, T positions, V vocabulary
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt4o_jax.data.batches import Batch
from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.model import gpt
from gpt4o_jax.model.block import REMAT_POLICIES
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.training import program
from gpt4o_jax.training.optimizer import eval_params
from gpt4o_jax.training.step import loss_sum

B, T, V, STEPS = 8, 8, 48, 20
FLOAT32 = Compute("cpu", "float32")
DENSE = ModelConfig(vocab_size=V, context_length=T, n_layers=2, d_model=16, n_heads=2, output_init="scaled", init_std=0.3)
MODELS = {"dense": DENSE, "experts": dataclasses.replace(DENSE, n_experts=4, d_ff=12, mlp="swiglu")}
OPTIMIZERS = {
    "adamw": OptimizerConfig(peak_lr=3e-3, schedule="constant", warmup_steps=2),
    "lion": OptimizerConfig(name="lion", peak_lr=1e-3, schedule="constant", warmup_steps=2),
    "muon": OptimizerConfig(name="muon", peak_lr=3e-3, schedule="constant", warmup_steps=2),
}


def batches() -> Batch:
    """[STEPS, B, T], every step the same rows."""
    tokens = np.random.default_rng(0).integers(4, V, (B, T + 1)).astype(np.int32)
    index = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    one = np.ones((B, T))
    arrays = (tokens[:, :-1], tokens[:, 1:], one.astype(np.float32), index, one.astype(np.int32))
    return Batch(*(np.broadcast_to(x, (STEPS, *x.shape)) for x in arrays))


# ---------------------------------------------------------------- remat


def gradient(model: str, policy: str):
    """The function of the parameters."""
    net = gpt.GPT(dataclasses.replace(MODELS[model], remat=policy), FLOAT32)
    one = jax.tree.map(lambda x: x[0], batches())
    return jax.grad(lambda p: loss_sum(net, p, one, T)[0])


def parameters(model: str):
    return jax.jit(functools.partial(gpt.init, gpt.GPT(MODELS[model], FLOAT32)))(jax.random.key(0))


@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_the_same_under_every_policy(one_device, model):
    params = parameters(model)
    wanted = jax.jit(gradient(model, "none"))(params)
    for policy in REMAT_POLICIES:
        got = jax.jit(gradient(model, policy))(params)
        for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
            assert np.max(np.abs(a - b)) <= 1e-6 * np.max(np.abs(a)), policy


def products(jaxpr) -> int:
    """Matrix products in a program, with those in a loop's body counted once."""
    inner = [x for eqn in jaxpr.eqns for v in eqn.params.values() for x in (v if isinstance(v, tuple | list) else [v])]
    bodies = [getattr(x, "jaxpr", x) for x in inner if hasattr(x, "jaxpr") or hasattr(x, "eqns")]
    return sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns) + sum(map(products, bodies))


@pytest.mark.parametrize(("model", "into"), [("dense", 1), ("experts", 2)])
def test_what_a_policy_keeps_is_not_computed_again(one_device, model, into):
    """In a block: queries, keys and values; scores and weighted values; the `into` products into the feed-forward."""

    params = jax.eval_shape(lambda: parameters(model))
    written = lambda policy: products(jax.make_jaxpr(gradient(model, policy))(params).jaxpr)
    count = {policy: written(policy) for policy in ("none", *REMAT_POLICIES)}
    assert count["full"] == count["offload"] > count["save_mlp"] > count["none"]
    assert count["full"] - count["save_mlp"] == into
    assert count["full"] - count["save_attention"] == 3 + 2


@pytest.mark.parametrize("unroll", [1, 8])
def test_memory_is_saved_unrolled_or_not(one_device, unroll):
    def temporaries(policy: str) -> int:
        model = dataclasses.replace(DENSE, n_layers=8, scan_unroll=unroll, context_length=64, d_model=64, remat=policy)
        one = np.ones((B, 64), np.int32)
        batch = Batch(one, one, one.astype(np.float32), np.broadcast_to(np.arange(64, dtype=np.int32), one.shape), one)
        net = gpt.GPT(model, FLOAT32)
        params = jax.eval_shape(functools.partial(gpt.init, net), jax.random.key(0))
        step = jax.jit(jax.grad(lambda p: loss_sum(net, p, batch, 64)[0])).lower(params).compile()
        return step.memory_analysis().temp_size_in_bytes

    every = temporaries("none")
    assert temporaries("full") < 0.5 * every and temporaries("save_mlp") < 0.8 * every


@pytest.mark.parametrize("more", [dict(mtp_heads=1), dict(n_layers=5, layer_pattern=("local", "global"), window=4)], ids=str)
def test_what_is_computed_again_stays_so_in_a_loop_of_one_iteration(one_device, more):
    """Of a single head ahead, and of layers after the last whole period: XLA dissolves such loops, and must not merge the two."""

    def programs(policy: str) -> tuple[int, int]:
        """Products that are written, and that XLA keeps."""
        net = gpt.GPT(dataclasses.replace(DENSE, attention="reference", remat=policy, **more), FLOAT32)
        one = jax.tree.map(lambda x: x[0], batches())
        params = jax.eval_shape(functools.partial(gpt.init, net), jax.random.key(0))
        step = jax.jit(jax.grad(lambda p: loss_sum(net, p, one, T, mtp_weight=1.0)[0])).trace(params)
        return products(step.jaxpr.jaxpr), step.lower().compile().as_text().count(" dot(")

    written, kept = np.subtract(programs("full"), programs("none"))
    assert written == kept > 0


def test_blocks_leave_the_device_where_the_policy_says_so(one_device):
    params = jax.eval_shape(lambda: parameters("dense"))
    full, offload = (str(jax.make_jaxpr(gradient("dense", policy))(params)) for policy in ("full", "offload"))
    assert "f32<host>[2,8,8,16]" in offload and "<host>" not in full  # layers, rows, positions, width


# ---------------------------------------------------------------- the optimizer's state


@functools.cache
def trained(optimizer: OptimizerConfig):
    """(state before, deleted; state after STEPS steps; losses), on eight devices."""
    model = dataclasses.replace(DENSE, compute_dtype="float32")
    train = TrainConfig(batch_size=B, loss_chunk=T, steps_per_dispatch=STEPS)
    config = RunConfig(model=model, optimizer=optimizer, train=train, mesh=MeshConfig(preset="fsdp"))
    built = program.build(config, parallel.make_mesh(config.mesh))
    with jax.set_mesh(built.mesh):
        before = built.fresh(jax.random.key(0))
        rows = jax.device_put(batches(), built.batch_sharding)
        after, metrics = built.compile(STEPS, np.ones(V))(before, rows)
    return before, after, np.asarray(metrics["loss"])


def size(state) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(state.opt_state) if x.ndim)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_in_bfloat16_take_half_the_bytes_and_train_as_well(name):
    before, _, losses = trained(OPTIMIZERS[name])
    narrow_before, narrow_after, narrow_losses = trained(dataclasses.replace(OPTIMIZERS[name], moment_dtype="bfloat16"))
    assert size(narrow_before) == size(narrow_after) == size(before) / 2
    assert losses[-1] < losses[0] - 0.5 and np.max(np.abs(narrow_losses - losses)) < 0.02 * (losses[0] - losses[-1])


@pytest.mark.parametrize(
    "optimizer", [OPTIMIZERS["adamw"], OptimizerConfig(name="schedule_free", peak_lr=3e-3)], ids=lambda optimizer: optimizer.name
)
def test_a_state_in_the_hosts_memory_trains_to_the_same_bits(optimizer):
    _, after, losses = trained(optimizer)
    away_before, away_after, away_losses = trained(dataclasses.replace(optimizer, offload=True))
    np.testing.assert_array_equal(losses, away_losses)
    jax.tree.map(np.testing.assert_array_equal, after.params, away_after.params)
    evaluated = (eval_params(optimizer, state) for state in (after, away_after))
    jax.tree.map(np.testing.assert_array_equal, *evaluated)
    for state in (away_before, away_after):
        assert {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.ndim} == {"pinned_host"}
        assert {x.sharding.memory_kind for x in jax.tree.leaves(state.params)} == {"device"}


@pytest.mark.parametrize(
    ("knob", "config"),
    [
        ("model.remat=offload", RunConfig(model=dataclasses.replace(DENSE, remat="offload"))),
        ("optimizer.offload=true", RunConfig(model=DENSE, optimizer=OptimizerConfig(offload=True))),
    ],
)
def test_without_such_memory_it_is_one_line(knob, config, monkeypatch):
    monkeypatch.setattr(program, "HOST_MEMORY", "no_such_kind")
    with pytest.raises(RunError, match=f"^config.{knob}: a cpu device here has no no_such_kind memory .*set") as e:
        program.build(config, parallel.make_mesh())
    assert e.value.code == ExitCode.USAGE and "\n" not in str(e.value)
