"""Attention on rows split over several devices equals that on whole rows, however keys are exchanged; so does the model.

B rows, T positions, N query heads, K key/value heads, H head width, C devices along "context"
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import MeshConfig, ModelConfig, RunConfig, TrainConfig
from gpt4o_jax.data.batches import Batch
from gpt4o_jax.errors import RunError
from gpt4o_jax.model import gpt
from gpt4o_jax.ops.attention import choose, self_attention
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.parallel import context
from gpt4o_jax.training.step import gradients

B, T, N, H = 2, 64, 4, 8
FLOAT32 = Compute("cpu", "float32")
HEADS, KV_HEADS, ROWS = ("batch", "seq", "heads", None), ("batch", "seq", "kv_heads", None), ("batch", "seq")


def mesh_of(C: int):
    """Eight devices, at most two of them along the batch."""
    return parallel.make_mesh(MeshConfig(data=-1, context=C, tensor=2 if C == 2 else 1))


def cut(name, q, k, v, segments, sinks, compute=FLOAT32, **knobs):
    """Attention on rows in their usual order, on the current mesh."""
    f = functools.partial(context.context_attention, name, compute, **knobs)
    f = parallel.per_shard(f, [HEADS, KV_HEADS, KV_HEADS, ROWS, ("heads",)], HEADS)
    q, k, v = map(context.zigzag, (q, k, v))
    return context.in_order(f(q, k, v, None if segments is None else context.zigzag(segments), sinks))


# ---------------------------------------------------------------- zig-zag order


@pytest.mark.parametrize("C", [2, 4, 8])
def test_device_i_holds_chunks_i_and_its_mirror(C):
    x = jnp.arange(B * T * 3).reshape(B, T, 3)
    chunks = np.asarray(x).reshape(B, 2 * C, -1, 3)
    with jax.set_mesh(mesh_of(C)):
        moved = jax.jit(context.zigzag)(x)
        for i in range(C):
            held = np.concatenate([chunks[:, i], chunks[:, 2 * C - 1 - i]], axis=1)
            np.testing.assert_array_equal(moved[:, i * T // C : (i + 1) * T // C], held)
        assert moved.addressable_shards[0].data.shape[1] == T // C
        np.testing.assert_array_equal(jax.jit(context.in_order)(moved), x)


def test_rows_that_do_not_divide_stay_whole():
    with jax.set_mesh(mesh_of(4)):
        assert [context.parts(length) for length in (64, 8, 60, 4, 1)] == [4, 4, 1, 1, 1]
        x = jnp.arange(2 * 60).reshape(2, 60)
        np.testing.assert_array_equal(context.in_order(context.zigzag(x)), x)
        np.testing.assert_array_equal(context.zigzag(x), x)


# ---------------------------------------------------------------- attention

VARIANTS = {
    "plain": {},
    "packed": dict(packed=True, sinks=True),
    "narrow window": dict(packed=True, window=3, softcap=2.0),
    "window of a chunk or so": dict(window=9, sinks=True),
    "wide window": dict(packed=True, window=40, scale=0.3),
}
PRODUCT = [(C, K, name, variant) for C in (2, 4, 8) for K in (1, 2, 4) for name in context.MEETINGS for variant in VARIANTS]
PRODUCT = [case for case in PRODUCT if case[1] > 1 or case[0] > 2]  # with context=2, two devices share the heads
# tests/system has the product.
CASES = [(4, 2, "ring", variant) for variant in VARIANTS]
CASES += [(2, 2, "ring", "wide window"), (8, 1, "ring", "packed"), (8, 4, "ring", "narrow window")]
CASES += [(4, 2, "gather", "packed"), (2, 4, "gather", "window of a chunk or so"), (8, 1, "gather", "wide window")]


def inputs(K: int):
    keys = jax.random.split(jax.random.key(K), 4)
    q, g = (jax.random.normal(key, (B, T, N, H)) for key in keys[:2])
    k, v = (jax.random.normal(key, (B, T, K, H)) for key in keys[2:])
    ends = np.array([[5, 38, T - 3], [17, 18, T]])  # documents that span chunks and devices, and padding
    segments = 1 + np.sum(np.arange(T)[None, :, None] >= ends[:, None, :], axis=-1)
    return q, k, v, jnp.asarray(np.where(segments == 4, 0, segments), jnp.int32), jnp.array([-2.0, 0.0, 1.0, 3.0]), g


def with_gradients(f, K, packed=False, sinks=False, **knobs):
    """(output, gradients of q, k, v and sinks)."""
    q, k, v, segments, sink, g = inputs(K)

    def run():
        call = lambda q, k, v, sink: f(q, k, v, segments if packed else None, sink if sinks else None, **knobs)
        out, pull = jax.vjp(call, q, k, v, sink)
        return out, pull(g)

    return jax.device_get(jax.jit(run)())


@functools.cache
def reference(K, variant):
    return with_gradients(functools.partial(self_attention, "reference", FLOAT32), K, **VARIANTS[variant])


def error(C, K, name, variant, compute=FLOAT32) -> float:
    """The largest max|a - b| / max|a| over output and gradients."""
    with jax.set_mesh(mesh_of(C)):
        got = with_gradients(functools.partial(cut, name, compute=compute), K, **VARIANTS[variant])
    pairs = zip(jax.tree.leaves(reference(K, variant)), jax.tree.leaves(got), strict=True)
    return max(np.max(np.abs(a - b)) / max(np.max(np.abs(a)), 1e-30) for a, b in pairs)


@pytest.mark.parametrize("C, K, name, variant", CASES)
def test_cut_rows_give_what_whole_rows_give(C, K, name, variant):
    assert error(C, K, name, variant) <= 1e-5


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("name", context.MEETINGS)
def test_all_heads_at_once_as_accelerators_have_them(name, dtype, tolerance):
    assert error(4, 2, name, "packed", Compute("tpu", dtype)) <= tolerance


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_it_lowers_for_accelerators(platform):
    q, k, v, segments, sinks, _ = inputs(2)
    with jax.set_mesh(mesh_of(4)):
        both = jax.jit(
            jax.grad(lambda *x: jnp.sum(cut("ring", *x, segments, sinks, Compute(platform, "bfloat16"), window=9)), (0, 1, 2))
        )
        assert "collective_permute" in both.trace(q, k, v).lower(lowering_platforms=(platform,)).as_text()


MUTATIONS = {
    "nothing is sent": ("ring", "_send", lambda tree, shift: tree),
    "sent the other way": ("ring", "_send", lambda tree, shift, send=context._send: send(tree, -shift)),
    "sent too far": ("ring", "_send", lambda tree, shift, send=context._send: send(tree, shift + 1)),
    "gathered in zig-zag order": ("gather", "_gathered", lambda x: jax.lax.all_gather(x, "context").reshape(-1, *x.shape[1:])),
    "gradients of the own keys only": ("gather", "_scattered", lambda x: x[:2]),
    "no way round for a window": ("ring", "_legs", lambda C, window, c: []),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mistakes_would_show(name, monkeypatch):
    method, function, wrong = MUTATIONS[name]
    monkeypatch.setattr(context, function, wrong)
    assert error(4, 2, method, "wide window") > 1e-2


def test_a_window_is_not_sent_further_than_it_reaches():
    """Moves of the keys: a window within a chunk needs both neighbours, so four of the seven moves."""
    moves = lambda window: sum(count for _, count, _ in context._legs(8, window, 4))
    assert [moves(w) for w in (1, 2, 5, 6, 100, None)] == [0, 2, 2, 4, 7, 7]


# ---------------------------------------------------------------- memory


def temporaries(f, mesh, seq) -> int:
    """Bytes of temporaries per device for attention, forward and backward, on one row of 8192 tokens."""
    shape = lambda n, dtype=jnp.float32: jax.ShapeDtypeStruct(
        (1, 8192, *n), dtype, sharding=jax.NamedSharding(mesh, jax.P(None, seq))
    )

    def both(q, k, v, segments, g):
        out, pull = jax.vjp(lambda q, k, v: f(q, k, v, segments, None), q, k, v)
        return out, pull(g)

    with jax.set_mesh(mesh):
        lowered = jax.jit(both).lower(shape((4, 32)), shape((2, 32)), shape((2, 32)), shape((), jnp.int32), shape((4, 32)))
        return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", context.MEETINGS)
def test_a_quarter_of_the_row_takes_less_than_a_third_of_the_memory(name):
    whole = temporaries(functools.partial(self_attention, "blocks", FLOAT32), parallel.make_mesh(devices=jax.devices()[:1]), None)
    f = functools.partial(context.context_attention, name, FLOAT32)
    heads = (None, *HEADS[1:2], None, None)
    f = parallel.per_shard(f, [heads, heads, heads, (None, "seq"), (None,)], heads)
    assert temporaries(f, mesh_of(4), "context") <= 0.3 * whole


# ---------------------------------------------------------------- the model

MODEL = ModelConfig(
    vocab_size=48, context_length=32, n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, layer_pattern=("local", "global"),
    window=7, output_init="scaled", init_std=0.4, attention_softcap=5.0, attention_sinks=True, value_embeddings=1, mtp_heads=1,
)  # fmt: skip
MESHES = {
    "ring": MeshConfig(data=2, context=4),
    "gather": MeshConfig(data=1, fsdp=2, context=2, tensor=2),
}


def packed_batch() -> Batch:
    """[4, 32]: rows of documents of various lengths, the last row with padding."""
    random, length = np.random.default_rng(0), MODEL.context_length
    tokens = random.integers(4, MODEL.vocab_size, (4, length + 1)).astype(np.int32)
    ends = np.sort(random.integers(1, length, (4, 3)), axis=1)
    segments = 1 + np.sum(np.arange(length)[None, :, None] >= ends[:, None, :], axis=-1).astype(np.int32)
    segments[3, 29:] = 0
    starts = np.maximum.accumulate(np.where(np.diff(segments, axis=1, prepend=-1) != 0, np.arange(length), 0), axis=1)
    positions = (np.arange(length) - starts).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], (segments > 0).astype(np.float32), positions, segments)


@functools.cache
def loss_and_gradients(name):
    mesh = parallel.make_mesh(MESHES[name]) if name else parallel.make_mesh(devices=jax.devices()[:1])
    model = gpt.GPT(dataclasses.replace(MODEL, attention=name or "auto"), FLOAT32)
    with jax.set_mesh(mesh):
        shardings = parallel.shardings(gpt.logical_axes(model), mesh)
        params = jax.jit(functools.partial(gpt.init, model), out_shardings=shardings)(jax.random.key(1))
        batch = jax.device_put(packed_batch(), jax.NamedSharding(mesh, parallel.spec(ROWS)))
        f = functools.partial(
            gradients, model, config=RunConfig(model=MODEL, train=TrainConfig(loss_chunk=8)), key=jax.random.key(0)
        )
        whole = jax.NamedSharding(mesh, jax.P())
        return jax.device_get(jax.jit(f, out_shardings=(whole, shardings, whole))(params, batch))


@pytest.mark.parametrize("name", MESHES)
def test_loss_and_gradients_equal_one_device(name):
    losses, grads, weight = loss_and_gradients(name)
    wanted_losses, wanted, wanted_weight = loss_and_gradients(None)
    assert weight == wanted_weight
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), losses, wanted_losses)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(grads), strict=True):
        assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(a)), jax.tree_util.keystr(path)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("wanted", "T", "dropout", "C", "told"),
    [
        ("auto", 100, False, 4, "ring needs a context_length of a multiple of 8 .2 . mesh.context., not 100"),
        ("auto", 64, True, 4, "ring has no dropout on attention weights, and nothing else takes rows cut by mesh.context=4"),
        ("blocks", 64, False, 4, "model.attention=blocks needs whole rows, and mesh.context=4 cuts them; auto would take ring"),
        ("gather", 64, False, 1, "model.attention=gather is for rows cut over several devices, .*; auto would take blocks"),
        ("reference", 60, False, 8, "model.attention=reference needs whole rows"),
    ],
)
def test_what_cannot_be_cut_is_told(wanted, T, dropout, C, told):
    with pytest.raises(RunError, match=told):
        choose(wanted, FLOAT32, T, 64, dropout=dropout, context=C)


def test_rows_that_are_cut_take_the_ring_on_every_platform():
    for compute in (FLOAT32, Compute("gpu", "bfloat16"), Compute("tpu", "bfloat16")):
        assert [choose(wanted, compute, 64, 64, context=4) for wanted in ("auto", "gather")] == ["ring", "gather"]
