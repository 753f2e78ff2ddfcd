"""Optimizers over a parameter tree with named axes.

`make_optimizer` returns an optax transformation without a schedule of its own: the training step passes it `schedule_factor` of
the run's step counter, so that the schedule also advances over skipped steps.
"""

import jax
import jax.numpy as jnp
import optax

from gpt4o_jax.config import OptimizerConfig
from gpt4o_jax.model.matrices import grows, hidden_matrix, is_names
from gpt4o_jax.ops.sums import global_norm
from gpt4o_jax.training.adafactor import factored_direction
from gpt4o_jax.training.muon import scale_by_muon


def make_optimizer(
    config: OptimizerConfig, axes, dtype=jnp.float32, width_ratio: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Global-norm clipping, then the optimizer config.name.

    axes: tree of the parameters' logical axis names (model.gpt.logical_axes). dtype: operands of Muon's products.
    width_ratio: muP's base width / width. It multiplies the learning rate of hidden matrices whose fan-in grows with the width
    for Adam (arXiv:2203.03466, Table 8), and for Lion and Adafactor, whose updates are of the same size per entry. Weight decay
    is not multiplied, so that its strength does not depend on the width (arXiv:2407.17465). At any width, feature learning
    requires updates of a spectral norm of sqrt(fan-out / fan-in) up to a constant (arXiv:2310.17813). Muon's have that, except
    that it counts no fan-out below the fan-in: where only the fan-in grows (routers, adapters' A), the square root of
    width_ratio makes up for it.
    update(grads, state, params, lr_factor=f) multiplies the learning rate of that step by f.
    """
    clip = _clip(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, OPTIMIZERS[config.name](config, axes, dtype, width_ratio))


def _clip(most: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm as a single factor, which XLA fuses into the optimizer's pass over the gradient."""

    def update(grads, state, params=None):
        factor = jnp.minimum(1.0, most / jnp.maximum(global_norm(grads), jnp.finfo(jnp.float32).tiny))
        return jax.tree.map(lambda g: g * factor, grads), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def eval_params(config: OptimizerConfig, state):
    """The weights of a TrainState to evaluate and sample with: the average, if the run keeps one, else the parameters."""
    if config.name == "schedule_free":
        return _schedule_free_average(state.opt_state[-1], state.params)
    return state.params if state.ema is None else state.ema


# ---------------------------------------------------------------- (config, axes, dtype, width_ratio) -> transformation


def _adamw(config, axes, dtype, width_ratio):
    direction = scale_by_adam(config.b1, config.b2, config.eps, jnp.dtype(config.moment_dtype))
    return optax.chain(direction, _decay(config, axes, width_ratio), optax.scale(-config.peak_lr), _scale_by_factor())


def scale_by_adam(b1: float, b2: float, eps: float, dtype=jnp.float32) -> optax.GradientTransformation:
    """optax.scale_by_adam (arXiv:1412.6980) with moments in `dtype`, updated in place.

    The barrier makes XLA write the new moments before it reads them; without it, XLA copies the old ones first.
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
    """`inner`, computed in float32, with the floating-point leaves of its state stored as `dtype`."""

    def to(dtype, state):
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(grads, state, params=None):
        updates, state = inner.update(grads, to(jnp.float32, state), params)
        return updates, to(dtype, state)

    return optax.GradientTransformation(lambda params: to(dtype, inner.init(params)), update)


def _lion(config, axes, dtype, width_ratio):
    """Lion (arXiv:2302.06675): the sign of a momentum; keeps one moment where AdamW keeps two."""
    direction = _kept_in(config.moment_dtype, optax.scale_by_lion(config.b1, config.b2))
    return optax.chain(direction, _decay(config, axes, width_ratio), optax.scale(-config.peak_lr), _scale_by_factor())


def _adafactor(config, axes, dtype, width_ratio):
    """Adafactor (arXiv:1804.04235): second moments as row and column means, without parameter scaling of the updates.

    As in Scaling Vision Transformers (arXiv:2106.04560, section 3.4): learning rates are then comparable to AdamW's, and
    zero-initialised matrices can grow.
    """
    direction = factored_direction(axes)
    momentum = optax.ema(config.b1, debias=False) if config.b1 else optax.identity()
    return optax.chain(direction, momentum, _decay(config, axes, width_ratio), optax.scale(-config.peak_lr), _scale_by_factor())


def _schedule_free(config, axes, dtype, width_ratio):
    """Schedule-Free AdamW (arXiv:2405.15682): iterate averaging instead of momentum and learning-rate decay.

    The parameters are the points where gradients are taken; `eval_params` returns the average.
    """

    def at(learning_rate):
        direction = optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False, bias_correction=True)
        base = optax.chain(direction, _decay(config, axes, width_ratio), optax.scale(-learning_rate))
        return optax.contrib.schedule_free(base, learning_rate, config.b1)

    def update(grads, state, params=None, *, lr_factor=1.0, **_):
        # The learning rate also weights the average, so it cannot be applied to the updates afterwards.
        return at(config.peak_lr * lr_factor).update(grads, state, params)

    return optax.GradientTransformationExtraArgs(at(config.peak_lr).init, update)


@jax.jit
def _schedule_free_average(state, params):
    state = jax.device_put(state, jax.memory.Space.Device)  # optimizer.offload keeps it elsewhere
    return optax.contrib.schedule_free_eval_params(state, params)


def _muon(config, axes, dtype, width_ratio):
    """Muon for hidden matrices, AdamW for the rest."""
    matrices = jax.tree.map(lambda names: names if hidden_matrix(names) else optax.MaskedNode(), axes, is_leaf=is_names)
    decay = optax.add_decayed_weights(config.weight_decay)
    muon = optax.chain(
        _kept_in(config.moment_dtype, scale_by_muon(config.muon_momentum, matrices, dtype)),
        _times(width_ratio**0.5, lambda names: grows(names) == (True, False), matrices, decay),
        optax.scale(-config.muon_lr),
        _scale_by_factor(),
    )
    return optax.partition({"muon": muon, "adamw": _adamw(config, axes, dtype, 1.0)}, optimizer_labels(axes))


OPTIMIZERS = {"adamw": _adamw, "muon": _muon, "lion": _lion, "adafactor": _adafactor, "schedule_free": _schedule_free}


def _decay(config, axes, width_ratio):
    """muP's learning-rate factor, then weight decay."""
    decay = optax.add_decayed_weights(config.weight_decay, decay_mask(config, axes))
    return _times(width_ratio, lambda names: grows(names)[0], axes, decay)


def _times(factor: float, applies, axes, decay: optax.GradientTransformation) -> optax.GradientTransformation:
    """`decay`, after the updates of the weights for whose axis names applies() is true are multiplied by `factor`."""
    if factor == 1.0:
        return decay
    factor_of = lambda names: names if isinstance(names, optax.MaskedNode) else factor if applies(names) else 1.0
    factors = jax.tree.map(factor_of, axes, is_leaf=is_names)
    return optax.chain(optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors)), decay)


def _scale_by_factor() -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, *, lr_factor=1.0, **_):
        return jax.tree.map(lambda u: u * lr_factor, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


# ---------------------------------------------------------------- groups of parameters, by their axis names


def optimizer_labels(axes):
    """Tree like the parameters: "muon" for hidden matrices, "adamw" for embeddings, head, norms and biases."""
    return jax.tree.map(lambda names: "muon" if hidden_matrix(names) else "adamw", axes, is_leaf=is_names)


def decay_mask(config: OptimizerConfig, axes):
    """Tree like the parameters: True where weight decay applies."""

    def decays(names):
        matrix = hidden_matrix(names) is not None
        table = bool({"vocab", "position"} & set(names))
        return {"hidden": matrix, "matrices": matrix or table, "all": True}[config.decay_mask]

    return jax.tree.map(decays, axes, is_leaf=is_names)
