"""A mixture of experts without dropped tokens: the choice of experts, and their products.

M tokens, E experts, k experts per token, n = M * k rows sorted by expert, D model width, F hidden width of an expert, b blocks, O
outputs of a matrix

Source: MegaBlocks (arXiv:2211.15841): rows sorted by expert form one product of groups of unequal size.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.lax import RaggedDotDimensionNumbers, ragged_dot, ragged_dot_general

from gpt4o_jax.ops import keep
from gpt4o_jax.ops.adapted import Adapted
from gpt4o_jax.ops.compute import Compute, precision
from gpt4o_jax.ops.weights import Weight, dense, weight_product

SCORES = {"softmax": functools.partial(jax.nn.softmax, axis=-1), "sigmoid": jax.nn.sigmoid}


def choose(scores_ME: jax.Array, k: int, normalise: bool, bias_E: jax.Array | None = None):
    """(chosen_Mk: int32 ids of the experts with the k highest scores; gates_Mk: their weights).

    normalise: a token's weights sum to 1 (Mixtral, arXiv:2401.04088, where they are a softmax over the chosen).
    bias_E is added to the scores for the choice only (arXiv:2408.15664).
    """
    wanted_ME = jax.lax.stop_gradient(scores_ME if bias_E is None else scores_ME + bias_E)
    chosen_Mk = jax.lax.top_k(wanted_ME, k)[1]
    gates_Mk = jnp.take_along_axis(scores_ME, chosen_Mk, axis=-1)
    if normalise:
        gates_Mk /= jnp.sum(gates_Mk, axis=-1, keepdims=True)
    return chosen_Mk, gates_Mk


def experts(
    x_MD: jax.Array,
    chosen_Mk: jax.Array,
    gates_Mk: jax.Array,
    gate_EDF: jax.Array | Weight | Adapted | None,
    up_EDF: jax.Array | Weight | Adapted,
    down_EFD: jax.Array | Weight | Adapted,
    activation: Callable,
    compute: Compute,
) -> jax.Array:
    """Weighted sum over a token's experts of down(activation(gate(x)) * up(x)), or of down(activation(up(x))). [M, D]."""
    order_n, inverse_n, sizes_E = by_expert(chosen_Mk, _groups(up_EDF))
    y_nD = feed_forward(sorted_rows(x_MD, order_n, inverse_n), sizes_E, gate_EDF, up_EDF, down_EFD, activation, compute)
    return weighted_sum(y_nD, order_n, inverse_n, gates_Mk)


