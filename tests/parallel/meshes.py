"""Models, batches and meshes of eight fake CPU devices, and the results of one device."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt4o_jax.data.batches import Batch
from gpt4o_jax.model import gpt, moe, stages
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.training.optimizer import make_optimizer
from gpt4o_jax.training.state import create, state_shardings
from gpt4o_jax.training.step import gradients, make_step
from tests.rounding import next_larger

B, T, V, STEPS = 8, 16, 48, 20
_COMMON = dict(
    vocab_size=V, context_length=T, n_layers=4, d_model=16, n_heads=8, n_kv_heads=4, head_dim=4, init_std=0.2,
    output_init="scaled",
)  # fmt: skip
# No norms on sub-layer outputs: these are small at the start, and a norm amplifies their rounding to 1e-5 on any mesh.
MODELS = {
    "dense": ModelConfig(**_COMMON, positions="learned", norm="layer", bias=True, tied=True),
    "windowed": ModelConfig(**_COMMON, layer_pattern=("local", "global"), window=5, attention_softcap=8.0, mlp="geglu"),
    "experts": ModelConfig(**_COMMON, n_experts=8, expert_d_ff=16, n_shared_experts=1, router_bias=True, mlp="swiglu"),
    "some experts": ModelConfig(**_COMMON, n_experts=4, expert_d_ff=16, moe_every=2, mlp="swiglu", qk_norm=True),
}
# Path suffixes of leaves whose true gradient is zero: their rounding residue is at most ROUNDING of the largest gradient of
# all. The router's bias only affects the choice of experts. (Key biases are not listed: these models normalise queries and keys
# after them; otherwise a key bias would add a constant to all scores of a query, which changes no softmax.)
ZERO = ("['balance']",)
ROUNDING = 1e-5


def config(model: str, accumulate: int = 1, **train) -> RunConfig:
    losses = dict(balance_loss=0.01, router_z_loss=0.001) if MODELS[model].n_experts else {}
    return RunConfig(model=MODELS[model], train=TrainConfig(batch_size=B, loss_chunk=3, accumulate=accumulate, **losses, **train))


def batch(packed: bool) -> Batch:
    """[B, T]. packed: several documents per row; otherwise one, of varying length. The rest is padding."""
    random = np.random.default_rng(0)
    tokens = random.integers(4, V, (B, T + 1)).astype(np.int32)
    index = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    real = index < random.integers(T // 2, T + 1, (B, 1))
    starts = (random.random((B, T)) < (0.25 if packed else 0)) | (index == 0)
    segments = np.cumsum(starts, axis=1).astype(np.int32) * real
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    weights = real * random.integers(0, 3, (B, T)).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, positions, segments)


def with_optimizer(model: str, optimizer: str) -> RunConfig:
    knobs = OptimizerConfig(name=optimizer, peak_lr=3e-3, schedule="constant", warmup_steps=2, ema_decay=0.9)
    return dataclasses.replace(config(model), optimizer=knobs)


def loss_and_gradients(c: RunConfig, mesh: jax.sharding.Mesh, rows: Batch, repeats: int = 1):
    """(parts of the loss by name, gradients, sum of weights) of the training step, as numpy arrays.

    repeats: how many times a micro-batch passes through the stages of a pipeline.
    """
    model = gpt.GPT(c.model, Compute("cpu", "float32"), (repeats, 0))
    with jax.set_mesh(mesh):
        shardings = parallel.shardings(gpt.logical_axes(model), mesh)
        params = jax.jit(functools.partial(gpt.init, model), out_shardings=shardings)(jax.random.key(1))
        tokens = jax.sharding.NamedSharding(mesh, parallel.spec(("batch", "seq")))
        whole = jax.sharding.NamedSharding(mesh, jax.P())
        f = functools.partial(gradients, model, config=c, key=jax.random.key(0))
        return jax.device_get(jax.jit(f, out_shardings=(whole, shardings, whole))(params, jax.device_put(rows, tokens)))


@functools.cache
def on_one_device(model: str, packed: bool):
    return loss_and_gradients(config(model), one_device(), batch(packed))


def one_device() -> jax.sharding.Mesh:
    return parallel.make_mesh(devices=jax.devices()[:1])


def initial_state(c: RunConfig, mesh, repeats: int = 1):
    """(model, optimizer, state, its shardings), as in training. Needs a current mesh."""
    model = gpt.GPT(c.model, Compute("cpu", "float32"), (repeats, 0))
    axes = gpt.logical_axes(model)
    optimizer = make_optimizer(c.optimizer, axes)
    fresh = functools.partial(create, functools.partial(gpt.init, model), optimizer, ema=True)
    shardings = state_shardings(jax.eval_shape(fresh, jax.random.key(0)), axes, mesh)
    return model, optimizer, jax.jit(fresh, out_shardings=shardings)(jax.random.key(0)), shardings


@functools.lru_cache(maxsize=2)
def _trainer(c: RunConfig, mesh, repeats: int):
    """(initial state, compiled function of STEPS steps, sharding of their rows): one program for all batches."""
    with jax.set_mesh(mesh):
        model, optimizer, state, shardings = initial_state(c, mesh, repeats)
        rows = jax.NamedSharding(mesh, parallel.spec((None, "batch", "seq")))
        step = make_step(model, optimizer, c, STEPS, np.ones(V))
        step = jax.jit(step, in_shardings=(shardings, rows), out_shardings=(shardings, jax.NamedSharding(mesh, jax.P())))
        return state, step, rows


def train(c: RunConfig, mesh, batches, repeats: int = 1, roundings=()) -> list[tuple[np.ndarray, dict]]:
    """(losses of STEPS steps, parameters after them) for each batch, which is used in every step, from the same start.

    Then for each seed in `roundings`, on the first batch, from a start that is a rounding away.
    """
    with jax.set_mesh(mesh):
        state, step, rows = _trainer(c, mesh, repeats)
        starts = [(state, b) for b in batches]
        starts += [(state.replace(params=next_larger(state.params, seed)), batches[0]) for seed in roundings]
        results = []
        for start, one in starts:
            repeated = jax.tree.map(lambda x: np.broadcast_to(x, (STEPS, *x.shape)), one)
            after, metrics = step(start, jax.device_put(repeated, rows))
            results.append(jax.device_get((metrics["loss"], after.params)))
        return results


@functools.cache
def trained_on_one_device(c: RunConfig, packed: bool):
    """With rows in order, then permuted three times: how far rounding alone leads.

    Lion steps by signs, and a flipped sign moves a number by twice the rate. Permuted rows may flip none when differently split
    sums flip one, so Lion also gets six starts that differ by a rounding of the parameters.
    """
    orders = [np.arange(B), *(np.random.default_rng(seed).permutation(B) for seed in (1, 2, 3))]
    batches = [jax.tree.map(lambda x: x[order], batch(packed)) for order in orders]
    return train(c, one_device(), batches, roundings=range(6) if c.optimizer.name == "lion" else ())


def assert_drifts_no_more_than_permuted_rows(c: RunConfig, mesh, packed: bool, repeats: int = 1) -> float:
    """Over STEPS steps, losses and parameters are at most four times as far from one device's as those of permuted rows.

    A mixture of experts must then send every token to the same experts. Returns the larger of the two ratios.
    """
    (losses, params), *controls = trained_on_one_device(c, packed)
    [(got_losses, got_params)] = train(c, mesh, [batch(packed)], repeats)
    assert losses[-1] < losses[0]
    of_losses = _times(np.max(np.abs(losses - got_losses)), max(np.max(np.abs(losses - x)) for x, _ in controls))
    of_params = _times(distance(params, got_params), max(distance(params, p) for _, p in controls))
    assert of_losses <= 4 and of_params <= 4
    if c.model.n_experts:
        got, wanted = (routes(c, one_device(), p, packed) for p in (got_params, params))
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
    return float(max(of_losses, of_params))


def _times(got: float, control: float) -> float:
    """The ratio of a distance to the control's."""
    return got / control if control else math.inf if got else 0.0


