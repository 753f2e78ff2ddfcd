"""Context parallelism: attention for rows split along their length over the mesh axis "context".

Of 2C chunks of a row, device i of C holds chunks i and 2C - 1 - i: with causal attention all devices then have the same work
(zig-zag order, as in github.com/zhuzilin/ring-flash-attention and Llama 3, arXiv:2407.21783, section 3.3.2; after Striped
Attention, arXiv:2311.09431). A device's queries stay in place, and meet the keys in one of two ways:

    ring    keys and values pass from neighbour to neighbour, sent on while they are used (Ring Attention, arXiv:2310.01889);
            in layers with a window, only as far as it reaches. A device holds its own keys and those of two others.
    gather  every device first collects all keys and values: one collective instead of C - 1, for few devices or high message
            latency (Llama 3, ibid.); keys, values and their gradients are whole on every device.

Both work chunk by chunk: a device computes 2C - 1 pairs of chunks that lie wholly in the past, so that causality needs no mask,
and its two chunks with themselves. What the window hides is skipped. Partial softmaxes are joined by their normalisers, and the
backward pass recomputes the scores from the joint one (FlashAttention-2, arXiv:2307.08691). The pairs are computed by
ops/attention_blocks.py on every platform: plain XLA on GPUs and TPUs, no fused kernel inside the ring.

B batch, T positions of the whole row, N query heads, K key/value heads, G query heads per key/value head, H head width,
X rows times key/value heads, C devices along the axis, c = T / 2C positions of a chunk
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt4o_jax.ops.attention_blocks import How, attend, attend_backward, equal_blocks
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.parallel.rules import even, per_shard

AXIS = "context"


def parts(T: int) -> int:
    """Number of devices that rows of T positions are split over: C if 2C divides T, else 1, and every device has whole rows."""
    C = dict(jax.sharding.get_abstract_mesh().shape).get(AXIS, 1)
    return C if T % (2 * C) == 0 else 1


# ---------------------------------------------------------------- zig-zag order


def zigzag(x: jax.Array) -> jax.Array:
    """Moves the chunks of x [B, T, ...] to the devices that attend with them: i and 2C - 1 - i to device i, in this order."""
    return _moved(_to_zigzag, x)


def in_order(x: jax.Array) -> jax.Array:
    """The inverse of `zigzag`."""
    return _moved(_from_zigzag, x)


def _moved(move, x):
    if parts(x.shape[1]) == 1:
        return x
    names = even(x, "batch", "seq", *[None] * (x.ndim - 2))
    return per_shard(move, [names], names)(x)


def _holder(chunk: int, C: int) -> int:
    return min(chunk, 2 * C - 1 - chunk)


def _to_zigzag(x):
    """Of the devices' chunks 2d and 2d + 1, the even ones all go to different devices, and so do the odd ones."""
    C, even_place = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS) % 2 == 0
    even, odd = jnp.split(x, 2, axis=1)
    even = jax.lax.ppermute(even, AXIS, [(d, _holder(2 * d, C)) for d in range(C)])
    odd = jax.lax.ppermute(odd, AXIS, [(d, _holder(2 * d + 1, C)) for d in range(C)])
    return jnp.concatenate([jnp.where(even_place, even, odd), jnp.where(even_place, odd, even)], axis=1)


def _from_zigzag(x):
    C, even_place = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS) % 2 == 0
    low, high = jnp.split(x, 2, axis=1)
    even, odd = jnp.where(even_place, low, high), jnp.where(even_place, high, low)
    even = jax.lax.ppermute(even, AXIS, [(_holder(2 * d, C), d) for d in range(C)])
    odd = jax.lax.ppermute(odd, AXIS, [(_holder(2 * d + 1, C), d) for d in range(C)])
    return jnp.concatenate([even, odd], axis=1)


# ---------------------------------------------------------------- attention


