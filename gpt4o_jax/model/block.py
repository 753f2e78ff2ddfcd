"""A transformer block, and the stack of blocks as a scan over periods of the layer pattern.

A period is the shortest sequence of layers that repeats over the depth: for alternating local and global attention it has
two layers, for a uniform model one.

B batch, T positions, D model width, K key/value heads, H head width, L layers, n value embedding tables
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt4o_jax.config_model import LayerKind, ModelConfig
from gpt4o_jax.model.attention import Attention
from gpt4o_jax.model.layers import Norm, constant, normal, param
from gpt4o_jax.model.mlp import MLP
from gpt4o_jax.model.moe import Experts
from gpt4o_jax.ops import keep
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.positions import Rotation
from gpt4o_jax.ops.weights import Weight
from gpt4o_jax.parallel import constrain, even


class Shared(NamedTuple):
    """Inputs that are the same for every layer."""

    positions_BT: jax.Array
    segments_BT: jax.Array
    rotation: Rotation | None
    local_rotation: Rotation | None = None  # RoPE tables of local layers, if they differ
    first_BTD: jax.Array | None = None  # input of the first layer, for residual_mix
    values_nBTKH: jax.Array | None = None  # value embeddings


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). With the signature of nn.scan: the carry is x, the output (cache, routings).

    The feed-forward may be a mixture of experts (model/moe.py); routings is then {"moe": Routing}, else {}.

    norm_position "post": x + norm(attention(x)), x + norm(mlp(x)) (OLMo 2, arXiv:2501.00656); "sandwich":
    x + norm(attention(norm(x))), x + norm(mlp(norm(x))) (Gemma 2, arXiv:2408.00118). The residual stream itself is never
    normalised.

    residual_mix: the block first replaces x by a * x + b * x_0, where x_0 is the input of the first layer and (a, b) are
    learned, initially (1, 0). value_embeddings: attention replaces v by a * v + b * (value embedding of the token), (a, b)
    learned, initially (1/2, 1/2); layers without a table add nothing. Both as in modded-nanogpt
    (github.com/KellerJordan/modded-nanogpt).
    """

    config: ModelConfig
    compute: Compute
    train: bool
    kind: LayerKind

    @nn.compact
    def __call__(self, x_BTD, per_layer, shared: Shared):
        """x_BTD -> (x_BTD, (cache, routings)).

        per_layer: (this layer's cache.Slots or None, index of its value embedding table: -1 for none; None without tables).
        """
        c = self.config
        layer_cache, table = per_layer
        x_BTD = checkpoint_name(x_BTD, keep.BLOCK_INPUT)
        if shared.first_BTD is not None:
            a, b = param(self, "residual_mix", constant(1.0, 0.0), (2,), ("mix",))
            x_BTD = a * x_BTD + b * shared.first_BTD
        value_embedding_BTKH = None
        if shared.values_nBTKH is not None:
            value_embedding_BTKH = jnp.where(table < 0, 0.0, shared.values_nBTKH[table])
        zero = c.output_init == "zero"
        output_init = nn.initializers.zeros if zero else normal(c.hidden_std / (2 * c.n_layers) ** 0.5)
        rotation = (self.kind.local and shared.local_rotation) or shared.rotation
        inputs = (shared.positions_BT, shared.segments_BT, rotation, layer_cache, self.train, value_embedding_BTKH)
        attention = Attention(c, self.compute, output_init, self.kind.window, name="attention")
        y_BTD, layer_cache = attention(inside_block(self._norm("attention_norm", x_BTD, "pre")), *inputs)
        x_BTD = between_blocks(x_BTD + self._norm("attention_post_norm", between_blocks(y_BTD), "post"))
        inner_BTD, routings = inside_block(self._norm("mlp_norm", x_BTD, "pre")), {}
        if self.kind.experts:
            experts = Experts(c, self.compute, output_init, name="moe")
            y_BTD, routings["moe"] = experts(inner_BTD, shared.segments_BT, self.train)
        else:
            y_BTD = MLP(c, self.compute, output_init, name="mlp")(inner_BTD, self.train)
        x_BTD = between_blocks(x_BTD + self._norm("mlp_post_norm", between_blocks(y_BTD), "post"))
        return x_BTD, (layer_cache, routings)

    def _norm(self, name: str, x_BTD, position: str):
        """Normalises the input ("pre") or output ("post") of a sub-layer if norm_position asks for it; else the identity."""
        if self.config.norm_position not in (position, "sandwich"):
            return x_BTD
        return make_norm(self.config, name)(x_BTD)


def between_blocks(x_BTD):
    """Constrains x_BTD to the sharding of the residual stream: T is also split over the mesh axis "tensor".

    Norms and residual additions are then sharded too (sequence parallelism, arXiv:2205.05198).
    """
    B, T, D = even(x_BTD, "batch", "residual", "embed")
    return constrain(x_BTD, B, T or "seq", D)


def inside_block(x_BTD):
    """Constrains x_BTD to the sharding of a matrix product's input: T is not split over the mesh axis "tensor"."""
    return constrain(x_BTD, "batch", "seq", "embed")


def make_norm(c: ModelConfig, name: str) -> Norm:
    """The norm described by the config."""
    return Norm(c.norm, c.norm_eps, c.bias, c.norm_unit_offset, name=name)


