"""Optimizers over a parameter tree whose axes have names.

`make_optimizer` gives an optax transformation that keeps no schedule: the training step hands
it `schedule_factor` of the run's own step counter, so that the learning rate also follows
skipped steps.
"""

import jax
import jax.numpy as jnp
import optax

from gpt4o_jax.config import OptimizerConfig
from gpt4o_jax.model.matrices import hidden_matrix, is_names
from gpt4o_jax.ops.sums import global_norm
from gpt4o_jax.training.adafactor import factored_direction
from gpt4o_jax.training.muon import scale_by_muon


def make_optimizer(
    config: OptimizerConfig, axes, dtype=jnp.float32, width_ratio: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Clipping by the global norm, then what config.name says.

    axes: tree of the parameters' logical axis names (model.gpt.logical_axes). dtype: operands of Muon's products.
    width_ratio: muP's base width / width. Adam's learning rate of hidden matrices is multiplied by it (arXiv:2203.03466,
    Table 8), and so is that of the others whose updates are as large as Adam's, entry by entry: Lion, Adafactor.
    Weight decay is not, so that its strength does not depend on the width (arXiv:2407.17465). Muon's needs no factor:
    its updates have a spectral norm of sqrt(fan-out / fan-in) up to a constant, which is what feature learning asks for
    at any width (arXiv:2310.17813), as long as the matrices keep their proportions.
    update(grads, state, params, lr_factor=f) multiplies the learning rate of that one step by f.
    """
    clip = _clip(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, OPTIMIZERS[config.name](config, axes, dtype, width_ratio))


def _clip(most: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm as one factor, which costs no pass over the gradient of its own."""

    def update(grads, state, params=None):
        factor = jnp.minimum(1.0, most / jnp.maximum(global_norm(grads), jnp.finfo(jnp.float32).tiny))
        return jax.tree.map(lambda g: g * factor, grads), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def eval_params(config: OptimizerConfig, state):
    """The weights of a TrainState that are for use: averaged ones where the run keeps an average."""
    if config.name == "schedule_free":
        return _schedule_free_average(state.opt_state[-1], state.params)
    return state.params if state.ema is None else state.ema


# ---------------------------------------------------------------- (config, axes, dtype, width_ratio) -> transformation


def _adamw(config, axes, dtype, width_ratio):
    direction = scale_by_adam(config.b1, config.b2, config.eps, jnp.dtype(config.moment_dtype))
    return optax.chain(direction, _decay(config, axes, width_ratio), optax.scale(-config.peak_lr), _scale_by_factor())


def scale_by_adam(b1: float, b2: float, eps: float, dtype=jnp.float32) -> optax.GradientTransformation:
    """optax.scale_by_adam (arXiv:1412.6980), with the moments written, in this type, before they are read.

    Without the barrier XLA reads the old moments twice, and has to copy all of them first to keep them.
    """

    def init(params):
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros_like(p, dtype), params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(grads, state, params=None):
        mu = jax.tree.map(lambda m, g: (b1 * _wide(m) + (1 - b1) * g).astype(dtype), state.mu, grads)
        nu = jax.tree.map(lambda v, g: (b2 * _wide(v) + (1 - b2) * g * g).astype(dtype), state.nu, grads)
        mu, nu = jax.lax.optimization_barrier((mu, nu))
        count = optax.safe_increment(state.count)
        c1, c2 = 1 - b1**count, 1 - b2**count
        updates = jax.tree.map(lambda m, v: (_wide(m) / c1) / (jnp.sqrt(_wide(v) / c2) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _wide(moment):
    return moment.astype(jnp.float32)


def _kept_in(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, which computes in float32, with the moments in its state kept in another type."""

    def to(dtype, state):
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(grads, state, params=None):
        updates, state = inner.update(grads, to(jnp.float32, state), params)
        return updates, to(dtype, state)

    return optax.GradientTransformation(lambda params: to(dtype, inner.init(params)), update)


def _lion(config, axes, dtype, width_ratio):
    """The sign of a momentum (arXiv:2302.06675): of AdamW's state only one moment."""
    direction = _kept_in(config.moment_dtype, optax.scale_by_lion(config.b1, config.b2))
    return optax.chain(direction, _decay(config, axes, width_ratio), optax.scale(-config.peak_lr), _scale_by_factor())


def _adafactor(config, axes, dtype, width_ratio):
    """Second moments as row and column means (arXiv:1804.04235), updates not scaled by the size of the weights.

    As in Scaling Vision Transformers (arXiv:2106.04560, 3.4), a learning rate then means what AdamW's does, and a
    matrix that starts at zero grows.
    """
    direction = factored_direction(axes)
    momentum = optax.ema(config.b1, debias=False) if config.b1 else optax.identity()
    return optax.chain(direction, momentum, _decay(config, axes, width_ratio), optax.scale(-config.peak_lr), _scale_by_factor())


def _schedule_free(config, axes, dtype, width_ratio):
    """AdamW without momentum, and an average in its place that makes a decaying learning rate unnecessary (arXiv:2405.15682).

    The parameters are the points where gradients are taken; `eval_params` gives the average.
    """

    def at(learning_rate):
        direction = optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False, bias_correction=True)
        base = optax.chain(direction, _decay(config, axes, width_ratio), optax.scale(-learning_rate))
        return optax.contrib.schedule_free(base, learning_rate, config.b1)

    def update(grads, state, params=None, *, lr_factor=1.0, **_):
        # The learning rate also weighs the average, so it cannot be multiplied into the updates afterwards.
        return at(config.peak_lr * lr_factor).update(grads, state, params)

    return optax.GradientTransformationExtraArgs(at(config.peak_lr).init, update)


_schedule_free_average = jax.jit(optax.contrib.schedule_free_eval_params)


def _muon(config, axes, dtype, width_ratio):
    """Muon for hidden matrices, AdamW for the rest."""
    matrices = jax.tree.map(lambda names: hidden_matrix(names) or optax.MaskedNode(), axes, is_leaf=is_names)
    muon = optax.chain(
        _kept_in(config.moment_dtype, scale_by_muon(config.muon_momentum, matrices, dtype)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale(-config.muon_lr),
        _scale_by_factor(),
    )
    return optax.partition({"muon": muon, "adamw": _adamw(config, axes, dtype, 1.0)}, optimizer_labels(axes))


OPTIMIZERS = {"adamw": _adamw, "muon": _muon, "lion": _lion, "adafactor": _adafactor, "schedule_free": _schedule_free}


def _decay(config, axes, width_ratio):
    """muP's factor of hidden matrices, then weight decay."""
    decay = optax.add_decayed_weights(config.weight_decay, decay_mask(config, axes))
    if width_ratio == 1.0:
        return decay
    factors = jax.tree.map(lambda names: width_ratio if hidden_matrix(names) else 1.0, axes, is_leaf=is_names)
    return optax.chain(optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors)), decay)


def _scale_by_factor() -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, *, lr_factor=1.0, **_):
        return jax.tree.map(lambda u: u * lr_factor, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


# ---------------------------------------------------------------- which weight is what, by the names of its axes


def optimizer_labels(axes):
    """'muon' for hidden matrices, 'adamw' for embeddings, head, norms and biases; a tree like the parameters."""
    return jax.tree.map(lambda names: "muon" if hidden_matrix(names) else "adamw", axes, is_leaf=is_names)


def decay_mask(config: OptimizerConfig, axes):
    """True where weight decay applies."""

    def decays(names):
        matrix = hidden_matrix(names) is not None
        table = bool({"vocab", "position"} & set(names))
        return {"hidden": matrix, "matrices": matrix or table, "all": True}[config.decay_mask]

    return jax.tree.map(decays, axes, is_leaf=is_names)
