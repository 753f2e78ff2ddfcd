"""The key/value cache of generation: an explicit pytree, passed in and out.

L layers, B batch, S slots, K key/value heads, H head width
"""

import flax.struct
import jax
import jax.numpy as jnp

from gpt4o_jax.config import ModelConfig


@flax.struct.dataclass
class Cache:
    """Keys and values by layer; slot s of a row holds the token at position s of that row."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array


def empty_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
    """A cache for `batch` rows of up to `slots` tokens each, float32."""
    shape = (config.n_layers, batch, slots, config.kv_heads, config.head_width)
    return Cache(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))


def write(cache_BSKH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array, valid_BT: jax.Array) -> jax.Array:
    """Puts each valid token at the slot of its position; padding is dropped."""
    rows_B1 = jnp.arange(cache_BSKH.shape[0])[:, None]
    outside = cache_BSKH.shape[1]
    slots_BT = jnp.where(valid_BT, positions_BT, outside)
    return cache_BSKH.at[rows_B1, slots_BT].set(new_BTKH, mode="drop")


def take_rows(cache: Cache, rows_B: jax.Array) -> Cache:
    """The cache of these rows, in this order; a row may come several times."""
    return jax.tree.map(lambda leaf_LB: leaf_LB[:, rows_B], cache)
