"""Adafactor's update direction per matrix: optax's arithmetic, applied to each layer of a stacked weight.

Source: Shazeer and Stern 2018, arXiv:1804.04235.
"""

import math

import jax
import optax

from gpt4o_jax.model.matrices import STACKED, hidden_matrix, is_names

MIN_WIDTH = 128  # of both sides of a matrix whose second moment is factored; optax's default
CLIP_RMS = 1.0  # of one matrix's update; d in the paper


def factored_direction(axes) -> optax.GradientTransformation:
    """Gradients over the root of their factored second moment, with a root-mean-square of at most CLIP_RMS per weight.

    axes: tree of the parameters' logical axis names. A hidden matrix of several heads counts as the one matrix of its product,
    and each layer of a stacked weight separately. State: row and column means for every matrix with both sides at least
    MIN_WIDTH, else a second moment of the parameter's own shape.
    """
    one = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=MIN_WIDTH, decay_rate=0.8, epsilon=1e-30),
        optax.clip_by_block_rms(CLIP_RMS),
    )
    stacked = optax.GradientTransformation(jax.vmap(one.init), jax.vmap(one.update))

    def as_matrices(params):
        return jax.tree.map(lambda names, x: _as_matrix(names, x), axes, params, is_leaf=is_names)

    def by_depth(matrices):
        """Grouped for jax.vmap, which needs equal depths: extra heads, experts and an unfinished period differ."""
        label = lambda names, x: f"stacked_{x.shape[0]}" if set(STACKED) & set(names) else "single"
        labels = jax.tree.map(label, axes, matrices, is_leaf=is_names)
        groups = {name: one if name == "single" else stacked for name in jax.tree.leaves(labels)}
        return optax.partition(groups, labels)

    def init(params):
        matrices = as_matrices(params)
        return by_depth(matrices).init(matrices)

    def update(grads, state, params):
        matrices = as_matrices(params)
        updates, state = by_depth(matrices).update(as_matrices(grads), state, matrices)
        return jax.tree.map(lambda u, g: u.reshape(g.shape), updates, grads), state

    return optax.GradientTransformation(init, update)


def _as_matrix(names, x: jax.Array) -> jax.Array:
    """[stacked, rows, columns] if it is to be factored, else x."""
    matrix = hidden_matrix(names)
    if matrix is None:
        return x
    rows, columns = (math.prod(x.shape[i] for i in part) for part in matrix)
    return x.reshape(-1, rows, columns) if min(rows, columns) >= MIN_WIDTH else x
