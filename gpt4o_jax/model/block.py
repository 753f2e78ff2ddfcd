"""One block of the decoder, and the stack of them: a scan over the periods of the layer pattern.

B batch, T positions, D model width, L layers
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt4o_jax.config import ModelConfig
from gpt4o_jax.model.attention import Attention
from gpt4o_jax.model.layers import Norm, normal
from gpt4o_jax.model.mlp import MLP
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.positions import Rotation
from gpt4o_jax.parallel import constrain


class Shared(NamedTuple):
    """What every layer reads."""

    positions_BT: jax.Array
    segments_BT: jax.Array
    rotation: Rotation | None


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Shaped for nn.scan: carry in, carry and cache out.

    norm_position "post": x + norm(attention(x)), x + norm(mlp(x)) (OLMo 2, arXiv:2501.00656); "sandwich":
    x + norm(attention(norm(x))), x + norm(mlp(norm(x))) (Gemma 2, arXiv:2408.00118). The residual stream itself is never normed.
    """

    config: ModelConfig
    compute: Compute
    train: bool
    window: int | None = None

    @nn.compact
    def __call__(self, x_BTD, layer_cache, shared: Shared):
        c = self.config
        zero = c.output_init == "zero"
        output_init = nn.initializers.zeros if zero else normal(c.hidden_std / (2 * c.n_layers) ** 0.5)
        y_BTD, layer_cache = Attention(c, self.compute, output_init, self.window, name="attention")(
            self._norm("attention_norm", x_BTD, "pre"), *shared, layer_cache, self.train
        )
        x_BTD = constrain(x_BTD + self._norm("attention_post_norm", y_BTD, "post"), "batch", "seq", "embed")
        y_BTD = MLP(c, self.compute, output_init, name="mlp")(self._norm("mlp_norm", x_BTD, "pre"), self.train)
        return constrain(x_BTD + self._norm("mlp_post_norm", y_BTD, "post"), "batch", "seq", "embed"), layer_cache

    def _norm(self, name: str, x_BTD, position: str):
        """A norm on the input ("pre") or the output ("post") of a sub-layer, where norm_position wants one there."""
        if self.config.norm_position not in (position, "sandwich"):
            return x_BTD
        return make_norm(self.config, name)(x_BTD)


def make_norm(c: ModelConfig, name: str) -> Norm:
    return Norm(c.norm, c.norm_eps, c.bias, c.norm_unit_offset, name=name)


REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def _block(c: ModelConfig):
    """Block, recomputed in the backward pass as the config wants it."""
    return Block if c.remat == "none" else nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)


class Period(nn.Module):
    """The layers of one period of the pattern, one after another: block_0, block_1, ...; caches [layers, ...]."""

    config: ModelConfig
    compute: Compute
    train: bool

    @nn.compact
    def __call__(self, x_BTD, caches, shared: Shared):
        out = []
        for i, window in enumerate(self.config.windows):
            block = _block(self.config)(self.config, self.compute, self.train, window, name=f"block_{i}")
            x_BTD, layer_cache = block(x_BTD, jax.tree.map(lambda leaf, i=i: leaf[i], caches), shared)
            out.append(layer_cache)
        return x_BTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *out)


def layers(c: ModelConfig, compute: Compute, train: bool, x_BTD, caches, shared: Shared):
    """All layers, inside a compact module; caches: None, or arrays [L, ...]. Returns (x_BTD, caches).

    Their parameters are one tree with a leading axis of periods. A pattern of one kind has no inner names:
    layers/attention/query [L, ...]. One of P kinds has a block for each of its places, and layer l is entry
    l // P of block_(l % P): layers/block_0/attention/query [L / P, ...].
    """
    single = len(c.layer_pattern) == 1
    scan = nn.scan(
        _block(c) if single else Period,
        variable_axes={"params": 0, "intermediates": 0},  # the latter for capture_intermediates=True
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=c.periods,
        unroll=c.scan_unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    if single:
        return scan(c, compute, train, c.windows[0], name="layers")(x_BTD, caches, shared)
    caches = jax.tree.map(lambda leaf: leaf.reshape(c.periods, -1, *leaf.shape[1:]), caches)
    x_BTD, caches = scan(c, compute, train, name="layers")(x_BTD, caches, shared)
    return x_BTD, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), caches)
