"""One block of the decoder, and the stack of them: a scan over the periods of the layer pattern.

B batch, T positions, D model width, L layers
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
    """What every layer reads."""

    positions_BT: jax.Array
    segments_BT: jax.Array
    rotation: Rotation | None
    local_rotation: Rotation | None = None  # of local layers, where theirs is another
    first_BTD: jax.Array | None = None  # what entered the first layer, for residual_mix
    values_nBTKH: jax.Array | None = None  # value embeddings


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Shaped for nn.scan: carry in, carry out with (cache, routings).

    The feed-forward may be a mixture of experts (model/moe.py), of which routings then tells the load: {"moe": Routing}.

    norm_position "post": x + norm(attention(x)), x + norm(mlp(x)) (OLMo 2, arXiv:2501.00656); "sandwich":
    x + norm(attention(norm(x))), x + norm(mlp(norm(x))) (Gemma 2, arXiv:2408.00118). The residual stream itself is never normed.

    residual_mix: before all that x becomes a * x + b * x_0, x_0 what entered the first layer, (a, b) learned from (1, 0).
    value_embeddings: in attention v becomes a * v + b * embedding of the token, (a, b) learned from (1/2, 1/2); in
    layers without a table there is nothing to add. Both as in Jordan's modded-nanogpt (github.com/KellerJordan).
    """

    config: ModelConfig
    compute: Compute
    train: bool
    kind: LayerKind

    @nn.compact
    def __call__(self, x_BTD, per_layer, shared: Shared):
        """per_layer: (the layer's Slots in the cache or None, number of its value embedding, -1 for none, or None)."""
        c = self.config
        layer_cache, table = per_layer
        x_BTD = checkpoint_name(x_BTD, keep.BLOCK_INPUT)
        if shared.first_BTD is not None:
            a, b = param(self, "residual_mix", constant(1.0, 0.0), (2,), ("mix",))
            x_BTD = a * x_BTD + b * shared.first_BTD
        more_BTKH = None
        if shared.values_nBTKH is not None:
            more_BTKH = jnp.where(table < 0, 0.0, shared.values_nBTKH[table])
        zero = c.output_init == "zero"
        output_init = nn.initializers.zeros if zero else normal(c.hidden_std / (2 * c.n_layers) ** 0.5)
        rotation = (self.kind.local and shared.local_rotation) or shared.rotation
        inputs = (shared.positions_BT, shared.segments_BT, rotation, layer_cache, self.train, more_BTKH)
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
        """A norm on the input ("pre") or the output ("post") of a sub-layer, where norm_position wants one there."""
        if self.config.norm_position not in (position, "sandwich"):
            return x_BTD
        return make_norm(self.config, name)(x_BTD)


def between_blocks(x_BTD):
    """Sharded as the residual stream is: along T over "tensor" too, which no head or hidden width takes there.

    Norms and sums then work on a part each (sequence parallelism, arXiv:2205.05198).
    """
    B, T, D = even(x_BTD, "batch", "residual", "embed")
    return constrain(x_BTD, B, T or "seq", D)


def inside_block(x_BTD):
    """Sharded as what enters a product is: with all tokens that a group over "tensor" works on."""
    return constrain(x_BTD, "batch", "seq", "embed")


def make_norm(c: ModelConfig, name: str) -> Norm:
    return Norm(c.norm, c.norm_eps, c.bias, c.norm_unit_offset, name=name)


# What is kept of a block for its backward pass, from the most to the least. Names are given by ops/keep.py.
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


def remat_block(c: ModelConfig):
    """Block, recomputed in the backward pass as the config wants it."""
    if c.remat == "none":
        return Block
    # A loop over layers keeps the two passes apart. Without one XLA finds the same computation twice, and keeps the first.
    return nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=c.scan_unroll >= c.periods)


def unroll(c: ModelConfig, compute: Compute, periods: int) -> int:
    """Periods in an iteration of the scan over so many. One where layers are recomputed on a CPU: of those outside of a loop XLA
    recomputes all before it needs the first, and no memory is saved."""
    return 1 if c.remat != "none" and compute.platform == "cpu" else min(c.scan_unroll, periods)