@functools.lru_cache(maxsize=8)
def _router(c: RunConfig, mesh, repeats: int):
    """The compiled function of `routes`."""
    model = gpt.GPT(c.model, Compute("cpu", "float32"), (repeats, 0))
    real_pipeline, real_mixture, real_routed = stages.pipeline, moe._mixture, moe._routed
    turn = [(0, 1)]  # (the micro-batch that a stage computes, their number)

    def pipeline(stage, layers, x_Mb, others_Mb, order):
        def telling(*inputs):
            turn[0] = (inputs[-1], order.micro_batches)
            return stage(*inputs)

        return real_pipeline(telling, layers, x_Mb, others_Mb, order)

    def mixture(config, compute, x_BTD, real_BT, *weights):
        """Encodes each token's row in the batch together with whether it is real: a shard_map sees only its arguments."""
        m, M = turn[0]
        rows_B = jnp.arange(len(x_BTD)) * M + m
        return real_mixture(config, compute, x_BTD, 2 * rows_B[:, None] + real_BT, *weights)

    def routed(config, compute, experts, x_BTD, told_BT, *weights):
        kept, choose = [], moe.ops.choose
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(moe.ops, "choose", lambda *args: kept.append(choose(*args)) or kept[-1])
            y, routing = real_routed(config, compute, experts, x_BTD, told_BT % 2 > 0, *weights)
        b, t = x_BTD.shape[:2]
        places = jnp.arange(T)
        if t < T:
            chunks, i = places.reshape(2 * T // t, t // 2), jax.lax.axis_index("context")
            places = jnp.concatenate([chunks[i], chunks[2 * T // t - 1 - i]])
        chosen_BTE = jax.nn.one_hot(kept[0][0], config.n_experts).sum(1).reshape(b, t, -1)
        everyones = jnp.zeros((B, T, config.n_experts)).at[told_BT[:, :1] // 2, places].set(chosen_BTE)
        return y, routing._replace(tokens_E=everyones)

    def tell(params, rows):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(moe, "_mixture", mixture)
            patch.setattr(moe, "_routed", routed)
            patch.setattr(stages, "pipeline", pipeline)
            _, _, aux = model.apply({"params": params}, rows.tokens, rows.positions, rows.segments, in_order=False)
        return moe.load(aux["routings"])

    with jax.set_mesh(mesh):
        named = parallel.shardings(gpt.logical_axes(model), mesh), jax.NamedSharding(mesh, parallel.spec(("batch", "seq")))
        return jax.jit(tell, in_shardings=named, out_shardings=jax.NamedSharding(mesh, jax.P()))


def routes(c: RunConfig, mesh, params, packed: bool, repeats: int = 1):
    """[mixture, B, T, E]: whether a token goes to an expert.

    Tokens carry the number of their row: with stages, row j of micro-batch m is row j * M + m of the batch
    (parallel/pipeline.cut), and a pipeline's sum over micro-batches combines them. Their position in the row follows from the
    device's place along context: chunks i and 2C - 1 - i (parallel/context.py).
    """
    with jax.set_mesh(mesh):
        return jax.device_get(_router(c, mesh, repeats)(params, batch(packed)))


@functools.cache
def _routes_on_one_device(model: str, packed: bool):
    """(parameters, their routes)."""
    c = config(model)
    with jax.set_mesh(one_device()):
        init = functools.partial(gpt.init, gpt.GPT(c.model, Compute("cpu", "float32")))
        params = jax.device_get(jax.jit(init)(jax.random.key(1)))
    return params, routes(c, one_device(), params, packed)


def assert_routes_equal(model: str, mesh, packed: bool, repeats: int = 1) -> None:
    """In every mixture, every token of a batch goes to the same experts as on one device."""
    params, wanted = _routes_on_one_device(model, packed)
    jax.tree.map(np.testing.assert_array_equal, routes(config(model), mesh, params, packed, repeats), wanted)
    for chosen in jax.tree.leaves(wanted):
        assert np.all(chosen.sum(-1) == MODELS[model].experts_per_token)
        assert len(np.unique(chosen.reshape(-1, chosen.shape[-1]), axis=0)) > chosen.shape[-1], "tokens differ in their experts"


def distance(a, b) -> float:
    """Euclidean, over all parameters, in float64."""
    squares = jax.tree.map(lambda x, y: np.sum(np.square(x.astype(np.float64) - y)), a, b)
    return math.sqrt(sum(jax.tree.leaves(squares)))


def assert_equal(got, wanted) -> float:
    """Loss and gradients agree to 1e-5 of a leaf's largest entry in float32; expert loads are equal (which tokens: `routes`).

    Truly zero gradients are at most 1e-5 of the largest of all, on either side. Returns the largest relative gradient error.
    """
    (parts, grads, weight), (wanted_parts, wanted_grads, wanted_weight) = got, wanted
    parts, wanted_parts = dict(parts), dict(wanted_parts)
    jax.tree.map(np.testing.assert_array_equal, parts.pop("load", {}), wanted_parts.pop("load", {}))
    assert weight == wanted_weight and parts.keys() == wanted_parts.keys()
    for name, value in wanted_parts.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-5, err_msg=name)
    for side in (grads, wanted_grads):
        assert zeros(side) <= ROUNDING, "gradients that are truly zero"
    error, leaf = worst_gradient(grads, wanted_grads)
    assert error <= ROUNDING, leaf
    return error


def worst_gradient(grads, wanted) -> tuple[float, str]:
    """(the largest error of a leaf relative to its largest entry; which leaf)."""
    largest, errors = max(np.max(np.abs(g)) for g in jax.tree.leaves(wanted)), []
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(grads), strict=True):
        name = jax.tree_util.keystr(path)
        scale = largest if name.endswith(ZERO) else np.max(np.abs(a))
        assert scale > 0, name
        errors.append((float(np.max(np.abs(a - b)) / scale), name))
    return max(errors)


def zeros(grads) -> float:
    """The largest entry of the truly zero gradients, relative to the largest of all."""
    largest, found = max(np.max(np.abs(g)) for g in jax.tree.leaves(grads)), [0.0]
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        if jax.tree_util.keystr(path).endswith(ZERO):
            found.append(float(np.max(np.abs(g)) / largest))
    return max(found)


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    return parallel.make_mesh(MeshConfig(**sizes))
