"""What must hold on an NVIDIA GPU: `JAX_PLATFORMS=cuda,cpu pytest -m gpu tests/gpu`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt4o_jax.data.batches import Batch
from gpt4o_jax.model import gpt
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.products import product
from gpt4o_jax.training.optimizer import make_optimizer
from gpt4o_jax.training.state import create
from gpt4o_jax.training.step import make_step

pytestmark = pytest.mark.gpu

B, T, V = 4, 64, 288
MODEL = ModelConfig(vocab_size=V, context_length=T, n_layers=2, d_model=64, n_heads=4, compute_dtype="bfloat16")


def _batch(K):
    tokens = np.tile(np.arange(T) % 17 + 32, (K, B, 1)).astype(np.int32)
    ones = np.ones((K, B, T), np.int32)
    return Batch(tokens, np.roll(tokens, -1, -1), ones.astype(np.float32), np.cumsum(ones, -1).astype(np.int32) - 1, ones)


def _train(K):
    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        config = RunConfig(model=MODEL, optimizer=OptimizerConfig(name="muon", warmup_steps=0), train=TrainConfig(batch_size=B))
        model = gpt.GPT(MODEL, Compute("gpu", "bfloat16"))
        optimizer = make_optimizer(config.optimizer, gpt.logical_axes(model), jnp.bfloat16)
        state = create(lambda k: gpt.init(model, k), optimizer, jax.random.key(0), ema=False)
        step = jax.jit(make_step(model, optimizer, config, K, np.ones(V, np.int32)))
        return jax.device_get(step(state, _batch(K))[1]["loss"])


def test_the_device_is_a_gpu():
    assert jax.devices()[0].platform == "gpu"


def test_rounded_products_and_their_gradients_match_float32_sums():
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 8, 32), (32, 4, 16)]))
    rounded = lambda a: a.astype(jnp.bfloat16).astype(jnp.float32)

    def ours(x, w):
        return product("BTD,DNH->BTNH", x, w, Compute("gpu", "bfloat16"))

    exact = jnp.einsum("BTD,DNH->BTNH", rounded(x), rounded(w), precision="highest")
    np.testing.assert_allclose(ours(x, w), exact, rtol=1e-5, atol=1e-5)
    g = rounded(jax.random.normal(jax.random.key(2), exact.shape))
    dx, dw = jax.vjp(ours, x, w)[1](g)
    np.testing.assert_allclose(dx, jnp.einsum("BTNH,DNH->BTD", g, rounded(w), precision="highest"), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dw, jnp.einsum("BTNH,BTD->DNH", g, rounded(x), precision="highest"), rtol=1e-4, atol=1e-4)


def test_a_repeating_text_is_learned():
    loss = _train(60)
    assert np.isfinite(loss).all()
    assert loss[-1] < 0.2 < loss[0]


def test_float32_loss_is_the_cpu_s():
    compute = {p: Compute(p, "float32") for p in ("gpu", "cpu")}
    losses = {}
    for platform, c in compute.items():
        device = jax.devices(platform)[0]
        with jax.set_mesh(parallel.make_mesh(devices=[device])):
            model = gpt.GPT(dataclasses.replace(MODEL, output_init="scaled", compute_dtype="float32"), c)
            params = jax.device_put(gpt.init(model, jax.random.key(0)), device)
            batch = jax.device_put(jax.tree.map(lambda x: x[0], _batch(1)), device)
            hidden, _, _ = model.apply({"params": params}, batch.tokens, batch.positions, batch.segments)
            losses[platform] = jax.device_get(hidden)
    np.testing.assert_allclose(losses["gpu"], losses["cpu"], rtol=1e-4, atol=1e-4)
