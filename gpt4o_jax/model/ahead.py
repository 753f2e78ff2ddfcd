"""Multi-token prediction: extra heads that predict the tokens after the next one, as an auxiliary training loss.

B batch, T positions, D model width, n heads

Source: DeepSeek-V3 (arXiv:2412.19437), section 2.2. Heads are applied in sequence: each reads the hidden state of the previous
one and the embedding of one more token, which keeps the causal chain. Embedding table and output head are the model's own.
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
    """block(join([norm(h), norm(embedding)])) as a scan step: h_BTD -> (h_BTD, (final_norm(h), routings))."""

    config: ModelConfig
    compute: Compute
    train: bool

    @nn.compact
    def __call__(self, h_BTD, embedded_BTD, shared: Shared):
        c = self.config
        both = [make_norm(c, "hidden_norm")(h_BTD), make_norm(c, "embedding_norm")(embedded_BTD)]
        join = param(self, "join", normal(c.hidden_std), (2 * c.d_model, c.d_model), ("embed", "embed"))
        h_BTD = product("BTC,CD->BTD", jnp.concatenate(both, axis=-1), join, self.compute)
        block = remat_block(c, looped=c.mtp_heads > 1)(c, self.compute, self.train, c.period[-1], name="block")
        h_BTD, (_, routings) = block(h_BTD, (None, None), shared)
        return h_BTD, (make_norm(c, "final_norm")(h_BTD), {"block": routings} if routings else {})


def look_ahead(c: ModelConfig, compute: Compute, train: bool, h_BTD, embedded_BTD, shared: Shared):
    """Runs the multi-token prediction heads. Returns (later_nBTD, routings).

    h_BTD: the decoder's hidden states before its final norm; embedded_BTD: the token embeddings.
    later_nBTD: inputs of the output head; entry k - 1 predicts the token k positions after the usual target. The last k
    positions of entry k - 1, and positions whose k-th successor is in another document, are meaningless.
    Arguments and results are in the token order of parallel.context.zigzag.
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
