"""The key/value cache of generation: an explicit pytree, passed in and out.

B batch, T new tokens, S slots, K key/value heads, H head width, X keys that may be attended to

A global attention layer keeps the token at position p in slot p. A layer with a sliding window keeps it in slot p mod S of a ring
with some spare slots, so that a row's newest tokens can be taken back: continue at an earlier position and they are forgotten.
The contents of a slot follow from the positions, so nothing else is stored.
"""

import flax.struct
import jax
import jax.numpy as jnp

from gpt4o_jax.config import ModelConfig

KINDS = ("float32", "bfloat16", "int8")
SPARE, RING_UNIT = 16, 16  # slots of a ring beyond its window; ring sizes are multiples of RING_UNIT


@flax.struct.dataclass
class Slots:
    """Keys and values of a layer, in the layout that attention multiplies: a head's slots are contiguous.

    int8 values are from -127 to 127, with one scale per token and head.
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    k_scale_BKS: jax.Array | None = None
    v_scale_BKS: jax.Array | None = None


# One per layer of a period, its arrays with a leading axis of periods; then one per remaining layer, with a leading axis of 1.
Cache = tuple[Slots, ...]


def empty_cache(config: ModelConfig, batch: int, slots: int, kind: str = "float32", spare: int = SPARE) -> Cache:
    """A cache for `batch` rows of up to `slots` tokens each. kind: storage type, one of KINDS.

    spare: number of a row's newest tokens that can be taken back.
    """

    def layer(repeats, window):
        shape = (repeats, batch, config.kv_heads, _size(window, slots, spare), config.head_width)
        zeros = lambda: jnp.zeros(shape, kind)
        scales = lambda: jnp.zeros(shape[:-1], jnp.float32) if kind == "int8" else None
        return Slots(zeros(), zeros(), scales(), scales())

    return tuple(layer(*place) for place in _places(config))


def grow(config: ModelConfig, cache: Cache, slots: int, spare: int = SPARE) -> Cache:
    """The cache with room for `slots` tokens per row; rings of full size are unchanged. spare: as for `empty_cache`."""

    def layer(place, old: Slots):
        window = place[1]
        more = _size(window, slots, spare) - old.k_BKSH.shape[3]
        if more <= 0:
            return old
        return jax.tree.map(lambda x: jnp.pad(x, [(0, more if axis == 3 else 0) for axis in range(x.ndim)]), old)

    return tuple(layer(*pair) for pair in zip(_places(config), cache, strict=True))


def shrink(config: ModelConfig, cache: Cache, slots: int, spare: int = SPARE) -> Cache:
    """The cache with room for only `slots` tokens per row; no row may hold more. spare: as for `empty_cache`.

    Longer rings are cut too: rows this short have not wrapped around, so position p is in slot p.
    """
    cut = lambda window, old: jax.tree.map(lambda x: x[:, :, :, : _size(window, slots, spare)], old)
    return tuple(cut(window, old) for (_, window), old in zip(_places(config), cache, strict=True))


def take_rows(cache: Cache, rows_B: jax.Array) -> Cache:
    """The cache of these rows, in this order; a row may occur several times."""
    return jax.tree.map(lambda leaf: leaf[:, rows_B], cache)


def _places(config: ModelConfig) -> list[tuple[int, int | None]]:
    """(repeats, window) of each entry of a cache."""
    whole = [(config.periods, kind.window) for kind in config.period if config.periods]
    return whole + [(1, kind.window) for kind in config.layer_kinds[config.periods * len(config.period) :]]


def _size(window: int | None, slots: int, spare: int) -> int:
    # A ring below its full size never wraps around: every position has its own slot.
    return slots if window is None else min(slots, -(-(window + spare) // RING_UNIT) * RING_UNIT)


def extend(slots: Slots, k_BTKH, v_BTKH, positions_BT, valid_BT, window: int | None):
    """Adds a call's valid tokens, which are in order within each row.

    Returns (slots, keys [B, X, K, H], values [B, X, K, H], their positions [B, X]): all that these tokens may attend to, and
    more. The position of an empty slot is negative or, in layers without a window, later than every query: a causal mask over
    non-negative positions excludes both.
    """
    S, T = slots.k_BKSH.shape[2], positions_BT.shape[1]
    new = _stored(k_BTKH, v_BTKH, slots)
    last_B1 = jnp.max(jnp.where(valid_BT, positions_BT, -1), axis=1, keepdims=True)
    slot_S = jnp.arange(S)
    if window is None:
        at_BT = jnp.where(valid_BT, positions_BT, S)
        held_BS = jnp.broadcast_to(slot_S, (len(positions_BT), S))  # slots without a token lie after every query
        written = _write(slots, new, at_BT)
        return written, *_read(written), held_BS
    at_BT = jnp.where(valid_BT & (positions_BT > last_B1 - S), positions_BT % S, S)
    written = _write(slots, new, at_BT)
    if window + T - 1 <= S:
        return written, *_read(written), last_B1 - (last_B1 - slot_S) % S
    # The last new tokens overwrite keys that the first ones still attend to, so these are taken from the old slots and the new
    # tokens.
    none = jnp.iinfo(jnp.int32).max  # above every position, which S is not
    before_B1 = jnp.min(jnp.where(valid_BT, positions_BT, none), axis=1, keepdims=True) - 1
    keys, values = (jnp.concatenate(pair, axis=1) for pair in zip(_read(slots), _read(new), strict=True))
    held_BX = jnp.concatenate([before_B1 - (before_B1 - slot_S) % S, jnp.where(valid_BT, positions_BT, -1)], axis=1)
    return written, keys, values, held_BX


def _write(slots: Slots, new: Slots, at_BT) -> Slots:
    """Writes each token to its slot; slot S does not exist and drops it."""
    if at_BT.shape[1] == 1:
        return _put(slots, new, at_BT[:, 0])
    rows_B1 = jnp.arange(len(at_BT))[:, None]
    # Indices on both sides of a slice move their axes to the front: [B, T, K, ...].
    put = lambda old_BKS, x_BKT: old_BKS.at[rows_B1, :, at_BT].set(jnp.swapaxes(x_BKT, 1, 2), mode="drop")
    return jax.tree.map(put, slots, new)


def _put(slots: Slots, new: Slots, at_B) -> Slots:
    """Writes one token per row in place. Without a loop of unknown length, XLA:CPU would write twice, once to store and once to
    read, and copy the cache for it.
    """

    def row(i, slots):
        def one(old_BKS, x_BK1):
            start = (i, 0, at_B[i], *[0] * (old_BKS.ndim - 3))
            there = jax.lax.dynamic_slice(old_BKS, start, (1, *x_BK1.shape[1:]))
            token = jnp.where(at_B[i] < old_BKS.shape[2], jax.lax.dynamic_slice_in_dim(x_BK1, i, 1), there)
            return jax.lax.dynamic_update_slice(old_BKS, token, start)

        return jax.tree.map(one, slots, new)

    some = jnp.any(at_B < slots.k_BKSH.shape[2])
    return jax.lax.fori_loop(0, jnp.where(some, len(at_B), 0), row, slots)


def _stored(k_BTKH, v_BTKH, like: Slots) -> Slots:
    k_BKTH, v_BKTH = jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2)
    if like.k_scale_BKS is None:
        return Slots(k_BKTH.astype(like.k_BKSH.dtype), v_BKTH.astype(like.v_BKSH.dtype))
    (k, k_scale), (v, v_scale) = _rounded(k_BKTH), _rounded(v_BKTH)
    return Slots(k, v, k_scale, v_scale)


def _rounded(x_BKTH):
    """(int8 [B, K, T, H], scale [B, K, T]): their product is x within scale / 2."""
    scale_BKT = jnp.max(jnp.abs(x_BKTH), axis=-1) / 127
    return jnp.round(x_BKTH / jnp.maximum(scale_BKT, 1e-30)[..., None]).astype(jnp.int8), scale_BKT


def _read(slots: Slots):
    """(keys, values) [B, S, K, H], int8 ones multiplied by their scales."""
    numbers = lambda x, scale: x if scale is None else x.astype(jnp.float32) * scale[..., None]
    k_BKSH, v_BKSH = numbers(slots.k_BKSH, slots.k_scale_BKS), numbers(slots.v_BKSH, slots.v_scale_BKS)
    return jnp.swapaxes(k_BKSH, 1, 2), jnp.swapaxes(v_BKSH, 1, 2)
