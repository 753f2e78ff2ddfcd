"""The layers as stages of a pipeline (parallel/pipeline.py), with the same parameters as model/block.py.

B batch, T positions, D model width, L layers, M micro-batches, n value embeddings
"""

import jax
import jax.numpy as jnp

from gpt4o_jax.config_model import ModelConfig
from gpt4o_jax.model.block import Period, Shared, looped, remat_block, unroll, value_tables
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.parallel.pipeline import Schedule, cut, joined, pipeline


def staged_layers(
    c: ModelConfig, compute: Compute, order: Schedule, params, x_BTD: jax.Array, shared: Shared, key: jax.Array | None
):
    """What block.layers returns without a cache: (x_BTD, routings). params: those under "layers". key: enables dropout, or None.

    Routings are summed over all micro-batches. Dropout is drawn per layer and micro-batch, so it differs from that without
    stages.
    """
    P, train = len(c.period), key is not None
    loop = looped(c, c.periods)
    if P == 1:
        module = remat_block(c, loop)(c, compute, train, c.period[0], parent=None)
    else:
        module = Period(c, compute, train, c.period, loop, parent=None)
    tables = None if shared.values_nBTKH is None else value_tables(c)
    if P > 1 and tables is not None:
        tables = tables.reshape(c.periods, P)

    def stage(layers, x_BTD, shared, m):
        def one(x_BTD, layer):
            params, period, table = layer
            rngs = {"dropout": jax.random.fold_in(jax.random.fold_in(key, period), m)} if train else {}
            caches = None if P == 1 else (None,) * P
            x_BTD, (_, routings) = module.apply({"params": params}, x_BTD, (caches, table), shared, rngs=rngs)
            return x_BTD, routings

        return jax.lax.scan(one, x_BTD, layers, unroll=unroll(c, compute, len(layers[1])))

    M, values_nBTKH = order.micro_batches, shared.values_nBTKH
    shared = jax.tree.map(lambda x: cut(x, M), shared._replace(values_nBTKH=None))
    if values_nBTKH is not None:
        shared = shared._replace(values_nBTKH=cut(values_nBTKH, M, axis=1))
    x_MBTD, routings = pipeline(stage, (params, jnp.arange(c.periods), tables), cut(x_BTD, M), shared, order)
    return joined(x_MBTD), {"layers": routings} if routings else {}
