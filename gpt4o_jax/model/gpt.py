"""The decoder: token embedding, a stack of blocks in one scanned tree, a final norm; and the head.

B batch, T positions, D model width, V vocabulary, L layers

    hidden_BTD, cache, aux = model.apply({"params": params}, tokens_BT, positions_BT, segments_BT, cache)
    logits_BTV = unembed(model, params, hidden_BTD)

Parameters are a plain nested dict of float32 arrays; those of the layers carry a leading
axis (model/block.py). `logical_axes(model)` is the tree of the same shape that names every axis.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt4o_jax.config import ModelConfig
from gpt4o_jax.model.ahead import look_ahead
from gpt4o_jax.model.block import Shared, between_blocks, layers, make_norm
from gpt4o_jax.model.cache import Cache
from gpt4o_jax.model.layers import normal, param
from gpt4o_jax.model.stages import staged_layers
from gpt4o_jax.model.vocabulary import lookup, unembedding
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.cross_entropy import capped_logits
from gpt4o_jax.ops.positions import RopeScaling, Rotation, rotation
from gpt4o_jax.parallel import constrain, context
from gpt4o_jax.parallel.pipeline import schedule


class GPT(nn.Module):
    """Decoder-only transformer. Needs a mesh in force: `with jax.set_mesh(make_mesh()):`."""

    config: ModelConfig
    compute: Compute
    pipeline: tuple[int, int] = (1, 0)  # with stages: mesh.pipeline_repeats, mesh.pipeline_microbatches

    @nn.compact
    def __call__(
        self,
        tokens_BT,
        positions_BT,
        segments_BT,
        cache: Cache | None = None,
        train: bool = False,
        ahead: bool = False,
        in_order: bool = True,
    ):
        """Embeds and transforms token ids.

        tokens_BT, positions_BT, segments_BT: int32; positions count within each segment, segment 0 is padding.
        cache: None, or what `empty_cache` or the last call returned; then segments only tell tokens from padding.
        train: applies dropout, with the rng stream "dropout". ahead: runs the heads of multi-token prediction too. in_order:
        False leaves what is returned of a row as parallel.context.zigzag has it, which saves sending it back.
        Returns (hidden_BTD float32, what the head reads: after the final norm, under muP times base width / width; cache with
        these tokens in it; what else there is, by name: "ahead_nBTD", what the head reads for later targets, always as zigzag
        has it; "routings", a moe.Routing for every mixture of experts, named as its parameters are).
        """
        c = self.config
        if cache is None:  # where each row is cut over several devices, attention wants its parts in another order
            tokens_BT, positions_BT, segments_BT = map(context.zigzag, (tokens_BT, positions_BT, segments_BT))
        table_VD = param(self, "embedding", normal(c.init_std), (c.vocab_size, c.d_model), ("vocab", "embed"))
        x_BTD = lookup(table_VD, tokens_BT, ("vocab", "embed"))
        if c.embed_scale:
            x_BTD *= (c.d_model * c.width_ratio) ** 0.5  # under muP as in the base model
        embedded_BTD = x_BTD
        if c.positions == "learned":
            axes = ("position", "embed")
            table_PD = param(self, "positions", normal(c.init_std), (c.context_length, c.d_model), axes)
            x_BTD += lookup(table_PD, positions_BT, axes)
        x_BTD = between_blocks(nn.Dropout(c.dropout, deterministic=not train)(x_BTD))

        first_BTD = x_BTD if c.residual_mix else None
        rotations = _rotations(c, positions_BT, tokens_BT.shape[1] if cache is None else None)
        shared = Shared(positions_BT, segments_BT, *rotations, first_BTD, self._value_embeddings(tokens_BT))
        order = schedule(len(x_BTD), *self.pipeline)
        if order.stages > 1 and cache is None and not self.is_initializing():
            key = self.make_rng("dropout") if train and c.dropout else None
            x_BTD, routings = staged_layers(c, self.compute, order, self.variables["params"]["layers"], x_BTD, shared, key)
        else:
            x_BTD, cache, routings = layers(c, self.compute, train, x_BTD, cache, shared)
        aux = {"routings": routings} if routings else {}
        if c.mtp_heads and (ahead or self.is_initializing()):
            later_nBTD, routings = look_ahead(c, self.compute, train, x_BTD, embedded_BTD, shared)
            if routings:
                aux["routings"]["ahead"] = routings
            aux["ahead_nBTD"] = later_nBTD * c.width_ratio if c.mup_base_width else later_nBTD
        if not c.tied:  # declared here, used by unembed()
            param(self, "unembedding", normal(c.init_std), (c.d_model, c.vocab_size), ("embed", "vocab"))
        hidden_BTD = make_norm(c, "final_norm")(x_BTD)
        if c.mup_base_width:  # muP's multiplier of the logits, here so that whoever reads them finds it applied
            hidden_BTD *= c.width_ratio
        if cache is None and in_order:
            hidden_BTD = context.in_order(hidden_BTD)
        return hidden_BTD, cache, aux

    def _value_embeddings(self, tokens_BT):
        """[n, B, T, K, H], or None without tables; at the start of the size of the values that they are mixed with."""
        c = self.config
        if not c.value_embeddings:
            return None
        init, axes = normal(c.hidden_std * c.d_model**0.5), ("vocab", "kv_heads", "head_dim")
        shape = (c.vocab_size, c.kv_heads, c.head_width)
        tables = [param(self, f"value_embedding_{i}", init, shape, axes) for i in range(c.value_embeddings)]
        values_nBTKH = jnp.stack([lookup(table_VKH, tokens_BT, axes) for table_VKH in tables])
        return constrain(values_nBTKH, None, "batch", "seq", "kv_heads", "head_dim")


def _rotations(c: ModelConfig, positions_BT, below: int | None) -> tuple[Rotation | None, Rotation | None]:
    """(of all layers, of local layers where theirs is another). below: what no position in whole rows reaches, their length."""
    if c.positions != "rope":
        return None, None
    scaling = None
    if c.rope_scaling != "none":
        scaling = RopeScaling(c.rope_scaling, c.rope_factor, c.rope_original_context, *c.rope_turns)
    local = None if c.rope_local_theta is None else rotation(positions_BT, c.rotary_width, c.rope_local_theta, below=below)
    return rotation(positions_BT, c.rotary_width, c.rope_theta, scaling, below), local


def unembed(model: GPT, params, hidden_BTD: jax.Array) -> jax.Array:
    """Logits [B, T, V], float32."""
    return capped_logits(hidden_BTD, unembedding(params), model.compute, model.config.logit_softcap)


def init(model: GPT, key: jax.Array) -> dict:
    """Random parameters. Jit it with the shardings of `logical_axes` to have them born in their shards."""
    return nn.unbox(_boxed(model, key))


def shapes(model: GPT) -> dict:
    """What `init` gives, as shapes: nothing is computed."""
    return jax.eval_shape(lambda key: init(model, key), jax.random.key(0))


def logical_axes(model: GPT) -> dict:
    """For every parameter the tuple of its axes' logical names: ("layers", "embed", "mlp"), ..."""
    boxed = jax.eval_shape(lambda: _boxed(model, jax.random.key(0)))
    return jax.tree.map(tuple, nn.get_partition_spec(boxed), is_leaf=lambda s: isinstance(s, jax.P))


def _boxed(model, key):
    one = jnp.ones((1, 1), jnp.int32)
    return model.init(key, one, one * 0, one)["params"]
