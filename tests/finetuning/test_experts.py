"""The losses that balance experts act in DPO and GRPO as in ordinary training."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from gpt4o_jax.config import ModelConfig, RunConfig, TrainConfig
from gpt4o_jax.finetuning.preference import dpo_loss
from gpt4o_jax.finetuning.reinforced import BESIDE, grpo_loss
from gpt4o_jax.model import gpt
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.training.step import gradients, next_token
from tests.parallel.meshes import batch as random_batch

SIZES = ModelConfig(
    vocab_size=48, context_length=16, n_layers=2, d_model=16, n_heads=4, init_std=0.3, output_init="scaled", n_experts=4,
    experts_per_token=2, d_ff=12,
)  # fmt: skip
MODEL = gpt.GPT(SIZES, Compute("cpu", "float32"))
LOSSES = {"dpo": functools.partial(dpo_loss, 0.5, 0.2, 1), "grpo": functools.partial(grpo_loss, 0.2, 0.1)}


@pytest.mark.parametrize("method", LOSSES)
def test_experts_add_to_the_gradient_what_they_add_in_ordinary_training(one_device, method):
    zeros = np.zeros((8, 16), np.float32)
    batch = dataclasses.replace(random_batch(False), beside=dict.fromkeys(BESIDE, zeros))
    params = jax.jit(functools.partial(gpt.init, MODEL))(jax.random.key(0))

    def compute(loss, **weights):
        config = RunConfig(model=SIZES, train=TrainConfig(loss_chunk=5, **weights))
        parts, grads, _ = jax.jit(lambda p: gradients(MODEL, p, batch, config, jax.random.key(0), loss=loss))(params)
        return parts, grads

    off, on = dict(balance_loss=0.0, router_z_loss=0.0), dict(balance_loss=0.5, router_z_loss=0.25)
    parts, got = compute(LOSSES[method], **on)
    ordinary, wanted = compute(next_token, **on)
    for name in ("balance_loss", "router_z_loss"):
        np.testing.assert_allclose(parts[name], ordinary[name], rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, parts["load"], ordinary["load"])
    added = jax.tree.map(np.subtract, got, compute(LOSSES[method], **off)[1])
    wanted = jax.tree.map(np.subtract, wanted, compute(next_token, **off)[1])
    assert any(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(wanted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-5, rtol=1e-4), wanted, added)
