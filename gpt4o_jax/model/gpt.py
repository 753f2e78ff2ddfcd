"""The decoder-only transformer: token embedding, a scanned stack of blocks, a final norm; and the output head.

B batch, T positions, D model width, V vocabulary, L layers

    hidden_BTD, cache, aux = model.apply({"params": params}, tokens_BT, positions_BT, segments_BT, cache)
    logits_BTV = unembed(model, params, hidden_BTD)

Parameters are a plain nested dict of float32 arrays; those of the layers are stacked along a leading axis (model/block.py).
`logical_axes(model)` returns a tree of the same structure with the logical name of every axis.
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
    """Decoder-only transformer. Must be called with a mesh set: `with jax.set_mesh(make_mesh()):`."""

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
        """Token ids to final hidden states.

        tokens_BT, positions_BT, segments_BT: int32 [B, T]. Positions count from 0 within each segment; segment 0 is padding.
        cache: KV cache from `empty_cache` or from the previous call, or None. With a cache, segments only mark padding (0).
        train: apply dropout, with the rng stream "dropout".
        ahead: also run the multi-token prediction heads.
        in_order: False returns rows in the token order of parallel.context.zigzag, which saves the communication to undo it.

        Returns (hidden_BTD, cache, aux). hidden_BTD: float32, after the final norm and muP's output multiplier: the input of
        `unembed`. cache: with these tokens added, or None. aux: dict that may hold "ahead_nBTD", the same for each multi-token
        prediction head, always in zigzag order, and "routings", one moe.Routing per mixture of experts, nested like the
        parameters.
        """
        c = self.config
        if cache is None:  # context parallelism: reorder each row, so that causal attention loads all devices evenly
            tokens_BT, positions_BT, segments_BT = map(context.zigzag, (tokens_BT, positions_BT, segments_BT))
        table_VD = param(self, "embedding", normal(c.init_std), (c.vocab_size, c.d_model), ("vocab", "embed"))
        x_BTD = lookup(table_VD, tokens_BT, ("vocab", "embed"))
        if c.embed_scale:
            x_BTD *= (c.d_model * c.width_ratio) ** 0.5  # muP: the base model's multiplier
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
        if c.mup_base_width:  # muP's logit multiplier, applied here so that every use of the hidden states includes it
            hidden_BTD *= c.width_ratio
        if cache is None and in_order:
            hidden_BTD = context.in_order(hidden_BTD)
        return hidden_BTD, cache, aux

    def _value_embeddings(self, tokens_BT):
        """Value embeddings [n, B, T, K, H], or None without tables. Initialised at the scale of attention values."""
        c = self.config
        if not c.value_embeddings:
            return None
        init, axes = normal(c.hidden_std * c.d_model**0.5), ("vocab", "kv_heads", "head_dim")
        shape = (c.vocab_size, c.kv_heads, c.head_width)
        tables = [param(self, f"value_embedding_{i}", init, shape, axes) for i in range(c.value_embeddings)]
        values_nBTKH = jnp.stack([lookup(table_VKH, tokens_BT, axes) for table_VKH in tables])
        return constrain(values_nBTKH, None, "batch", "seq", "kv_heads", "head_dim")


def _rotations(c: ModelConfig, positions_BT, below: int | None) -> tuple[Rotation | None, Rotation | None]:
    """RoPE tables (of all layers, of local layers if theirs differ). below: exclusive upper bound of positions, if known."""
    if c.positions != "rope":
        return None, None
    scaling = None
    if c.rope_scaling != "none":
        scaling = RopeScaling(c.rope_scaling, c.rope_factor, c.rope_original_context, *c.rope_turns)
    local = None if c.rope_local_theta is None else rotation(positions_BT, c.rotary_width, c.rope_local_theta, below=below)
    return rotation(positions_BT, c.rotary_width, c.rope_theta, scaling, below), local


def unembed(model: GPT, params, hidden_BTD: jax.Array) -> jax.Array:
    """hidden_BTD, as the model returns it, to logits [B, T, V], float32, after the soft-cap."""
    return capped_logits(hidden_BTD, unembedding(params), model.compute, model.config.logit_softcap)


def init(model: GPT, key: jax.Array) -> dict:
    """Random parameters, a nested dict of float32 arrays. Jit with out_shardings to create them already sharded."""
    return nn.unbox(_boxed(model, key))


def shapes(model: GPT) -> dict:
    """The jax.ShapeDtypeStruct of every parameter that `init` returns, without computing anything."""
    return jax.eval_shape(lambda key: init(model, key), jax.random.key(0))


def logical_axes(model: GPT) -> dict:
    """For every parameter, the tuple of its axes' logical names, such as ("layers", "embed", "mlp") (parallel/rules.py)."""
    boxed = jax.eval_shape(lambda: _boxed(model, jax.random.key(0)))
    return jax.tree.map(tuple, nn.get_partition_spec(boxed), is_leaf=lambda s: isinstance(s, jax.P))


def _boxed(model, key):
    one = jnp.ones((1, 1), jnp.int32)
    return model.init(key, one, one * 0, one)["params"]