def context_attention(
    name: str,
    compute: Compute,
    q_BtNH: jax.Array,
    k_BtKH: jax.Array,
    v_BtKH: jax.Array,
    segments_Bt: jax.Array | None,
    sinks_N: jax.Array | None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """ops.attention.self_attention for rows in zig-zag order, in a shard_map: on a device's shards, t = T / C of T positions.

    name: "ring" or "gather". Returns [B, t, N, H], float32.
    """
    B, t, N, H = q_BtNH.shape
    K, c = k_BtKH.shape[2], t // 2
    chunks = lambda x: jnp.moveaxis(x.reshape(B, 2, c, K, -1, H), (1, 3, 4), (0, 2, 3))
    q = chunks(q_BtNH).reshape(2, B * K, N // K, c, H)
    k, v = (chunks(x).reshape(2, B * K, c, H) for x in (k_BtKH, v_BtKH))
    segments = None
    if segments_Bt is not None:
        segments = jnp.moveaxis(segments_Bt.reshape(B, 2, c), 1, 0)
    sinks = None if sinks_N is None else jnp.tile(sinks_N.reshape(K, N // K), (2 * B, 1))
    on_cpu = compute.platform == "cpu"
    operand = jnp.dtype(jnp.float32) if on_cpu else compute.operand
    how = How(H**-0.5 if scale is None else scale, window, softcap, serial=on_cpu, heads=K)
    out = _attention(name, how, operand, q, k, v, segments, sinks)
    out = out.reshape(2, B, K, N // K, c, H)
    return jnp.moveaxis(out, (0, 2, 3), (1, 3, 4)).reshape(B, t, N, H)


class Keys(NamedTuple):
    """Keys, values [chunks, X, c, H] and their segments [chunks, B, c] or None."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(name, how, operand, q, k, v, segments, sinks):
    return _forward(name, how, operand, q, k, v, segments, sinks)[0]


def _forward(name, how, operand, q, k, v, segments, sinks):
    keys = Keys(k.astype(operand), v.astype(operand), segments)
    joined = jax.tree.map(_as_heads, (q, *keys))
    own = tuple(_as_chunks(x) for x in attend(how, *joined, sinks=sinks))

    def see(sums, grads, keys, at, key, distance):
        more, its = attend(how, at.of(q), keys.k[key], keys.v[key], *_segments(segments, at, keys, key), distance=distance)
        out, normaliser = map(at.of, sums)
        both = jnp.logaddexp(normaliser, its)
        out = out * jnp.exp(normaliser - both) + more * jnp.exp(its - both)
        return (at.put(sums[0], out), at.put(sums[1], both)), grads

    (out, normaliser), _ = MEETINGS[name](_by_blocks(how, see), how.window, own, keys, None)
    return out, (q, keys, sinks, out, normaliser)


def _backward(name, how, operand, saved, d_out):
    q, own, sinks, out, normaliser = saved
    segments = own.segments
    joined = jax.tree.map(_as_heads, (q, own.k, own.v, out, normaliser, d_out))
    *grads, d_sinks = attend_backward(how, *joined, None if segments is None else _as_heads(segments), sinks=sinks)
    d_q, *d_keys = (_as_chunks(x) for x in grads)

    def see(d_q, d_keys, keys, at, key, distance):
        mine = map(at.of, (out, normaliser, d_out))
        more_q, *more, _ = attend_backward(
            how, at.of(q), keys.k[key], keys.v[key], *mine, *_segments(segments, at, keys, key), distance=distance
        )
        return at.put(d_q, at.of(d_q) + more_q), tuple(x.at[key].add(y) for x, y in zip(d_keys, more, strict=True))

    d_q, (d_k, d_v) = MEETINGS[name](_by_blocks(how, see), how.window, d_q, own, tuple(d_keys))
    return d_q, d_k, d_v, None, d_sinks


_attention.defvjp(_forward, _backward)


def _as_heads(x):
    """[2, X, ...] -> [2X, ...]: each chunk separately."""
    return x.reshape(-1, *x.shape[2:])


def _as_chunks(x):
    return x.reshape(2, -1, *x.shape[1:])


def _segments(segments, at, keys, key):
    return (None, None) if segments is None else (at.of(segments, axis=2), keys.segments[key])


class Block(NamedTuple):
    """A block of queries: the index of its chunk, its first position there, its size."""

    chunk: jax.Array
    first: jax.Array
    size: int

    def of(self, x, axis: int = 3):
        """Its part of x [2, X, G, c, ...], with positions along `axis`."""
        return jax.lax.dynamic_slice_in_dim(x[self.chunk], self.first, self.size, axis - 1)

    def put(self, x, part):
        """x [2, X, G, c, ...] with this part of it replaced."""
        return jax.lax.dynamic_update_slice(x, part[None], (self.chunk, 0, 0, self.first, 0))


def _by_blocks(how, see):
    """`see` for whole chunks, with distances in chunks instead of positions; what the window hides is skipped."""

    def seen(mine, theirs, keys, query, key, back):
        c = keys.k.shape[2]
        size = c // equal_blocks(c)

        def block(n, both):
            return see(*both, keys, Block(query, n * size, size), key, back * c + n * size)

        call = lambda *both: jax.lax.fori_loop(0, c // size, block, both)
        if how.window is None:
            return call(mine, theirs)
        return jax.lax.cond((back - 1) * c + 1 < how.window, call, lambda *both: both, mine, theirs)

    return seen


# ---------------------------------------------------------------- the order in which chunks meet

# Called as (see, window, mine, keys, theirs): `mine` stays with the queries; `theirs` belongs to the keys, such as their
# gradients, or is None. see(mine, theirs, keys, query, key, back) returns both after the device's own chunk `query` has attended
# to chunk `key` of `keys`, which is `back` chunks earlier in the row. Returns (mine, theirs) of every device after all pairs
# except those of chunks with themselves.


def _ring(see, window, mine, keys, theirs):
    """In step j, the device holds the keys of device p, j places before it; they go all the way round.

    Its upper chunk comes after p's lower one, whatever p is, and attends to it while the keys are sent on. Of the arriving keys
    only one more chunk is attended to: if p < i, their lower one by its lower one, else their upper one by its upper one.
    """
    C, i = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    lower_of = lambda mine, theirs, keys, j: see(mine, theirs, keys, 1, 0, 2 * C - 1 - i - (i - j) % C)

    def step(carry, j, shift):
        mine, keys, theirs = carry
        later = _send(keys, shift)
        mine, theirs = lower_of(mine, theirs, keys, j)
        theirs, p = _send(theirs, shift), (i - j - shift) % C
        which = jnp.where(p < i, 0, 1)
        mine, theirs = see(mine, theirs, later, which, which, jnp.abs(i - p))
        return (mine, later, theirs), None

    last, carry = 0, (mine, keys, theirs)
    for first, count, shift in _legs(C, window, keys.k.shape[2]):
        carry, _ = jax.lax.scan(functools.partial(step, shift=shift), carry, first + jnp.arange(count))
        last = first + count * shift
    mine, keys, theirs = carry
    mine, theirs = lower_of(mine, theirs, keys, last)
    return mine, _send(theirs, C - last)


def _send(tree, shift: int):
    """Sends to the device `shift` places ahead; receives from the one `shift` places behind."""
    C = jax.lax.axis_size(AXIS)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, [(d, (d + shift) % C) for d in range(C)]), tree)


def _legs(C: int, window: int | None, c: int) -> list[tuple[int, int, int]]:
    """The keys' way round the ring as (first step, number of moves, places per move).

    With a window that reaches n chunks back, only devices up to n places apart, ahead or behind, have pairs of chunks.
    """
    n = C if window is None else -(-(window - 1) // c)
    if n == 0:
        return []
    legs = [(0, C - 1, 1)] if C - 2 * n <= 1 else [(0, n, 1), (n, 1, C - 2 * n), (C - n, n - 1, 1)]
    return [leg for leg in legs if leg[1]]


def _gather(see, window, mine, keys, theirs):
    """The lower chunk attends to the i chunks before it, then the upper one to the 2C - 1 - i before it."""
    C, i = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    everyones = jax.tree.map(_gathered, keys)
    sums = jax.tree.map(lambda x: jnp.zeros((2 * C, *x.shape[1:]), x.dtype), theirs)

    def step(carry, m):
        mine, sums = carry
        query = jnp.where(m < i, 0, 1)
        key = jnp.where(m < i, m, m - i)
        return see(mine, sums, everyones, query, key, jnp.where(m < i, i, 2 * C - 1 - i) - key), None

    (mine, sums), _ = jax.lax.scan(step, (mine, sums), jnp.arange(2 * C - 1))
    return mine, jax.tree.map(lambda x, y: x + _scattered(y), theirs, sums)


def _gathered(x):
    """Two chunks per device -> all [2C, ...] in the order of the row."""
    x = jax.lax.all_gather(x, AXIS)
    return jnp.concatenate([x[:, 0], x[::-1, 1]])


def _scattered(x):
    """Sums over devices of what each has for all chunks -> the device's own two."""
    low, high = jnp.split(x, 2)
    return jax.lax.psum_scatter(jnp.stack([low, high[::-1]], axis=1), AXIS)


MEETINGS = {"ring": _ring, "gather": _gather}
