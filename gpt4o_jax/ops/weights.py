"""Weights as generation reads them: matrices [O, K] in 16, 8 or 4 bits, K summed over, O outputs.

One token at a time, generation is as fast as its weights come from memory. XLA:CPU has no product of a float32 vector and
narrower weights: it widens the whole matrix in memory first. Written as sums of slices, widening, multiplying and adding are
one loop over what was read, which it vectorises (a reduction it would not: float sums keep their order). How fast that is,
and what else was tried, is measured in BENCHMARKS.md.

M rows, O outputs, K summed over, G groups of K with one scale each, P parts of K, C values in one
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from gpt4o_jax.ops.compute import Compute

FORMATS = ("bfloat16", "int8", "int4")
LANES = 64  # values side by side in a sum
GROUP = 2 * LANES  # int4: values that share a scale; the halves of a group are the halves of its bytes
LONGEST_PART = 512  # values whose sum is one expression, where K is longer than twice that
# Above so many rows, each widening the weights for itself, it is quicker to widen them once in memory.
MOST_ROWS = {"bfloat16": 3, "int8": 8, "int4": 8}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["format", "summed", "outputs"]
)
@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter of shape (*summed, *outputs), rounded. Arrays may lead with an axis of layers; to multiply, of one."""

    values: jax.Array  # [O, K], K padded with zeros: the bits of bfloat16 as uint16, int8, or two int4 in a uint8 [O, K / 2]
    scales: jax.Array | None  # int8: [O, 1]; int4: [O, G]
    format: str
    summed: tuple[int, ...]
    outputs: tuple[int, ...]


def rounded(w: jax.Array, n_summed: int, format: str) -> Weight:
    """The Weight of a float32 parameter whose first `n_summed` axes are summed over. format: one of FORMATS.

    int8: each output has a scale; int4: each 128 inputs of an output have one. Both symmetric, to the nearest.
    """
    summed, outputs = w.shape[:n_summed], w.shape[n_summed:]
    K = math.prod(summed)
    w_OK = w.reshape(K, -1).T
    unit = GROUP if format == "int4" else LANES
    w_OK = jnp.pad(w_OK, ((0, -len(w_OK) % LANES if len(w_OK) > 1024 else 0), (0, -K % unit)))
    if format == "bfloat16":
        bits = jax.lax.bitcast_convert_type(w_OK.astype(jnp.bfloat16), jnp.uint16)
        return Weight(bits, None, format, summed, outputs)
    most = 127 if format == "int8" else 7
    w_OGc = w_OK.reshape(len(w_OK), -1, GROUP if format == "int4" else w_OK.shape[1])
    scales_OG = jnp.max(jnp.abs(w_OGc), axis=-1) / most
    whole_OGc = jnp.round(w_OGc / jnp.maximum(scales_OG, 1e-30)[..., None]).astype(jnp.int8)
    if format == "int4":
        low, high = jnp.split((whole_OGc + 8).astype(jnp.uint8), 2, axis=-1)
        whole_OGc = low | (high << 4)
    return Weight(whole_OGc.reshape(len(w_OK), -1), scales_OG, format, summed, outputs)


def dense(w: Weight) -> jax.Array:
    """The matrix [O, K] that it stands for, float32, padding included."""
    w = _of_one_layer(w)
    if w.format == "bfloat16":
        return _widened(w.values)
    if w.format == "int8":
        return w.values.astype(jnp.float32) * w.scales
    bytes_OGc = w.values.reshape(*w.scales.shape, LANES)
    return (jnp.concatenate(_nibbles(bytes_OGc), axis=-1) * w.scales[..., None]).reshape(len(w.values), -1)


def rows(w: Weight, indices: jax.Array) -> jax.Array:
    """What the outputs of these indices multiply: an embedding's rows, [*indices.shape, K], float32."""
    taken = Weight(w.values[indices.ravel()], None if w.scales is None else w.scales[indices.ravel()], w.format, w.summed, ())
    return dense(taken)[:, : math.prod(w.summed)].reshape(*indices.shape, -1)


def weight_product(x: jax.Array, w: Weight, compute: Compute) -> jax.Array:
    """x [..., *summed] times w: [..., *outputs], float32 sums."""
    leading = x.shape[: x.ndim - len(w.summed)]
    x_MK = x.reshape(math.prod(leading), -1)
    K = w.values.shape[-1] * (2 if w.format == "int4" else 1)
    x_MK = jnp.pad(x_MK, ((0, 0), (0, K - x_MK.shape[1])))
    if compute.platform == "cpu" and len(x_MK) <= MOST_ROWS[w.format]:
        # Tied to x, or XLA would widen all weights of a loop over tokens before the loop; and kept apart from what
        # comes after, with which it would break the one loop here into several.
        x_MK, w = jax.lax.optimization_barrier((x_MK.astype(jnp.float32), w))
        y_MO = jax.lax.optimization_barrier(_summed_in_lanes(x_MK, w))
    else:
        x_MK = x_MK.astype(compute.operand)
        whole = compute.dtype == "bfloat16" and w.format == "bfloat16"
        w_OK = jax.lax.bitcast_convert_type(_of_one_layer(w).values, jnp.bfloat16) if whole else dense(w).astype(compute.operand)
        y_MO = jnp.einsum("MK,OK->MO", x_MK, w_OK, preferred_element_type=jnp.float32)
    return y_MO[:, : math.prod(w.outputs)].reshape(*leading, *w.outputs)


def _summed_in_lanes(x_MK, w: Weight):
    M, K = x_MK.shape
    C = _part(K, GROUP if w.format == "int4" else LANES)
    x_M1PC = x_MK.reshape(M, 1, K // C, C)
    O = w.values.shape[-2]
    w_1OPC = w.values.reshape(1, O, K // C, -1)
    lanes = lambda array, i: array[..., i * LANES : (i + 1) * LANES]
    if w.format == "int4":
        scales_1OPg = w.scales.reshape(1, O, K // C, -1)
        terms = []
        for g in range(C // GROUP):
            low, high = _nibbles(lanes(w_1OPC, g))
            terms.append((lanes(x_M1PC, 2 * g) * low + lanes(x_M1PC, 2 * g + 1) * high) * scales_1OPg[..., g : g + 1])
    else:
        terms = [lanes(x_M1PC, i) * _widened(lanes(w_1OPC, i)) for i in range(C // LANES)]
    sums = functools.reduce(jnp.add, terms)
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    sums = jax.lax.optimization_barrier(sums)
    y_MO = functools.reduce(jnp.add, [sums[:, :, p, 0] for p in range(K // C)])
    return y_MO * w.scales.reshape(O) if w.format == "int8" else y_MO


def _of_one_layer(w: Weight) -> Weight:
    return jax.tree.map(lambda x: x.reshape(x.shape[-2:]), w)


def _part(K: int, unit: int) -> int:
    """The largest divisor of K up to LONGEST_PART that is whole units, or K."""
    if K <= 2 * LONGEST_PART:
        return K
    return max(c for c in range(unit, LONGEST_PART + 1, unit) if K % c == 0)


def _widened(values) -> jax.Array:
    """int8, or the bits of bfloat16, as float32. (XLA:CPU converts the type bfloat16 itself one by one.)"""
    if values.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(values.astype(jnp.uint32) << 16, jnp.float32)
    return values.astype(jnp.float32)


def _nibbles(packed) -> tuple[jax.Array, jax.Array]:
    """(low, high) halves of each byte, as numbers from -8 to 7."""
    number = lambda n: (n.astype(jnp.int8) - 8).astype(jnp.float32)
    return number(packed & 15), number(packed >> 4)
