"""Multi-token prediction: small heads that predict the tokens after the next one, for the sake of what the trunk learns.

B batch, T positions, D model width, n heads

Source: DeepSeek-V3 (arXiv:2412.19437), section 2.2: the heads stand in a row, each reads the state of the one before
it and the embedding of one token more, so the causal chain is kept; embedding table and output head are the model's.
"""

import flax.linen as nn
import jax.numpy as jnp

from gpt4o_jax.config import ModelConfig
from gpt4o_jax.model.block import Shared, make_norm, remat_block
from gpt4o_jax.model.layers import normal, param
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.ops.products import product
from gpt4o_jax.parallel import context


class Head(nn.Module):
    """block(join([norm(h), norm(embedding)])): state in, state out with (what the output head reads, routings)."""

    config: ModelConfig
    compute: Compute
    train: bool

    @nn.compact
    def __call__(self, h_BTD, embedded_BTD, shared: Shared):
        c = self.config
        both = [make_norm(c, "hidden_norm")(h_BTD), make_norm(c, "embedding_norm")(embedded_BTD)]
        join = param(self, "join", normal(c.hidden_std), (2 * c.d_model, c.d_model), ("embed", "embed"))
        h_BTD = product("BTC,CD->BTD", jnp.concatenate(both, axis=-1), join, self.compute)
        block = remat_block(c)(c, self.compute, self.train, c.period[-1], name="block")
        h_BTD, (_, routings) = block(h_BTD, (None, None), shared)
        return h_BTD, (make_norm(c, "final_norm")(h_BTD), {"block": routings} if routings else {})


def look_ahead(c: ModelConfig, compute: Compute, train: bool, h_BTD, embedded_BTD, shared: Shared):
    """(What the output head reads for the targets 1, 2, ..., n places after each position's own [n, B, T, D], routings).

    h_BTD: the trunk's state before its final norm; embedded_BTD: embeddings of the row's tokens; both, and what is returned,
    as parallel.context.zigzag has a row. Its last k places in entry k - 1, and those whose k-th successor lies in another
    document, mean nothing.
    """
    heads = nn.scan(
        Head,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=c.mtp_heads,
        metadata_params={nn.PARTITION_NAME: "ahead"},
    )(c, compute, train, name="ahead")
    embedded_BTD = context.in_order(embedded_BTD)
    later_nBTD = jnp.stack([context.zigzag(jnp.roll(embedded_BTD, -k, axis=1)) for k in range(1, c.mtp_heads + 1)])
    return heads(h_BTD, later_nBTD, shared._replace(first_BTD=None, values_nBTKH=None))[1]