def in_chunks(f: Callable, chunk: int | None, *rows: jax.Array) -> jax.Array:
    """f(*rows), at most `chunk` tokens of the arrays' first axis M at a time; None: all together.

    The backward pass recomputes each chunk: keeping what it needs of all chunks would take the memory that chunks save.
    """
    M = len(rows[0])
    if chunk is None or chunk >= M:
        return f(*rows)
    chunks = -(-M // chunk)
    size = -(-M // chunks)
    cut = lambda a: jnp.pad(a, [(0, chunks * size - M), (0, 0)]).reshape(chunks, size, -1)
    again = jax.checkpoint(lambda chunk: f(*chunk), prevent_cse=False)
    return jax.lax.map(again, tuple(map(cut, rows))).reshape(chunks * size, -1)[:M]


def by_expert(chosen_Mk: jax.Array, E: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(order_n that sorts the M * k rows by expert, its inverse, number of rows per expert sizes_E)."""
    order_n = jnp.argsort(chosen_Mk.reshape(-1), stable=True)
    return order_n, jnp.argsort(order_n), jnp.bincount(chosen_Mk.reshape(-1), length=E).astype(jnp.int32)


def sorted_rows(x_MD: jax.Array, order_n: jax.Array, inverse_n: jax.Array) -> jax.Array:
    """Every token once per chosen expert, sorted by expert. [n, D]."""
    k = len(order_n) // len(x_MD)
    return permuted(jnp.broadcast_to(x_MD[:, None], (len(x_MD), k, x_MD.shape[1])).reshape(len(order_n), -1), order_n, inverse_n)


def weighted_sum(y_nD: jax.Array, order_n: jax.Array, inverse_n: jax.Array, gates_Mk: jax.Array) -> jax.Array:
    """Rows in the order of `sorted_rows`, summed by token with its weights. [M, D]."""
    return jnp.sum(permuted(y_nD, inverse_n, order_n).reshape(*gates_Mk.shape, -1) * gates_Mk[..., None], axis=1)


def feed_forward(x_nD, sizes_E, gate_EDF, up_EDF, down_EFD, activation: Callable, compute: Compute) -> jax.Array:
    """Feed-forward of rows sorted by expert: down(activation(gate(x)) * up(x)), or down(activation(up(x))). [n, D] float32.

    Rows beyond the sum of sizes belong to no expert and their results are meaningless; if these rows and their cotangents are
    zero, they add nothing to any gradient.
    """
    into = lambda w_EDF: checkpoint_name(_product_of_groups(compute, x_nD, w_EDF, sizes_E), keep.MLP_HIDDEN)
    hidden_nF = activation(into(up_EDF)) if gate_EDF is None else activation(into(gate_EDF)) * into(up_EDF)
    return _product_of_groups(compute, hidden_nF, down_EFD, sizes_E)


def _groups(w: jax.Array | Weight | Adapted) -> int:
    """Number of experts in a stack of matrices."""
    return w.values[0].shape[-3] if isinstance(w, Weight) else w.shape[0]


def _product_of_groups(compute: Compute, x_nD, w_EDF: jax.Array | Weight | Adapted, sizes_E):
    """grouped_product, plus an adapter's change."""
    if not isinstance(w_EDF, Adapted):
        return grouped_product(compute, x_nD, w_EDF, sizes_E)
    x_nr = grouped_product(compute, x_nD, w_EDF.A, sizes_E)
    return grouped_product(compute, x_nD, w_EDF.base, sizes_E) + w_EDF.scale * grouped_product(compute, x_nr, w_EDF.B, sizes_E)


@jax.custom_vjp
def permuted(x_nD, order_n, inverse_n):
    """x_nD[order_n], whose gradient is a gather too, where autodiff would scatter."""
    return x_nD[order_n]


permuted.defvjp(lambda x, order, inverse: (x[order], inverse), lambda inverse, g: (g[inverse], None, None))


# ---------------------------------------------------------------- grouped products


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_product(compute: Compute, x_nD: jax.Array, w_EDF: jax.Array | Weight, sizes_E: jax.Array) -> jax.Array:
    """Row i times the matrix of its group: the first sizes[0] rows belong to group 0, and so on. [n, F] float32.

    Operands, including the gradient's, are rounded to compute.dtype. sizes sum to at most n: see `feed_forward`. A Weight, whose
    arrays lead with the groups, has its own precision and no gradient.
    """
    if isinstance(w_EDF, Weight):
        return _weight_product(compute, x_nD, w_EDF, sizes_E)
    return _product(compute, x_nD.astype(compute.operand), w_EDF.astype(compute.operand), sizes_E)


def _forward(compute, x_nD, w_EDF, sizes_E):
    x_nD, w_EDF = x_nD.astype(compute.operand), w_EDF.astype(compute.operand)
    return _product(compute, x_nD, w_EDF, sizes_E), (x_nD, w_EDF, sizes_E)


def _backward(compute, operands, g_nF):
    x_nD, w_EDF, sizes_E = operands
    g_nF = g_nF.astype(compute.operand)
    return _product(compute, g_nF, w_EDF.swapaxes(1, 2), sizes_E), _outer(compute, x_nD, g_nF, sizes_E), None


grouped_product.defvjp(_forward, _backward)


def _product(compute, x_nD, w_EDF, sizes_E):
    if compute.platform != "cpu":
        exact = precision(x_nD.dtype)
        return ragged_dot(x_nD, w_EDF, sizes_E, preferred_element_type=jnp.float32, precision=exact)
    return _by_blocks(lambda rows, owner: jnp.dot(rows, w_EDF[owner], preferred_element_type=jnp.float32), x_nD, sizes_E)


def _weight_product(compute, x_nD, w: Weight, sizes_E):
    experts = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[-2:]), w)  # [E, O, ...]: drops a layers axis of size 1
    if compute.platform == "cpu":
        expert = lambda owner: jax.tree.map(lambda leaf: leaf[owner], experts)
        return _by_blocks(lambda rows, owner: weight_product(rows, expert(owner), compute), x_nD, sizes_E)
    w_EOD = jax.vmap(dense)(experts)[:, : math.prod(w.outputs), : x_nD.shape[1]]
    x_nD, w_EDO = x_nD.astype(compute.operand), w_EOD.swapaxes(1, 2).astype(compute.operand)
    return _product(compute, x_nD, w_EDO, sizes_E)


def _by_blocks(product: Callable, x_nD, sizes_E):
    """product(rows, group) of each block, joined in the order of x_nD."""
    slot_n, owner_b, size = _blocks(len(x_nD), sizes_E)
    y_bsO = jax.lax.map(lambda block: product(*block), (_in_blocks(x_nD, slot_n, owner_b, size), owner_b))
    return y_bsO.reshape(-1, y_bsO.shape[-1])[slot_n]


def _outer(compute, x_nD, g_nF, sizes_E):
    """Each group's sum of its rows' outer products, [E, D, F]: the gradient of the weights."""
    if compute.platform != "cpu":
        sum_over_rows = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
        exact = precision(x_nD.dtype)
        return ragged_dot_general(x_nD, g_nF, sizes_E, sum_over_rows, preferred_element_type=jnp.float32, precision=exact)
    slot_n, owner_b, size = _blocks(len(x_nD), sizes_E)

    def add(sum_EDF, block):
        x, g, owner = block
        return sum_EDF.at[owner].add(jnp.dot(x.T, g, preferred_element_type=jnp.float32)), None

    zero_EDF = jnp.zeros((len(sizes_E), x_nD.shape[1], g_nF.shape[1]), jnp.float32)
    x, g = (_in_blocks(rows, slot_n, owner_b, size) for rows in (x_nD, g_nF))
    return jax.lax.scan(add, zero_EDF, (x, g, owner_b))[0]


def _blocks(n: int, sizes_E):
    """(each row's slot, each block's group, rows per block), every group starting a new block.

    On CPU ragged_dot multiplies all rows with all matrices (jaxlib 0.10); blocks of one group are plain products. Few rows, such
    as those of one generated token, become blocks of their own, which read only their experts' matrices.
    """
    E = len(sizes_E)
    size = 1 if n <= E else min(128, max(8, n // (2 * E)))
    used_E = -(-sizes_E // size)
    most = min(n, E)  # number of groups with rows, whose last block may be partly empty
    owner_b = jnp.repeat(jnp.arange(E), used_E, total_repeat_length=(n - most) // size + most)
    group_n = jnp.repeat(jnp.arange(E), sizes_E, total_repeat_length=n)
    first_E = jnp.cumsum(used_E) - used_E
    start_E = jnp.cumsum(sizes_E) - sizes_E
    return first_E[group_n] * size + jnp.arange(n) - start_E[group_n], owner_b, size


def _in_blocks(x_nD, slot_n, owner_b, size):
    x = jnp.zeros((len(owner_b) * size, x_nD.shape[1]), x_nD.dtype).at[slot_n].set(x_nD, unique_indices=True)
    return x.reshape(len(owner_b), size, -1)
