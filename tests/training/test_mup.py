"""muP: what the width changes in a model and its optimizer, formula by formula, so that activation sizes do not depend on it.

Tensor Programs V, arXiv:2203.03466, Table 8. B batch, T positions, D model width
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax.config import ModelConfig, OptimizerConfig
from gpt4o_jax.config_finetune import LoraConfig
from gpt4o_jax.model import gpt, lora
from gpt4o_jax.model.cache import empty_cache
from gpt4o_jax.model.matrices import hidden_matrix
from gpt4o_jax.ops import attention as ops
from gpt4o_jax.ops.attention import attention
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.cross_entropy import cross_entropy
from gpt4o_jax.training.optimizer import OPTIMIZERS, make_optimizer

FLOAT32 = Compute("cpu", "float32")
B, T, V = 4, 16, 64


def model_of(width: int, base: int = 0, **more) -> gpt.GPT:
    shape = dict(vocab_size=V, context_length=T, n_layers=2, d_model=width, n_heads=width // 16, output_init="scaled")
    return gpt.GPT(ModelConfig(**(shape | {"init_std": 0.1, "mup_base_width": base} | more)), FLOAT32)


def initial(model):
    return jax.jit(functools.partial(gpt.init, model))(jax.random.key(0))


def named(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def tokens_and_targets():
    tokens = np.random.default_rng(0).integers(4, V, (B, T + 1)).astype(np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def hidden(model, params, tokens, **more):
    positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
    return model.apply({"params": params}, tokens, positions, jnp.ones_like(tokens), **more)


def test_unembed_is_the_product_with_the_head_under_a_soft_cap(one_device):
    params = initial(model_of(32))
    x = np.random.default_rng(0).normal(size=(2, 3, 32)).astype(np.float32) * 10
    raw = x @ np.asarray(params["unembedding"])
    np.testing.assert_allclose(gpt.unembed(model_of(32), params, x), raw, rtol=1e-4, atol=1e-4)
    capped = gpt.unembed(model_of(32, logit_softcap=2.0), params, x)
    np.testing.assert_allclose(capped, 2 * np.tanh(raw / 2), rtol=1e-4, atol=1e-4)
    assert np.abs(raw).max() > 5


def test_at_the_base_width_nothing_changes(one_device):
    params, mup = initial(model_of(64)), initial(model_of(64, base=64))
    jax.tree.map(np.testing.assert_array_equal, params, mup)
    tokens, _ = tokens_and_targets()
    run = lambda model: jax.jit(lambda p: hidden(model, p, tokens)[0])(params)
    np.testing.assert_array_equal(run(model_of(64)), run(model_of(64, base=64)))


def test_hidden_matrices_start_smaller_and_logits_are_multiplied(one_device):
    """At four times the base width: half the standard deviation, a quarter of the logits; tables are unchanged."""
    wide = model_of(128, base=32)
    params, standard, axes = initial(wide), initial(model_of(128)), gpt.logical_axes(wide)
    is_names = lambda x: isinstance(x, tuple)
    for (name, p), s, names in zip(
        named(params).items(), jax.tree.leaves(standard), jax.tree.leaves(axes, is_leaf=is_names), strict=True
    ):
        np.testing.assert_allclose(p, s * (0.5 if hidden_matrix(names) else 1.0), rtol=1e-6, err_msg=name)
    tokens, _ = tokens_and_targets()
    out, ref = (hidden(m, params, tokens)[0] for m in (wide, model_of(128)))
    np.testing.assert_allclose(out, ref / 4, rtol=1e-6)


@pytest.mark.parametrize("base_head, factor", [(None, 16**-0.5), (4, 4**0.5 / 16)])
def test_attention_scores_are_as_one_over_the_head_width(one_device, base_head, factor):
    """In training, with a cache, and in the reference: sqrt(base head width) / head width."""
    shape = dict(base=32, mup_base_head_dim=base_head, qk_norm=False, positions="none", init_std=0.5, attention="reference")
    model, params = model_of(64, **shape), initial(model_of(64, **shape))
    (tokens, _), scales = tokens_and_targets(), []

    def spy(q, k, v, mask, compute, scale=None, *rest):
        scales.append(scale)
        return attention(q, k, v, mask, compute, scale, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "attention", spy)
        whole = hidden(model, params, tokens)[0]
        cached = hidden(model, params, tokens, cache=empty_cache(model.config, B, T))[0]
    assert len(scales) >= 2 and scales == [pytest.approx(factor)] * len(scales)
    np.testing.assert_allclose(cached, whole, rtol=1e-4, atol=1e-5)
    by_blocks = hidden(model_of(64, **(shape | {"attention": "blocks"})), params, tokens)[0]
    np.testing.assert_allclose(by_blocks, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rates_of_hidden_matrices_follow_the_width(one_device, name):
    """A quarter at four times the base width, without weight decay; Muon needs no factor."""
    model = model_of(64)
    params, axes = initial(model), gpt.logical_axes(model)
    config = OptimizerConfig(name=name, schedule="constant", weight_decay=0.0, clip_norm=0.0)
    grads = jax.tree.map(lambda p: jnp.asarray(np.random.default_rng(0).normal(size=p.shape), jnp.float32), params)

    def first(ratio):
        optimizer = make_optimizer(config, axes, jnp.float32, ratio)
        return named(jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0])

    full, quarter = first(1.0), first(0.25)
    for (leaf, update), names in zip(full.items(), jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)), strict=True):
        factor = 0.25 if hidden_matrix(names) and name != "muon" else 1.0
        scale = np.abs(update).max()
        np.testing.assert_allclose(quarter[leaf], factor * update, atol=1e-4 * scale, err_msg=leaf)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_matrices_that_grow_on_one_side_only_follow_their_fan_in(one_device, name):
    """Routers, and adapters' A, whose inputs grow; not adapters' B, whose inputs are the rank. Muon: sqrt(fan-out / fan-in)."""
    config = OptimizerConfig(name=name, schedule="constant", weight_decay=0.0, clip_norm=0.0)
    experts = gpt.logical_axes(model_of(64, n_experts=4))["layers"]["moe"]
    adapter = lora.logical_axes(LoraConfig(rank=2, targets=("*/up",)), gpt.logical_axes(model_of(64)))["layers"]["mlp"]["up"]
    axes = {"router": experts["router"], "up": experts["up"], **adapter}
    sizes = dict(layers=2, embed=64, mlp=256, expert=4, rank=2)
    params = {k: jnp.ones([sizes[axis] for axis in names]) for k, names in axes.items()}
    grads = jax.tree.map(lambda p: jnp.asarray(np.random.default_rng(0).normal(size=p.shape), jnp.float32), params)

    def first(ratio):
        optimizer = make_optimizer(config, axes, jnp.float32, ratio)
        return jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]

    full, quarter = first(1.0), first(0.25)
    wanted = {"router": 0.5, "up": 1, "A": 0.5, "B": 1} if name == "muon" else {"router": 0.25, "up": 0.25, "A": 0.25, "B": 1}
    for leaf, factor in wanted.items():
        scale = np.abs(full[leaf]).max()
        np.testing.assert_allclose(quarter[leaf], factor * full[leaf], atol=1e-4 * scale, err_msg=leaf)


def test_weight_decay_does_not_follow_the_width(one_device):
    model = model_of(64)
    params, axes = initial(model), gpt.logical_axes(model)
    nothing = jax.tree.map(jnp.zeros_like, params)
    optimizer = make_optimizer(OptimizerConfig(peak_lr=0.1, weight_decay=0.3), axes, jnp.float32, 0.25)
    updates, _ = optimizer.update(nothing, optimizer.init(params), params)
    query = params["layers"]["attention"]["query"]
    np.testing.assert_allclose(updates["layers"]["attention"]["query"], -0.03 * query, rtol=1e-5)


# ---------------------------------------------------------------- the coordinate check

WIDTHS = (64, 512)


def sizes_after_training(width: int, base: int, steps: int = 4) -> dict[str, float]:
    """Mean |change since the start| of the outputs of attention and feed-forward and of the logits, after a few steps."""
    model = model_of(width, base, init_std=0.02)
    config = OptimizerConfig(peak_lr=0.01, weight_decay=0.0, clip_norm=0.0)
    optimizer = make_optimizer(config, gpt.logical_axes(model), jnp.float32, model.config.width_ratio)
    tokens, targets = tokens_and_targets()

    def loss(p):
        h = hidden(model, p, tokens)[0]
        return cross_entropy(h, gpt.unembedding(p), targets, jnp.ones(targets.shape), T, FLOAT32).total / targets.size

    def one_step(_, carry):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return jax.tree.map(jnp.add, params, updates), state

    @jax.jit
    def train(key):
        start = gpt.init(model, key)
        params, _ = jax.lax.fori_loop(0, steps, one_step, (start, optimizer.init(start)))

        def activations(p):
            (h, _, _), inside = hidden(model, p, tokens, capture_intermediates=True)
            layer = inside["intermediates"]["layers"]
            return layer["attention"]["__call__"][0][0], layer["mlp"]["__call__"][0], gpt.unembed(model, p, h)

        after, before = activations(params), activations(start)
        return [jnp.mean(jnp.abs(a - b)) for a, b in zip(after, before, strict=True)]

    return dict(zip(("attention", "mlp", "logits"), map(float, train(jax.random.key(0))), strict=True))


def slopes(base: int) -> dict[str, float]:
    """Exponent s in size ~ width^s between the two widths."""
    narrow, wide = (sizes_after_training(width, base) for width in WIDTHS)
    return {name: math.log(wide[name] / narrow[name]) / math.log(WIDTHS[1] / WIDTHS[0]) for name in narrow}


def test_activations_move_as_far_at_every_width(one_device):
    """The coordinate check (arXiv:2203.03466, D.1): under muP, a few steps of Adam move the outputs of attention, feed-forward
    and head as far at width 512 as at 64. Measured over 64, 128, 256, 512: slopes of -0.13, -0.16, -0.12 with muP, and of 2.5,
    3.1, 0.9 without."""
    mup, standard = slopes(64), slopes(0)
    for name in mup:
        assert abs(mup[name]) < 0.25, (name, mup)
        assert standard[name] > 0.5, (name, standard)
