"""The decoder: no information from later tokens or other documents; counts, axes, remat, dropout and sharding as declared.

B batch, T positions, D model width, V vocabulary
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import ModelConfig
from gpt4o_jax.data.batches import make_batch
from gpt4o_jax.errors import RunError
from gpt4o_jax.model import flops, gpt
from gpt4o_jax.model.attention import Attention, implementation
from gpt4o_jax.model.layers import normal
from gpt4o_jax.model.mlp import MLP
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.cross_entropy import token_scores
from gpt4o_jax.parallel.rules import RULES
from gpt4o_jax.training.step import loss_sum
from tests.pairwise import pairwise

SMALL = ModelConfig(
    vocab_size=64, context_length=16, n_layers=3, d_model=16, n_heads=4, n_kv_heads=2, output_init="scaled", init_std=0.3
)
BROKEN_OFF = dict(n_layers=5, layer_pattern=("local", "local", "global"), window=3, rope_local_theta=50.0)
EXPERTS = dict(n_experts=4, n_shared_experts=1, router_bias=True, moe_every=2, n_layers=3, mtp_heads=1)
PATTERN = dict(n_layers=4, layer_pattern=("local", "global"), window=3, attention_sinks=True)
EXTRAS = dict(residual_mix=True, value_embeddings=1, mtp_heads=2)
FLOAT32 = Compute("cpu", "float32")


def make(**changes):
    model = gpt.GPT(dataclasses.replace(SMALL, **changes), FLOAT32)
    return model, jax.jit(functools.partial(gpt.init, model))(jax.random.key(0))


def documents(*lengths):
    """Documents of distinct ids, as a row of (tokens, document numbers)."""
    ids = np.arange(4, 4 + sum(lengths), dtype=np.int32)
    return ids, np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)


def close(got, wanted, tolerance=1e-5):
    assert np.max(np.abs(np.asarray(got) - np.asarray(wanted))) <= tolerance * np.max(np.abs(np.asarray(wanted)))


def score(model, params, batch):
    """Negative log-likelihood of every target, [B, T]."""
    hidden, _, _ = model.apply({"params": params}, batch.tokens, batch.positions, batch.segments)
    return token_scores(hidden, gpt.unembedding(params), batch.targets, 512, FLOAT32)[0]


# ---------------------------------------------------------------- what a token may see


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_gradients_flow_from_earlier_tokens_of_the_same_document_only(one_device, positions):
    """All tokens are distinct, so each row of the embedding gradient belongs to one position in the batch."""
    model, params = make(positions=positions, mlp="gelu")
    ids, segments = documents(5, 3, 5)
    batch = make_batch([(ids, segments), (ids + 20, np.ones_like(segments))])
    jacobian = jax.jit(jax.jacrev(lambda table: score(model, {**params, "embedding": table}, batch)))
    by_token = np.asarray(jacobian(params["embedding"]))
    for row, t, other, s in itertools.product(range(2), range(12), range(2), range(12)):
        visible = row == other and s <= t and batch.segments[row, s] == batch.segments[row, t]
        flows = np.any(by_token[row, t, batch.tokens[other, s]] != 0)
        assert flows == visible, f"row {row}: the loss at {t} and the token at {s} of row {other}"


@pytest.mark.parametrize("changes", [dict(positions=p) for p in ("rope", "learned", "none")] + [PATTERN, EXTRAS])
def test_a_packed_row_is_its_documents_one_by_one(one_device, changes):
    model, params = make(**changes)
    lengths = [6, 2, 5]
    ids, segments = documents(*lengths)
    packed = make_batch([(np.pad(ids, (0, 4)), np.pad(segments, (0, 4)))])
    ends = np.cumsum(lengths)
    alone = [(ids[end - n : end], np.ones(n, np.int32)) for n, end in zip(lengths, ends, strict=True)]
    separate = make_batch([tuple(np.pad(x, (0, 17 - len(x))) for x in row) for row in alone])
    f = jax.jit(functools.partial(score, model))
    per_token, wanted = f(params, packed)[0], np.sum(f(params, separate) * separate.weights * (separate.segments > 0), axis=1)
    for n, end, loss in zip(lengths, ends, wanted, strict=True):
        np.testing.assert_allclose(np.sum(per_token[end - n : end - 1]), loss, rtol=1e-5)
    only_text = dataclasses.replace(packed, weights=packed.weights * (packed.segments > 0))
    total = jax.jit(lambda p, b: loss_sum(model, p, b, 5)[0])(params, only_text)
    np.testing.assert_allclose(total, np.sum(wanted), rtol=1e-5)


# ---------------------------------------------------------------- counts


# Options that occur in one formula: here every pair of values of two options, in tests/system every combination.
CROSSES = {
    "attention": dict(
        n_kv_heads=[None, 2, 1], qk_norm=[False, True], bias=[False, True], positions=["rope", "none"], head_dim=[None, 6]
    ),
    "attention's options": dict(
        qk_norm_over=["head", "projection"],
        qkv_bias=[None, False, True],
        attention_sinks=[False, True],
        layer_pattern=[("global",), ("local", "global"), ("local", "global", "local")],
        n_layers=[4],
        window=[16],
    ),
    "feed-forward and norms": dict(
        mlp=["gelu", "relu2", "swiglu", "geglu"], norm=["rms", "layer"], bias=[False, True], norm_position=["pre", "sandwich"]
    ),
    "speedruns and multi-token prediction": dict(
        residual_mix=[False, True], value_embeddings=[0, 1], mtp_heads=[0, 2], norm=["rms", "layer"], bias=[False, True]
    ),
    "experts": dict(
        n_experts=[3],
        moe_every=[1, 2],
        n_layers=[3],
        n_shared_experts=[0, 2],
        expert_d_ff=[None, 5],
        router_bias=[False, True],
        mlp=["relu2", "swiglu"],
        mtp_heads=[0, 1],
    ),
    "tables": dict(tied=[False, True], positions=["rope", "learned", "none"], norm=["rms", "layer"], bias=[False, True]),
}


@pytest.mark.parametrize("cross", CROSSES)
def test_counts_are_exact(one_device, cross):
    """parameter_count against the tree itself, forward_flops_per_token against the products of the traced program."""
    for options in pairwise(CROSSES[cross]):
        assert_counts_are_exact(options)


def assert_counts_are_exact(options: dict):
    c = dataclasses.replace(SMALL, **dict(n_layers=2) | options)
    # Traced as for a GPU: on CPU experts pad their groups of tokens.
    model = gpt.GPT(dataclasses.replace(c, attention="reference"), Compute("gpu", "float32") if c.n_experts else FLOAT32)
    params = jax.eval_shape(functools.partial(gpt.init, model), jax.random.key(0))
    assert flops.parameter_count(c) == sum(math.prod(x.shape) for x in jax.tree.leaves(params)), c
    program = jax.make_jaxpr(functools.partial(logits, model))(params, jnp.zeros((3, 8), jnp.int32))
    assert flops.forward_flops_per_token(c, keys=8) * 3 * 8 == products(program.jaxpr), c


def logits(model, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return gpt.unembed(model, params, model.apply({"params": params}, tokens, positions, jnp.ones_like(tokens))[0])


def products(jaxpr) -> int:
    """Operations of all matrix products in a program, a scan's body counted as often as it runs; without sums (ops/sums.py)."""
    total = 0
    for equation in jaxpr.eqns:
        name, ranks = equation.primitive.name, [v.aval.ndim for v in equation.invars]
        if name in ("dot_general", "ragged_dot_general"):
            (contracted, _), _ = equation.params.get("dimension_numbers") or (
                equation.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
            )
            if len(contracted) in ranks[:2]:  # contracts all axes of an operand: a sum
                continue
            total += 2 * equation.outvars[0].aval.size * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                total += products(inner) * equation.params.get("length", 1)
    return total