# Which activations of a block are saved for the backward pass, from most to least. The names are in ops/keep.py.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "save_mlp": jax.checkpoint_policies.save_only_these_names(keep.MLP_HIDDEN),
    "save_attention": jax.checkpoint_policies.save_only_these_names(keep.QKV, keep.ATTENTION),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[keep.BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def remat_block(c: ModelConfig, looped: bool):
    """The Block class, wrapped in nn.remat according to config.remat. looped: applied in a loop of several iterations."""
    if c.remat == "none":
        return Block
    # Inside a loop over layers, XLA cannot merge the recomputation with the forward pass. Unrolled, or in a loop of one
    # iteration, which XLA dissolves, common-subexpression elimination would merge the two and save nothing.
    return nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=not looped)


def looped(c: ModelConfig, periods: int) -> bool:
    """Whether the scan over `periods` is a loop of several iterations."""
    return c.scan_unroll < periods


def unroll(c: ModelConfig, compute: Compute, periods: int) -> int:
    """The unroll factor of the scan over `periods`. 1 with remat on CPUs: outside a loop, XLA:CPU recomputes all layers before
    it needs the first, which saves no memory.
    """
    return 1 if c.remat != "none" and compute.platform == "cpu" else min(c.scan_unroll, periods)


class Period(nn.Module):
    """A sequence of blocks of the given kinds, named block_0, block_1, ..."""

    config: ModelConfig
    compute: Compute
    train: bool
    kinds: tuple[LayerKind, ...]
    looped: bool  # as for remat_block

    @nn.compact
    def __call__(self, x_BTD, per_layer, shared: Shared):
        """x_BTD -> (x_BTD, (caches, routings)). per_layer: as for Block, a tuple or array over the layers of the period."""
        caches, tables = per_layer
        out, routings = (), {}
        for i, kind in enumerate(self.kinds):
            name = f"block_{i}"
            block = remat_block(self.config, self.looped)(self.config, self.compute, self.train, kind, name=name)
            x_BTD, (layer_cache, routing) = block(x_BTD, (caches[i], None if tables is None else tables[i]), shared)
            out += (layer_cache,)
            routings |= {name: routing} if routing else {}
        return x_BTD, (out, routings)


def value_tables(c: ModelConfig) -> jax.Array:
    """Index of each layer's value embedding table: 0, 1, ... in the first n layers, again in the last n, else -1. int32 [L]."""
    n, between = c.value_embeddings, c.n_layers - 2 * c.value_embeddings
    return jnp.array([*range(n), *[-1] * between, *range(n)], jnp.int32)


def layers(c: ModelConfig, compute: Compute, train: bool, x_BTD, cache, shared: Shared):
    """Applies all layers; call it inside a compact module. cache: from `empty_cache`, or None. Returns (x_BTD, cache, routings).

    Parameters are stacked along a leading axis of periods:
        period of one layer:   layers/attention/query [L, ...]
        period of P layers:    layers/block_0/attention/query [L // P, ...]; layer l is entry l // P of block_(l % P)
        the last L % P layers: last_layers/block_0/attention/query [1, ...], a shorter period of their own
    routings has the same structure, for layers with experts: {"layers": {"moe": Routing}}.
    """
    tables_L = None if shared.values_nBTKH is None else value_tables(c)
    P = len(c.period)
    if P == 1:
        again = remat_block(c, looped(c, c.n_layers))
        block = _scanned(again, c.n_layers, unroll(c, compute, c.n_layers))(c, compute, train, c.period[0], name="layers")
        x_BTD, (slots, routings) = block(x_BTD, (None if cache is None else cache[0], tables_L), shared)
        return x_BTD, None if cache is None else (slots,), {"layers": routings} if routings else {}
    out, routings, whole = (), {}, c.periods * P
    for name, begin, end, repeats in (("layers", 0, whole, c.periods), ("last_layers", whole, c.n_layers, 1)):
        if begin == end:
            continue
        kinds = c.layer_kinds[begin:end][:P]
        slots = (None,) * len(kinds) if cache is None else cache[len(out) : len(out) + len(kinds)]
        tables = None if tables_L is None else tables_L[begin:end].reshape(repeats, -1)
        how = (c, compute, train, kinds, looped(c, repeats))
        if cache is not None and repeats == 1:  # a scan would copy the cache
            whole_weight = lambda leaf: isinstance(leaf, Weight)  # keeps its layers axis: indexing would copy it
            first = lambda tree: jax.tree.map(lambda x: x if whole_weight(x) else x[0], tree, is_leaf=whole_weight)
            period = nn.map_variables(Period, "params", trans_in_fn=first)(*how, name=name)
            x_BTD, new = period(x_BTD, first((slots, tables)), shared)
            slots, routing = jax.tree.map(lambda leaf: leaf[None], new)
        else:
            period = _scanned(Period, repeats, unroll(c, compute, repeats))(*how, name=name)
            x_BTD, (slots, routing) = period(x_BTD, (slots, tables), shared)
        out += slots
        routings |= {name: routing} if routing else {}
    return x_BTD, None if cache is None else out, routings


def _scanned(module, length: int, unroll: int):
    """nn.scan of a Block or Period over its stacked parameters."""
    return nn.scan(
        module,
        variable_axes={"params": 0, "intermediates": 0},  # the latter for capture_intermediates=True
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=length,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