class Period(nn.Module):
    """Layers of these kinds, one after another: block_0, block_1, ..."""

    config: ModelConfig
    compute: Compute
    train: bool
    kinds: tuple[LayerKind, ...]

    @nn.compact
    def __call__(self, x_BTD, per_layer, shared: Shared):
        """per_layer: (each layer's Slots or None, numbers of their value embeddings or None)."""
        caches, tables = per_layer
        out, routings = (), {}
        for i, kind in enumerate(self.kinds):
            name = f"block_{i}"
            block = remat_block(self.config)(self.config, self.compute, self.train, kind, name=name)
            x_BTD, (layer_cache, routing) = block(x_BTD, (caches[i], None if tables is None else tables[i]), shared)
            out += (layer_cache,)
            routings |= {name: routing} if routing else {}
        return x_BTD, (out, routings)


def value_tables(c: ModelConfig) -> jax.Array:
    """For each layer the number of its value embedding: 0, 1, .. in the first n, again in the last n, -1 in between. [L]."""
    n, between = c.value_embeddings, c.n_layers - 2 * c.value_embeddings
    return jnp.array([*range(n), *[-1] * between, *range(n)], jnp.int32)


def layers(c: ModelConfig, compute: Compute, train: bool, x_BTD, cache, shared: Shared):
    """All layers, inside a compact module; cache: as empty_cache makes it, or None. Returns (x_BTD, cache, routings).

    Their parameters are one tree with a leading axis of periods. A pattern of one kind has no inner names:
    layers/attention/query [L, ...]. One of P kinds has a block for each of its places, and layer l is entry
    l // P of block_(l % P): layers/block_0/attention/query [L // P, ...]. The L % P layers after the last whole
    period are a shorter period of their own: last_layers/block_0/attention/query [1, ...]. routings are a tree of the
    same names, where there are experts: {"layers": {"moe": Routing}}.
    """
    tables_L = None if shared.values_nBTKH is None else value_tables(c)
    P = len(c.period)
    if P == 1:
        block = _scanned(remat_block(c), c.n_layers, unroll(c, compute, c.n_layers))(
            c, compute, train, c.period[0], name="layers"
        )
        x_BTD, (slots, routings) = block(x_BTD, (None if cache is None else cache[0], tables_L), shared)
        return x_BTD, None if cache is None else (slots,), {"layers": routings} if routings else {}
    out, routings, whole = (), {}, c.periods * P
    for name, begin, end, repeats in (("layers", 0, whole, c.periods), ("last_layers", whole, c.n_layers, 1)):
        if begin == end:
            continue
        kinds = c.layer_kinds[begin:end][:P]
        slots = (None,) * len(kinds) if cache is None else cache[len(out) : len(out) + len(kinds)]
        tables = None if tables_L is None else tables_L[begin:end].reshape(repeats, -1)
        if cache is not None and repeats == 1:  # a scan would copy the cache
            whole_weight = lambda leaf: isinstance(leaf, Weight)  # may keep its axis of layers: to take it off would copy it
            first = lambda tree: jax.tree.map(lambda x: x if whole_weight(x) else x[0], tree, is_leaf=whole_weight)
            period = nn.map_variables(Period, "params", trans_in_fn=first)(c, compute, train, kinds, name=name)
            x_BTD, new = period(x_BTD, first((slots, tables)), shared)
            slots, routing = jax.tree.map(lambda leaf: leaf[None], new)
        else:
            period = _scanned(Period, repeats, unroll(c, compute, repeats))(c, compute, train, kinds, name=name)
            x_BTD, (slots, routing) = period(x_BTD, (slots, tables), shared)
        out += slots
        routings |= {name: routing} if routing else {}
    return x_BTD, None if cache is None else out, routings


def _scanned(module, length: int, unroll: int):
    """A Block or Period, repeated with other parameters each time."""
    return nn.scan(
        module,
        variable_axes={"params": 0, "intermediates": 0},  # the latter for capture_intermediates=True
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=length,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