@pytest.mark.parametrize("heads", [0, 2])
def test_training_takes_three_times_the_forward_products(one_device, heads):
    """Without remat: the loss and its gradient, all T keys counted for every token."""
    # Other attention implementations skip masked keys or recompute scores.
    model, params = make(context_length=8, attention="reference", mtp_heads=heads)
    row = (np.arange(9, dtype=np.int32), np.ones(9, np.int32))
    loss = lambda p: loss_sum(model, p, make_batch([row, row]), 8, mtp_weight=0.3)[0]
    program = jax.make_jaxpr(jax.value_and_grad(loss))(params)
    assert flops.train_flops_per_token(model.config) * 2 * 8 == products(program.jaxpr)


def test_local_layers_count_the_keys_of_their_window():
    pure = lambda kind: dataclasses.replace(SMALL, n_layers=4, window=3, layer_pattern=(kind,))
    wide, narrow = (flops.forward_flops_per_token(pure(kind), keys=8) for kind in ("global", "local"))
    assert wide - narrow == 4 * (8 - 3) * 4 * SMALL.n_heads * SMALL.head_width
    mixed = dataclasses.replace(SMALL, n_layers=4, window=3, layer_pattern=("local", "global"))
    assert flops.forward_flops_per_token(mixed, keys=8) == (wide + narrow) / 2
    assert flops.forward_flops_per_token(pure("local"), keys=2) == flops.forward_flops_per_token(pure("global"), keys=2)


