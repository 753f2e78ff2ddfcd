"""The decoder: token embedding, a stack of blocks in one scanned tree, a final norm; and the head.

B batch, T positions, D model width, V vocabulary, L layers

    hidden_BTD, cache, aux = model.apply({"params": params}, tokens_BT, positions_BT, segments_BT, cache)
    logits_BTV = unembed(params, hidden_BTD, compute)

Parameters are a plain nested dict of float32 arrays; those of the blocks carry a leading
axis L. `logical_axes(model)` is the tree of the same shape that names every axis.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt4o_jax.config import ModelConfig
from gpt4o_jax.model.attention import Attention
from gpt4o_jax.model.cache import Cache
from gpt4o_jax.model.layers import Norm, normal, param
from gpt4o_jax.model.mlp import MLP
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.positions import RopeScaling, rotation
from gpt4o_jax.ops.products import product
from gpt4o_jax.parallel import constrain


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Shaped for nn.scan: carry in, carry and cache out.

    norm_position "post": x + norm(attention(x)), x + norm(mlp(x)) (OLMo 2, arXiv:2501.00656); "sandwich":
    x + norm(attention(norm(x))), x + norm(mlp(norm(x))) (Gemma 2, arXiv:2408.00118). The residual stream itself is never normed.
    """

    config: ModelConfig
    compute: Compute
    train: bool

    @nn.compact
    def __call__(self, x_BTD, layer_cache, positions_BT, segments_BT, rotation):
        c = self.config
        zero = c.output_init == "zero"
        output_init = nn.initializers.zeros if zero else normal(c.init_std / (2 * c.n_layers) ** 0.5)
        y_BTD, layer_cache = Attention(c, self.compute, output_init, name="attention")(
            self._norm("attention_norm", x_BTD, "pre"), positions_BT, segments_BT, rotation, layer_cache, self.train
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


class GPT(nn.Module):
    """Decoder-only transformer. Needs a mesh in force: `with jax.set_mesh(make_mesh()):`."""

    config: ModelConfig
    compute: Compute

    @nn.compact
    def __call__(self, tokens_BT, positions_BT, segments_BT, cache: Cache | None = None, train: bool = False):
        """Embeds and transforms token ids.

        tokens_BT, positions_BT, segments_BT: int32; positions count within each segment, segment 0 is padding.
        cache: None, or what `empty_cache` or the last call returned; then segments only tell tokens from padding.
        train: applies dropout, with the rng stream "dropout".
        Returns (hidden_BTD float32 after the final norm, the cache with these tokens in it, auxiliary losses by name).
        """
        c = self.config
        table_VD = param(self, "embedding", normal(c.init_std), (c.vocab_size, c.d_model), ("vocab", "embed"))
        x_BTD = jnp.take(table_VD, tokens_BT, axis=0)
        if c.embed_scale:
            x_BTD *= c.d_model**0.5
        if c.positions == "learned":
            shape = (c.context_length, c.d_model)
            x_BTD += jnp.take(param(self, "positions", normal(c.init_std), shape, ("position", "embed")), positions_BT, axis=0)
        x_BTD = constrain(nn.Dropout(c.dropout, deterministic=not train)(x_BTD), "batch", "seq", "embed")

        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
        stack = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},  # the latter for capture_intermediates=True
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.n_layers,
            unroll=c.scan_unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.compute, train, name="layers")
        layer_caches = None if cache is None else (cache.k_LBSKH, cache.v_LBSKH)
        rotations = rotation(positions_BT, c.rotary_width, c.rope_theta, _rope_scaling(c)) if c.positions == "rope" else None
        x_BTD, layer_caches = stack(x_BTD, layer_caches, positions_BT, segments_BT, rotations)
        if not c.tied:  # declared here, used by unembed()
            param(self, "unembedding", normal(c.init_std), (c.d_model, c.vocab_size), ("embed", "vocab"))
        hidden_BTD = make_norm(c, "final_norm")(x_BTD)
        return hidden_BTD, None if cache is None else Cache(*layer_caches), {}


def _rope_scaling(c: ModelConfig) -> RopeScaling | None:
    if c.rope_scaling == "none":
        return None
    return RopeScaling(c.rope_scaling, c.rope_factor, c.rope_original_context, *c.rope_turns)


def unembedding(params) -> jax.Array:
    """The head's matrix [D, V]: its own, or the embedding table transposed where they are tied."""
    return params["unembedding"] if "unembedding" in params else params["embedding"].T


def unembed(params, hidden_BTD: jax.Array, compute: Compute) -> jax.Array:
    """Logits [B, T, V], float32."""
    return product("BTD,DV->BTV", hidden_BTD, unembedding(params), compute)


def init(model: GPT, key: jax.Array) -> dict:
    """Random parameters. Jit it with the shardings of `logical_axes` to have them born in their shards."""
    return nn.unbox(_boxed(model, key))


def logical_axes(model: GPT) -> dict:
    """For every parameter the tuple of its axes' logical names: ("layers", "embed", "mlp"), ..."""
    boxed = jax.eval_shape(functools.partial(_boxed, model), jax.random.key(0))
    return jax.tree.map(tuple, nn.get_partition_spec(boxed), is_leaf=lambda s: isinstance(s, jax.P))


def _boxed(model, key):
    one = jnp.ones((1, 1), jnp.int32)
    return model.init(key, one, one * 0, one)["params"]
