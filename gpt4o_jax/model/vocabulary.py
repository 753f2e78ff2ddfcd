"""The two ends of the decoder that depend on the vocabulary: the embedding lookup, and the output head with its losses.

Both are written per device (shard_map), which makes their communication explicit: V is sharded over the mesh axis "tensor", D
over "fsdp"; each device looks up the rows of its own shard, and logits are never gathered.

B batch, T positions, D model width, V vocabulary
"""

import jax
import jax.numpy as jnp

from gpt4o_jax.config import ModelConfig
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.cross_entropy import LossSums, cross_entropy, token_scores
from gpt4o_jax.ops.weights import Weight, rows
from gpt4o_jax.parallel import even, gathered, mesh_axes, per_shard, shards_evenly


def lookup(table: jax.Array | Weight, ids_BT: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """table[ids], [B, T, ...]. axes: logical names of the table's axes.

    The result is sharded like ids; if the rows of the table are split over "tensor", so is T, where it divides.
    """
    if isinstance(table, Weight):
        return rows(table, ids_BT)
    tokens, between = layout(ids_BT)

    def local(part, ids_BT):
        for i, name in enumerate(axes):
            if name == "embed":
                part = gathered(part, "fsdp", i)
        if axes[0] != "vocab":
            return jnp.take(part, ids_BT, axis=0)
        place_BT = ids_BT - jax.lax.axis_index("tensor") * part.shape[0]
        here_BT = (place_BT >= 0) & (place_BT < part.shape[0])
        x = jnp.take(part, place_BT, axis=0, mode="clip")
        x = jnp.where(here_BT.reshape(*here_BT.shape, *[1] * (x.ndim - 2)), x, 0.0)
        if between == tokens:
            return jax.lax.psum(x, "tensor")
        return jax.lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True)

    out = between if axes[0] == "vocab" else tokens
    return per_shard(local, [axes, tokens], (*out, *[None] * (table.ndim - 1)))(table, ids_BT)


def layout(ids_BT, rows: str = "batch") -> tuple[tuple, tuple]:
    """Logical axis names of [B, T] arrays (inside a block, between blocks); None where an axis does not divide."""
    inside = even(ids_BT, rows, "seq")
    between = even(ids_BT, rows, "residual")
    return inside, between if between[1] else inside


def head_layout(ids_BT) -> tuple[tuple, tuple]:
    """`layout` at the head: after a pipeline the stages share its rows, or each has them all if they do not divide."""
    return layout(ids_BT, "staged_batch" if shards_evenly(ids_BT, "staged_batch", None) else "batch")


def unembedding(params) -> jax.Array | Weight:
    """The head's matrix [D, V]: its own, or the transposed embedding table if tied (a Weight is stored transposed)."""
    if "unembedding" in params:
        return params["unembedding"]
    table = params["embedding"]
    return table if isinstance(table, Weight) else table.T


def head_losses(
    c: ModelConfig, compute: Compute, params, hidden_BTD, targets_BT, weights_BT, chunk: int, z_loss: float = 0.0
) -> LossSums:
    """ops.cross_entropy of a batch, summed over all devices."""

    def local(axes, hidden_BTD, unembed_DV, targets_BT, weights_BT):
        sums = cross_entropy(hidden_BTD, unembed_DV, targets_BT, weights_BT, chunk, compute, c.logit_softcap, z_loss, "tensor")
        return LossSums(*jax.lax.psum(tuple(sums), axes))

    return _head(local, params, hidden_BTD, (targets_BT, weights_BT), ())


def head_scores(c: ModelConfig, compute: Compute, params, hidden_BTD, targets_BT, chunk: int) -> tuple[jax.Array, jax.Array]:
    """ops.token_scores of a batch: (negative log-likelihood in nats, whether the target ranks first), [B, T] each."""
    how = (chunk, compute, c.logit_softcap)
    if isinstance(unembedding(params), Weight):
        return token_scores(hidden_BTD, unembedding(params), targets_BT, *how)
    local = lambda axes, hidden_BTD, unembed_DV, targets_BT: token_scores(hidden_BTD, unembed_DV, targets_BT, *how, "tensor")
    return _head(local, params, hidden_BTD, (targets_BT,), head_layout(targets_BT)[0])


def _head(local, params, hidden_BTD, others_BT: tuple, out_names):
    """local(mesh axes that split tokens, hidden_BTD, unembed_DV, *others_BT) per device: its tokens, all of D, its part of V."""
    tokens, between = head_layout(others_BT[0])
    axes = mesh_axes(*tokens)

    def whole(hidden_BTD, unembed_DV, *others_BT):
        if between != tokens:
            hidden_BTD = gathered(hidden_BTD, "tensor", 1)
        return local(axes, hidden_BTD, gathered(unembed_DV, "fsdp", 0), *others_BT)

    inner = [(*between, None), ("embed", "vocab"), *[tokens] * len(others_BT)]
    return per_shard(whole, inner, out_names)(hidden_BTD, unembedding(params), *others_BT)
