"""Optimizers over a parameter tree whose axes have names.

`make_optimizer` gives an optax transformation whose updates are complete but for the
schedule: the training step multiplies them by `schedule_factor`, so that the learning rate
follows the run's own step counter, also across skipped steps.
"""

import functools
import math

import jax
import optax

from gpt4o_jax.config import OptimizerConfig
from gpt4o_jax.errors import RunError


def make_optimizer(config: OptimizerConfig, axes) -> optax.GradientTransformation:
    """Clipping, then AdamW, or Muon for hidden matrices and AdamW for the rest.

    axes: tree of the parameters' logical axis names (model.gpt.logical_axes).
    """
    leaves = jax.tree.leaves(axes, is_leaf=_is_names)
    if not leaves:
        raise RunError("the model has no parameters")
    adamw = optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decay_mask(config, axes)),
        optax.scale(-config.peak_lr),
    )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if config.name == "adamw":
        return optax.chain(clip, adamw)
    dimensions = jax.tree.map(muon_dimensions, axes, is_leaf=_is_names)
    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=config.muon_momentum, weight_dimension_numbers=_masked(dimensions)),
        optax.stateless(functools.partial(_scale_by_shape, dimensions=_masked(dimensions))),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale(-config.muon_lr),
    )
    return optax.chain(clip, optax.partition({"muon": muon, "adamw": adamw}, optimizer_labels(axes)))


def optimizer_labels(axes):
    """'muon' for hidden matrices, 'adamw' for embeddings, head, norms and biases; a tree like the parameters."""
    return jax.tree.map(lambda names: "muon" if muon_dimensions(names) else "adamw", axes, is_leaf=_is_names)


def muon_dimensions(names: tuple[str, ...]):
    """Which axes of a weight are its matrix's rows (summed over) and columns; None where it is no hidden matrix.

    A hidden matrix reads from the residual stream ("embed" first) or writes to it ("embed" last).
    """
    axes = [i for i, name in enumerate(names) if name != "layers"]
    if len(axes) < 2 or {"vocab", "position"} & set(names) or "layers" not in names:
        return None
    if names[axes[0]] == "embed":
        return optax.contrib.MuonDimensionNumbers((axes[0],), tuple(axes[1:]))
    if names[axes[-1]] == "embed":
        return optax.contrib.MuonDimensionNumbers(tuple(axes[:-1]), (axes[-1],))
    return None  # a bias of several heads: (heads, head_dim)


def decay_mask(config: OptimizerConfig, axes):
    """True where weight decay applies."""

    def decays(names):
        matrix = muon_dimensions(names) is not None
        table = bool({"vocab", "position"} & set(names))
        return {"hidden": matrix, "matrices": matrix or table, "all": True}[config.decay_mask]

    return jax.tree.map(decays, axes, is_leaf=_is_names)


def _scale_by_shape(updates, params, dimensions):
    """An orthogonal update times sqrt(max(1, columns / rows)): equal root-mean-square change of the output."""

    def scale(update, d):
        rows, columns = (math.prod(update.shape[i] for i in axes) for axes in d)
        return update * max(1.0, columns / rows) ** 0.5

    return jax.tree.map(scale, updates, dimensions)


def _is_names(x) -> bool:
    return isinstance(x, tuple)


def _masked(dimensions):
    """Leaves that are None stand for parameters optax has masked out of this group."""
    is_leaf = lambda d: d is None or isinstance(d, optax.contrib.MuonDimensionNumbers)
    return jax.tree.map(lambda d: optax.MaskedNode() if d is None else d, dimensions, is_leaf=is_leaf)
