"""Optimizers over a parameter tree whose axes have names.

`make_optimizer` gives an optax transformation whose updates are complete but for the
schedule: the training step multiplies them by `schedule_factor`, so that the learning rate
follows the run's own step counter, also across skipped steps.
"""

import jax
import jax.numpy as jnp
import optax

from gpt4o_jax.config import OptimizerConfig
from gpt4o_jax.training.muon import Matrix, scale_by_muon


def make_optimizer(config: OptimizerConfig, axes, dtype=jnp.float32) -> optax.GradientTransformation:
    """Clipping, then AdamW, or Muon for hidden matrices and AdamW for the rest.

    axes: tree of the parameters' logical axis names (model.gpt.logical_axes). dtype: operands of Muon's products.
    """
    adamw = optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decay_mask(config, axes)),
        optax.scale(-config.peak_lr),
    )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if config.name == "adamw":
        return optax.chain(clip, adamw)
    matrices = jax.tree.map(lambda names: muon_matrix(names) or optax.MaskedNode(), axes, is_leaf=_is_names)
    muon = optax.chain(
        scale_by_muon(config.muon_momentum, matrices, dtype),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale(-config.muon_lr),
    )
    return optax.chain(clip, optax.partition({"muon": muon, "adamw": adamw}, optimizer_labels(axes)))


def optimizer_labels(axes):
    """'muon' for hidden matrices, 'adamw' for embeddings, head, norms and biases; a tree like the parameters."""
    return jax.tree.map(lambda names: "muon" if muon_matrix(names) else "adamw", axes, is_leaf=_is_names)


def muon_matrix(names: tuple[str, ...]) -> Matrix | None:
    """Which axes of a weight are its matrix's rows (summed over) and columns; None where it is no hidden matrix.

    A hidden matrix reads from the residual stream ("embed" first) or writes to it ("embed" last).
    """
    axes = [i for i, name in enumerate(names) if name != "layers"]
    if len(axes) < 2 or {"vocab", "position"} & set(names) or "layers" not in names:
        return None
    if names[axes[0]] == "embed":
        return Matrix((axes[0],), tuple(axes[1:]))
    if names[axes[-1]] == "embed":
        return Matrix(tuple(axes[:-1]), (axes[-1],))
    return None  # a bias of several heads: (heads, head_dim)


def decay_mask(config: OptimizerConfig, axes):
    """True where weight decay applies."""

    def decays(names):
        matrix = muon_matrix(names) is not None
        table = bool({"vocab", "position"} & set(names))
        return {"hidden": matrix, "matrices": matrix or table, "all": True}[config.decay_mask]

    return jax.tree.map(decays, axes, is_leaf=_is_names)


def _is_names(x) -> bool:
    return isinstance(x, tuple)
