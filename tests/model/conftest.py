"""A model of any config with random weights and tokens.

B batch, T positions
"""

import functools

import jax
import numpy as np
import pytest

from gpt4o_jax.model import gpt
from gpt4o_jax.ops.compute import Compute

B, T = 2, 9
FLOAT32 = Compute("cpu", "float32")


@pytest.fixture
def run(one_device):
    """Config -> (float64 parameters, all random, tokens, everything that the model computes from them)."""

    def make(config):
        model = gpt.GPT(config, FLOAT32)
        leaves, tree = jax.tree.flatten(jax.eval_shape(functools.partial(gpt.init, model), jax.random.key(0)))
        random = np.random.default_rng(0)
        params = jax.tree.unflatten(tree, [(random.normal(size=x.shape) * 0.4).astype(np.float32) for x in leaves])
        tokens = random.integers(0, config.vocab_size, (B, T)).astype(np.int32)
        positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))

        @jax.jit
        def forward(params):
            out, inside = model.apply({"params": params}, tokens, positions, np.ones_like(tokens), capture_intermediates=True)
            return gpt.unembed(model, params, out[0]), inside["intermediates"]

        logits, inside = forward(params)
        return jax.tree.map(lambda x: x.astype(np.float64), params), tokens, logits, inside

    return make