# ---------------------------------------------------------------- axes and sharding


@pytest.mark.parametrize(
    "changes",
    [
        {},
        PATTERN,
        BROKEN_OFF,
        EXPERTS,
        EXTRAS,
        {"tied": True, "positions": "learned", "bias": True, "norm": "layer", "mlp": "swiglu"},
    ],
)
def test_every_axis_has_a_name_with_a_rule(one_device, changes):
    model, params = make(**changes)
    axes = gpt.logical_axes(model)
    assert jax.tree.structure(params) == jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, tuple))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = functools.reduce(lambda tree, key: tree[key.key], path, axes)
        assert len(names) == leaf.ndim and set(names) <= set(RULES)
        assert leaf.dtype == jnp.float32
        assert names[0] == {"layers": "layers", "last_layers": "layers", "ahead": "ahead"}.get(path[0].key, names[0])
        assert (names[0] in ("layers", "ahead")) == (path[0].key in ("layers", "last_layers", "ahead"))
        assert path[0].key != "layers" or leaf.shape[0] == model.config.periods


def test_constrain_needs_a_mesh():
    with pytest.raises(ValueError, match="set_mesh"):
        parallel.constrain(jnp.zeros((2, 2)), "batch", "seq")
    with jax.set_mesh(parallel.make_mesh()):
        x = jax.jit(lambda x: parallel.constrain(x, "batch", "seq"))(jnp.zeros((16, 2)))
    assert x.sharding.shard_shape(x.shape) == (16 // jax.device_count(), 2)


def test_the_program_of_the_model_holds_its_constraints(one_device):
    """Flax's own constraint is silently dropped if it finds no mesh; these must be there."""
    model, params = make()
    text = str(jax.make_jaxpr(lambda p, x: logits(model, p, x))(params, jnp.zeros((2, 8), jnp.int32)))
    constraints = [line for line in text.splitlines() if "sharding_constraint" in line]
    assert len(constraints) >= 1 + 3 + 1 + 2, "embedding; queries, keys, values; hidden layer; two residuals"


# ---------------------------------------------------------------- the same numbers in other ways


@pytest.mark.parametrize("base, unroll", [({}, 3), (PATTERN, 2)])
def test_remat_and_unrolling_change_no_result(one_device, base, unroll):
    row = (np.arange(13, dtype=np.int32), np.ones(13, np.int32))
    batch = make_batch([row])

    def run(**changes):
        model, params = make(**base | changes)
        return jax.jit(jax.value_and_grad(lambda p: loss_sum(model, p, batch, 8)[0]))(params)

    wanted = run()
    for changes in ({"remat": "full"}, {"scan_unroll": unroll}, {"scan_unroll": unroll, "remat": "full"}):
        jax.tree.map(close, run(**changes), wanted)


@pytest.mark.parametrize("attention", ["reference", "blocks"])
@pytest.mark.parametrize("changes", [{}, PATTERN | EXPERTS | {"n_layers": 4}], ids=["dense", "pattern"])
def test_rows_of_one_document_need_no_segments(one_device, attention, changes):
    """Even if padding follows: none of their tokens sees it, and experts still do not count it."""
    model, params = make(attention=attention, **changes)
    alone = gpt.GPT(model.config, dataclasses.replace(FLOAT32, packed=False))
    row = (np.arange(13, dtype=np.int32), np.ones(13, np.int32))
    padded = (row[0], (np.arange(13) < 7).astype(np.int32))
    batch = make_batch([row, padded])
    run = lambda model: jax.jit(jax.value_and_grad(lambda p: loss_sum(model, p, batch, 8, balance_loss=0.1)[0]))(params)
    jax.tree.map(close, run(alone), run(model))
    two = make_batch([(row[0], np.repeat([1, 2], [6, 7]).astype(np.int32))])
    with pytest.raises(AssertionError):
        close(score(alone, params, two), score(model, params, two))


def test_a_pattern_with_wide_windows_is_the_model_without(one_device):
    """Layer l is entry l // P of block_(l % P)."""
    plain, params = make(n_layers=4)
    row = (np.arange(13, dtype=np.int32), np.ones(13, np.int32))
    wanted = score(plain, params, make_batch([row]))
    model, _ = make(n_layers=4, layer_pattern=("local", "global"), window=16)
    blocks = {f"block_{i}": jax.tree.map(lambda x: x[i::2], params["layers"]) for i in range(2)}
    close(score(model, {**params, "layers": blocks}, make_batch([row])), wanted)
    model, _ = make(n_layers=4, layer_pattern=("local", "global", "local"), window=16)
    blocks = {f"block_{i}": jax.tree.map(lambda x: x[i : i + 1], params["layers"]) for i in range(4)}
    parts = {"layers": {f"block_{i}": blocks[f"block_{i}"] for i in range(3)}, "last_layers": {"block_0": blocks["block_3"]}}
    close(score(model, {**params, **parts}, make_batch([row])), wanted)


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("layer", ["mlp", "attention"])
def test_dropout_keeps_the_mean(one_device, layer):
    """Averaged over many keys, the output equals that without dropout, which enters both layers linearly."""
    c = dataclasses.replace(SMALL, dropout=0.3)
    x = jax.random.normal(jax.random.key(1), (1, 6, 16))
    positions = jnp.arange(6)[None]
    module = MLP(c, FLOAT32, normal(0.3)) if layer == "mlp" else Attention(c, FLOAT32, normal(0.3))
    inputs = dict(positions_BT=positions, segments_BT=jnp.ones_like(positions), rotation=None, layer_cache=None)
    inputs = dict(x_BTD=x) | ({} if layer == "mlp" else inputs)
    params = jax.jit(lambda k: module.init(k, **inputs, train=False))(jax.random.key(2))
    run = lambda train, key: jax.tree.leaves(module.apply(params, **inputs, train=train, rngs={"dropout": key}))[0]
    samples = jax.jit(jax.vmap(functools.partial(run, True)))(jax.random.split(jax.random.key(3), 4000))
    without = jax.jit(functools.partial(run, False))(jax.random.key(0))
    error = jnp.std(samples, axis=0) / 4000**0.5
    assert float(jnp.min(error)) > 0
    assert float(jnp.max(jnp.abs(jnp.mean(samples, axis=0) - without) / error)) < 5


def test_dropout_acts_in_training_only_and_follows_its_key(one_device):
    model, params = make(dropout=0.5)
    tokens = jnp.arange(10)[None]

    @functools.partial(jax.jit, static_argnums=0)
    def run(train, key):
        rngs = {"dropout": jax.random.key(key)}
        return model.apply({"params": params}, tokens, tokens, jnp.ones_like(tokens), train=train, rngs=rngs)[0]

    np.testing.assert_array_equal(run(False, 0), run(False, 1))
    np.testing.assert_array_equal(run(True, 0), run(True, 0))
    assert jnp.any(run(True, 0) != run(True, 1)) and jnp.any(run(True, 0) != run(False, 0))


def test_a_named_implementation_is_asked_for_the_whole_model(one_device):
    """Parameters are initialised on one token, which the TPU kernel does not support; unsupported rows are refused."""
    config = ModelConfig(vocab_size=64, context_length=256, n_layers=1, d_model=128, n_heads=1, attention="splash")
    tpu = Compute("tpu", "bfloat16")
    assert "layers" in gpt.logical_axes(gpt.GPT(config, tpu))
    assert implementation(config, tpu, 256, dropout=False) == "splash"
    with pytest.raises(RunError, match="multiple of 128, not 200; auto would take reference"):
        implementation(config, tpu, 200, dropout=False)
    capped = dataclasses.replace(config, attention="auto", attention_softcap=50.0)
    assert implementation(capped, Compute("gpu", "bfloat16"), 256, dropout=False) == "reference"
