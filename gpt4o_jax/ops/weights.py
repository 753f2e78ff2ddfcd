"""Weights for generation: matrices in 16, 8 or 4 bits.

Generation of one token at a time is as fast as its weights are read from memory. XLA:CPU has no product of a float32 vector and
narrower weights: it widens the whole matrix in memory first. Written as sums of slices, widening, multiplying and adding form one
loop over the data read, which it vectorises (it would not vectorise a reduction: float sums keep their order). How fast that is,
and what else was tried, is measured in BENCHMARKS.md.

M rows, O outputs, K inputs summed over, in P parts of C values each; G groups of K with one scale each
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from gpt4o_jax.ops.compute import Compute, precision

FORMATS = ("bfloat16", "int8", "int4")
LANES = 64  # values added side by side
GROUP = 2 * LANES  # int4: values that share a scale; the halves of a group are the low and high nibbles of its bytes
LONGEST_PART = 768  # values summed in one expression
# Up to this many rows, each widens the weights itself. With more, it is faster to widen them once in memory, or, for bfloat16, to
# multiply them directly if they are stored as bfloat16: XLA:CPU converts bits to bfloat16 at no more than 1.4 GB/s.
MOST_ROWS = {"bfloat16": 3, "int8": 8, "int4": 8}
DENSE_ROWS = 8  # XLA:CPU multiplies this many rows of bfloat16 in a tenth of the time of one


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["format", "summed", "outputs"]
)
@dataclasses.dataclass(frozen=True)
class Weight:
    """A rounded parameter of shape (*summed, *outputs). Arrays may have a leading layers axis, of size 1 in products."""

    # P arrays [O, C], the parts of K, padded with zeros: bfloat16 bits as uint16, int8, or two int4 per uint8 [O, C / 2]. Or one
    # bfloat16 array [O, K].
    values: tuple[jax.Array, ...]
    scales: jax.Array | None  # int8: [O, 1]; int4: [O, G]
    format: str
    summed: tuple[int, ...]
    outputs: tuple[int, ...]


def rounded(w: jax.Array, n_summed: int, format: str, rows: int = 1) -> Weight:
    """The Weight of a float32 parameter whose first `n_summed` axes are summed over. format: one of FORMATS.

    rows: number of rows it will mostly be multiplied with: for more than a few, bfloat16 is stored as such, not as bits.
    int8: one scale per output; int4: one per 128 inputs of an output. Both symmetric, rounded to nearest.
    """
    summed, outputs = w.shape[:n_summed], w.shape[n_summed:]
    K = math.prod(summed)
    w_OK = w.reshape(K, -1).T
    unit = GROUP if format == "int4" else LANES
    w_OK = jnp.pad(w_OK, ((0, -len(w_OK) % LANES if len(w_OK) > 1024 else 0), (0, -K % unit)))
    if format == "bfloat16" and rows > MOST_ROWS[format]:
        return Weight((w_OK.astype(jnp.bfloat16),), None, format, summed, outputs)
    if format == "bfloat16":
        bits = jax.lax.bitcast_convert_type(w_OK.astype(jnp.bfloat16), jnp.uint16)
        return Weight(_in_parts(bits, _part(bits.shape[1], unit)), None, format, summed, outputs)
    most = 127 if format == "int8" else 7
    w_OGc = w_OK.reshape(len(w_OK), -1, GROUP if format == "int4" else w_OK.shape[1])
    scales_OG = jnp.max(jnp.abs(w_OGc), axis=-1) / most
    whole_OGc = jnp.round(w_OGc / jnp.maximum(scales_OG, 1e-30)[..., None]).astype(jnp.int8)
    C = _part(w_OK.shape[1], unit)
    if format == "int4":
        low, high = jnp.split((whole_OGc + 8).astype(jnp.uint8), 2, axis=-1)
        whole_OGc, C = low | (high << 4), C // 2
    return Weight(_in_parts(whole_OGc.reshape(len(w_OK), -1), C), scales_OG, format, summed, outputs)


def _in_parts(values_OK, C: int) -> tuple[jax.Array, ...]:
    """P arrays [O, C], separate so that a sum over one reads contiguous memory."""
    return tuple(jnp.split(values_OK, values_OK.shape[1] // C, axis=1))


def _whole(w: "Weight"):
    """The values joined into one array [O, K]."""
    return jnp.concatenate(_of_one_layer(w).values, axis=1)


def dense(w: Weight) -> jax.Array:
    """The represented matrix [O, K], including padding: float32, or bfloat16 if it is stored as such."""
    w = _of_one_layer(w)
    values_OK = _whole(w)
    if w.format == "bfloat16":
        return values_OK if values_OK.dtype == jnp.bfloat16 else _widened(values_OK)
    if w.format == "int8":
        return values_OK.astype(jnp.float32) * w.scales
    bytes_OGc = values_OK.reshape(*w.scales.shape, LANES)
    return (jnp.concatenate(_nibbles(bytes_OGc), axis=-1) * w.scales[..., None]).reshape(len(w.scales), -1)


def rows(w: Weight, indices: jax.Array) -> jax.Array:
    """The weights of the outputs at `indices`, such as an embedding's rows, [*indices.shape, K], float32."""
    # Tied to the indices, or XLA:CPU would widen a bfloat16 table before a loop that looks up rows of it.
    w, indices = jax.lax.optimization_barrier((w, indices))
    values, scales = jax.tree.map(lambda x: x[indices.ravel()], (w.values, w.scales))
    taken = Weight(values, scales, w.format, w.summed, ())
    return dense(taken)[:, : math.prod(w.summed)].astype(jnp.float32).reshape(*indices.shape, -1)


