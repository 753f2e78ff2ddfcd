"""Multi-head self-attention as a Linen module.

B batch, T positions, X keys from the cache, D model width, N query heads, K key/value heads, H head width
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt4o_jax.config import ModelConfig
from gpt4o_jax.model import cache as kv
from gpt4o_jax.model.layers import constant, normal, param, rms_normalise, scale
from gpt4o_jax.ops import attention as ops
from gpt4o_jax.ops import keep
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.masks import causal_mask
from gpt4o_jax.ops.positions import rotary
from gpt4o_jax.ops.products import joint_product, product
from gpt4o_jax.ops.sums import add_bias, multiply_scale
from gpt4o_jax.parallel import constrain, context, even, per_shard


def implementation(c: ModelConfig, compute: Compute, T: int, dropout: bool, context: int = 1) -> str:
    """Name of the attention implementation (ops/attention.py) for rows of T tokens, split over `context` devices.

    Raises RunError if the one named in the config, or with "auto" every one, does not support this case.
    """
    knobs = dict(softcap=c.attention_softcap > 0, sinks=c.attention_sinks, dropout=dropout, context=context)
    return ops.choose(c.attention, compute, T, c.head_width, **knobs)


class Attention(nn.Module):
    """Causal self-attention within segments; with a cache, over all earlier tokens of the row."""

    config: ModelConfig
    compute: Compute
    output_init: nn.initializers.Initializer
    window: int | None = None  # see LayerKind

    @nn.compact
    def __call__(self, x_BTD, positions_BT, segments_BT, rotation, layer_cache, train: bool, value_embedding_BTKH=None):
        """x_BTD, the normalised input -> (y_BTD, layer_cache).

        rotation: RoPE cosines and sines, or None. layer_cache: this layer's cache.Slots, or None. value_embedding_BTKH: mixed
        into the values with two learned coefficients, or None.
        """
        c = self.config
        D, N, K, H = c.d_model, c.n_heads, c.kv_heads, c.head_width
        init = normal(c.hidden_std)
        q_DNH = param(self, "query", init, (D, N, H), ("embed", "heads", "head_dim"))
        k_DKH = param(self, "key", init, (D, K, H), ("embed", "kv_heads", "head_dim"))
        v_DKH = param(self, "value", init, (D, K, H), ("embed", "kv_heads", "head_dim"))
        o_NHD = param(self, "output", self.output_init, (N, H, D), ("heads", "head_dim", "embed"))

        q_BTNH, k_BTKH, v_BTKH = joint_product(
            ["BTD,DNH->BTNH", "BTD,DKH->BTKH", "BTD,DKH->BTKH"], x_BTD, [q_DNH, k_DKH, v_DKH], self.compute
        )
        q_BTNH, k_BTKH, v_BTKH = (checkpoint_name(x, keep.QKV) for x in (q_BTNH, k_BTKH, v_BTKH))
        if c.biased_qkv:
            zeros = nn.initializers.zeros
            biased = lambda x, name, *axes: add_bias(x, param(self, name, zeros, x.shape[2:], axes))
            q_BTNH = biased(q_BTNH, "query_bias", "heads", "head_dim")
            k_BTKH = biased(k_BTKH, "key_bias", "kv_heads", "head_dim")
            v_BTKH = biased(v_BTKH, "value_bias", "kv_heads", "head_dim")
        if value_embedding_BTKH is not None:
            a, b = param(self, "value_mix", constant(0.5, 0.5), (2,), ("mix",))
            v_BTKH = a * v_BTKH + b * value_embedding_BTKH
        if c.qk_norm:
            q_BTNH = self._normalise("query_scale", q_BTNH, "heads")
            k_BTKH = self._normalise("key_scale", k_BTKH, "kv_heads")
        if rotation is not None:
            q_BTNH, k_BTKH = rotary(q_BTNH, rotation), rotary(k_BTKH, rotation)
        q_BTNH = constrain(q_BTNH, "batch", "seq", "heads", "head_dim")
        k_BTKH = constrain(k_BTKH, "batch", "seq", "kv_heads", "head_dim")
        v_BTKH = constrain(v_BTKH, "batch", "seq", "kv_heads", "head_dim")

        sinks_N = param(self, "sinks", nn.initializers.zeros, (N,), ("heads",)) if c.attention_sinks else None
        drop = nn.Dropout(c.dropout, deterministic=not train)
        dropout = drop if c.dropout and train else None
        if layer_cache is None:
            z_BTNH = self._self_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N, dropout)
        else:
            layer_cache, keys, values, held_BX = kv.extend(
                layer_cache, k_BTKH, v_BTKH, positions_BT, segments_BT > 0, self.window
            )
            there_BX = (held_BX >= 0).astype(jnp.int32)
            mask_BTX = causal_mask(positions_BT, held_BX, jnp.ones_like(positions_BT), there_BX, self.window)
            z_BTNH = ops.attention(
                q_BTNH, keys, values, mask_BTX, self.compute, c.score_scale, c.attention_softcap or None, sinks_N
            )
        y_BTD = product("BTNH,NHD->BTD", z_BTNH, o_NHD, self.compute)
        if c.bias:
            y_BTD = add_bias(y_BTD, param(self, "output_bias", nn.initializers.zeros, (D,), ("embed",)))
        return drop(y_BTD), layer_cache

    def _self_attention(self, q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N, dropout):
        """Attention without a cache, [B, T, N, H]. With context parallelism, rows are in parallel.context.zigzag order."""
        c = self.config
        T = q_BTNH.shape[1]
        segments_BT = segments_BT if self.compute.packed else None
        ways = context.parts(T)
        # Initialisation traces a single token, which not every implementation supports.
        name = "reference" if self.is_initializing() else implementation(c, self.compute, T, dropout is not None, ways)
        knobs = dict(scale=c.score_scale, window=self.window, softcap=c.attention_softcap or None)
        B, _, N, _ = even(q_BTNH, "batch", None, "heads", None)
        if name == "reference" or (ways == 1 and not (B and N)):
            reference = functools.partial(ops.self_attention, "reference", self.compute, **knobs, dropout=dropout)
            return reference(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N)
        seq, op = ("seq", context.context_attention) if ways > 1 else (None, ops.self_attention)
        heads, kv_heads = (B, seq, "heads", None), (B, seq, "kv_heads", None)
        op = functools.partial(op, name, self.compute, **knobs)
        kernel = per_shard(op, [heads, kv_heads, kv_heads, (B, seq), ("heads",)], heads)
        return kernel(q_BTNH, k_BTKH, v_BTKH, segments_BT, sinks_N)

    def _normalise(self, name: str, x_BTNH, heads: str):
        """QK-norm: per head with one shared scale (Qwen 3, arXiv:2505.09388), or over all heads (OLMo 2, arXiv:2501.00656)."""
        c = self.config
        if c.qk_norm_over == "head":
            return multiply_scale(
                rms_normalise(x_BTNH, c.norm_eps), scale(self, name, x_BTNH.shape[3:], ("head_dim",), c.norm_unit_offset)
            )
        learned_NH = scale(self, name, x_BTNH.shape[2:], (heads, "head_dim"), c.norm_unit_offset)
        return multiply_scale(rms_normalise(x_BTNH, c.norm_eps, (-2, -1)), learned_NH)