def weight_product(x: jax.Array, w: Weight, compute: Compute) -> jax.Array:
    """x [..., *summed] times w -> [..., *outputs], float32 sums."""
    leading = x.shape[: x.ndim - len(w.summed)]
    x_MK = x.reshape(math.prod(leading), -1)
    M, K = len(x_MK), len(w.values) * w.values[0].shape[-1] * (2 if w.format == "int4" else 1)
    x_MK = jnp.pad(x_MK, ((0, 0), (0, K - x_MK.shape[1])))
    as_it_is = w.values[0].dtype == compute.operand
    if compute.platform == "cpu" and len(x_MK) <= MOST_ROWS[w.format] and not as_it_is:
        # Tied to x, or XLA would widen all weights of a loop over tokens before the loop; and fenced off from what follows, with
        # which XLA would split this one loop into several.
        x_MK, w = jax.lax.optimization_barrier((x_MK.astype(jnp.float32), w))
        y_MO = jax.lax.optimization_barrier(_summed_in_lanes(x_MK, w))
    else:
        if compute.platform == "cpu" and as_it_is:
            x_MK = jnp.pad(x_MK, ((0, max(DENSE_ROWS - M, 0)), (0, 0)))
        bits = compute.dtype == "bfloat16" and w.format == "bfloat16" and not as_it_is
        w_OK = jax.lax.bitcast_convert_type(_whole(w), jnp.bfloat16) if bits else dense(w).astype(compute.operand)
        x_MK = x_MK.astype(compute.operand)
        exact = precision(compute.operand)
        y_MO = jnp.einsum("MK,OK->MO", x_MK, w_OK, preferred_element_type=jnp.float32, precision=exact)[:M]
    return y_MO[:, : math.prod(w.outputs)].reshape(*leading, *w.outputs)


def _summed_in_lanes(x_MK, w: Weight):
    w = _of_one_layer(w)
    x_PM1C = jnp.swapaxes(x_MK.reshape(len(x_MK), len(w.values), 1, -1), 0, 1)
    scales = [None] * len(w.values)
    if w.format == "int4":
        scales = jnp.swapaxes(w.scales.reshape(len(w.scales), len(w.values), -1), 0, 1)
    y_MO = functools.reduce(jnp.add, map(_part_of_sum, x_PM1C, w.values, scales))
    return y_MO * w.scales.reshape(-1) if w.format == "int8" else y_MO


def _part_of_sum(x_M1C, w_OC, scales_OG):
    """The sum over one part of K, [M, O], in one loop. scales_OG: for int4, else None."""
    lanes = lambda array, i: array[..., i * LANES : (i + 1) * LANES]
    if scales_OG is None:
        terms = [lanes(x_M1C, i) * _widened(lanes(w_OC, i)) for i in range(x_M1C.shape[-1] // LANES)]
    else:
        terms = []
        for g in range(scales_OG.shape[1]):
            low, high = _nibbles(lanes(w_OC, g))
            terms.append((lanes(x_M1C, 2 * g) * low + lanes(x_M1C, 2 * g + 1) * high) * scales_OG[:, g, None])
    sums = functools.reduce(jnp.add, terms)
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return jax.lax.optimization_barrier(sums)[..., 0]


def _of_one_layer(w: Weight) -> Weight:
    return jax.tree.map(lambda x: x.reshape(x.shape[-2:]), w)


def _part(K: int, unit: int) -> int:
    """The largest divisor of K up to LONGEST_PART that is a multiple of `unit`."""
    return max(c for c in range(unit, LONGEST_PART + 1, unit) if K % c == 0)


def _widened(values) -> jax.Array:
    """int8, or the bits of bfloat16, as float32. (XLA:CPU converts the type bfloat16 itself one value at a time.)"""
    if values.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(values.astype(jnp.uint32) << 16, jnp.float32)
    return values.astype(jnp.float32)


def _nibbles(packed) -> tuple[jax.Array, jax.Array]:
    """(low, high) nibbles of each byte, as numbers from -8 to 7."""
    number = lambda n: (n.astype(jnp.int8) - 8).astype(jnp.float32)
    return number(packed & 15), number(packed >> 4)
