"""The training step: (state, batch) -> (state, metrics), and K of them as one compiled call.

K steps per dispatch, A micro-batches per step, B rows, T positions
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt4o_jax import parallel
from gpt4o_jax.config import RunConfig, TrainConfig
from gpt4o_jax.data.batches import Batch
from gpt4o_jax.length import micro_batches
from gpt4o_jax.model import lora, moe
from gpt4o_jax.model.gpt import GPT
from gpt4o_jax.model.vocabulary import head_losses
from gpt4o_jax.ops.sums import global_norm
from gpt4o_jax.parallel import context
from gpt4o_jax.training.schedules import schedule_factor
from gpt4o_jax.training.state import TrainState


def loss_sum(
    model: GPT,
    params,
    batch: Batch,
    loss_chunk: int,
    key=None,
    z_loss: float = 0.0,
    mtp_weight: float = 0.0,
    balance_loss: float = 0.0,
    router_z_loss: float = 0.0,
):
    """The training loss of a batch [B, T], summed over its weighted targets. Returns (total, parts); differentiate total.

    key: enables dropout. loss_chunk: positions of a row whose logits exist at once. The other arguments are coefficients.
    parts: "loss", the negative log-likelihood in nats; "z_loss" if its coefficient is not 0; "mtp_loss", the mean over the
    multi-token prediction heads, if there are any and their weight is not 0; for mixtures of experts "balance_loss" and
    "router_z_loss", means over tokens times the sum of weights, and "load" (model/moe.py).
    """
    heads = model.config.mtp_heads if mtp_weight else 0
    train = key is not None and model.config.dropout > 0
    hidden_BTD, _, aux = model.apply(
        {"params": params},
        batch.tokens,
        batch.positions,
        batch.segments,
        train=train,
        ahead=heads > 0,
        in_order=False,
        rngs={"dropout": key} if train else {},
    )
    head = functools.partial(head_losses, model.config, model.compute, params, chunk=loss_chunk, z_loss=z_loss)
    sums = head(hidden_BTD, context.zigzag(batch.targets), context.zigzag(batch.weights))
    total, parts = sums.total, {"loss": sums.nll} | ({"z_loss": sums.z_loss} if z_loss else {})
    for k in range(1, heads + 1):
        later = head(aux["ahead_nBTD"][k - 1], *map(context.zigzag, targets_ahead(batch, k)))
        total += mtp_weight / heads * later.total
        parts["mtp_loss"] = parts.get("mtp_loss", 0.0) + later.nll / heads
    if "routings" in aux:
        more, of_experts = expert_losses(aux["routings"], batch, balance_loss, router_z_loss)
        total, parts = total + more, parts | of_experts
    return total, parts


def expert_losses(routings: dict, batch: Batch, balance_loss: float, router_z_loss: float):
    """The auxiliary losses of mixtures of experts: (their weighted sum, parts), as in `loss_sum`."""
    balance, router_z = (jnp.sum(batch.weights) * loss for loss in moe.losses(routings))
    parts = {"balance_loss": balance, "router_z_loss": router_z, "load": moe.load(routings)}
    return balance_loss * balance + router_z_loss * router_z, parts


def next_token(model: GPT, params, batch: Batch, t: TrainConfig, key=None):
    """`loss_sum` with the coefficients of the config: the objective of pretraining and supervised fine-tuning."""
    extra = dict(z_loss=t.z_loss, mtp_weight=t.mtp_weight, balance_loss=t.balance_loss, router_z_loss=t.router_z_loss)
    return loss_sum(model, params, batch, t.loss_chunk, key, **extra)


def targets_ahead(batch: Batch, k: int):
    """(targets, weights) [B, T] of the k-th multi-token prediction head: shifted by k positions, within the document."""
    later = lambda x: jnp.pad(x[:, k:], [(0, 0), (0, k)])
    return later(batch.targets), later(batch.weights) * (later(batch.segments) == batch.segments)


def gradients(
    model: GPT,
    params,
    batch: Batch,
    config: RunConfig,
    key: jax.Array,
    count: jax.Array | None = None,
    base: dict | None = None,
    loss: Callable = next_token,
):
    """Loss and gradient, accumulated over train.accumulate micro-batches.

    Returns (parts of the loss as means per weighted target, and "load" in tokens; gradient of the total loss; sum of weights).
    Weights are first divided by their sum over the whole batch, so that each token counts equally however the micro-batches are
    padded, and the accumulated gradient needs no rescaling.

    count: compute only the first `count` micro-batches; the rows of the others must be empty (batch-size warm-up).
    base: frozen weights, if params are LoRA adapters. loss: see training/objective.py.
    """
    A = config.train.accumulate
    weight = jnp.sum(batch.weights)
    batch = dataclasses.replace(batch, weights=batch.weights / jnp.maximum(weight, 1))
    # Row i goes to micro-batch i % A, so that every micro-batch has rows from every data shard.
    micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, A, *x.shape[1:]), 1, 0), batch)
    whole = lambda p: lora.beside(base, p, config.lora.scale)
    grad = jax.grad(lambda p, b, k: loss(model, whole(p), b, config.train, k), has_aux=True)

    def add(carry, xs):
        index, part = xs
        part = jax.tree.map(lambda x: parallel.constrain(x, "batch", "seq"), part)
        new = grad(params, part, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, carry, new), None

    if A == 1:
        grads, parts = grad(params, batch, key)
    else:
        first = jax.tree.map(lambda x: x[0], micro)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad, params, first, key))
        if count is None:
            (grads, parts), _ = jax.lax.scan(add, zero, (jnp.arange(A), micro))
        else:
            at = lambda i: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), micro)
            grads, parts = jax.lax.fori_loop(0, count, lambda i, carry: add(carry, (i, at(i)))[0], zero)
    return parts, grads, weight


def advance(
    optimizer: optax.GradientTransformationExtraArgs,
    config: RunConfig,
    state: TrainState,
    grads: dict,
    finite: jax.Array,
    lr_factor: jax.Array,
    load: jax.Array | None,
):
    """The state after a step with these gradients, and the norm of the update to the weights.

    finite: whether the loss and all gradients are. If not, only the counters change, and the data moves on. lr_factor: of the
    learning-rate schedule. load: tokens of each expert, by which router biases are balanced.
    """

    def apply(params, updates):
        new = optax.apply_updates(params, updates)
        balancing = config.model.router_bias and load is not None and state.base is None
        return moe.rebalanced(new, params, load, config.train.router_bias_rate) if balancing else new

    # lax.cond rather than jnp.where: XLA then updates parameters and optimizer state in place, without copies.
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    update = lambda grads, opt_state: optimizer.update(grads, opt_state, state.params, lr_factor=lr_factor)
    old_opt_state = state.opt_state
    if config.optimizer.offload:
        old_opt_state = jax.device_put(old_opt_state, jax.memory.Space.Device)
    updates, opt_state = jax.lax.cond(finite, update, lambda grads, old: (zeros(grads), old), grads, old_opt_state)
    if config.optimizer.offload:
        lies = jax.tree.map(lambda old: jax.typeof(old).memory_space, state.opt_state)
        opt_state = jax.tree.map(jax.device_put, opt_state, lies)
    update_norm = global_norm(updates)
    params = jax.lax.cond(finite, apply, lambda p, u: p, state.params, updates)
    ema = state.ema
    if ema is not None:
        decay = config.optimizer.ema_decay
        ema = jax.tree.map(lambda e, p: jnp.where(finite, e * decay + p * (1 - decay), e), ema, params)
    skipped = jnp.where(finite, 0, 1)
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        ema=ema,
        rng=state.rng,
        skipped_steps=state.skipped_steps + skipped,
        skipped_in_a_row=(state.skipped_in_a_row + skipped) * skipped,
        base=state.base,
    )
    return new_state, update_norm


def make_step(
    model: GPT,
    optimizer: optax.GradientTransformationExtraArgs,
    config: RunConfig,
    total_steps: int,
    byte_lengths: np.ndarray,
    loss: Callable = next_token,
):
    """Returns the function that training compiles: (state, Batch [K, B, T]) -> (state, metrics), each metric of shape [K].

    total_steps: length of the learning-rate schedule. byte_lengths [V]: bytes of each token, for bits per byte.
    """
    bytes_V = np.asarray(byte_lengths, np.float32)

    def one_step(state: TrainState, batch: Batch):
        count = micro_batches(config.train, state.step) if config.train.batch_warmup_steps else None
        key = jax.random.fold_in(state.rng, state.step)
        losses, grads, weight = gradients(model, state.params, batch, config, key, count, state.base, loss)
        grad_norm = global_norm(grads)
        finite = jnp.isfinite(losses["loss"]) & jnp.isfinite(grad_norm)
        factor = schedule_factor(config.optimizer, total_steps, state.step)
        load = losses.pop("load", None)
        new_state, update_norm = advance(optimizer, config, state, grads, finite, factor, load)
        metrics = {
            **losses,
            **({} if load is None else moe.load_metrics(load)),
            "weight": weight,
            "bytes": jnp.sum(jnp.asarray(bytes_V)[batch.targets] * batch.weights),
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "lr_factor": factor,
            "skipped_steps": new_state.skipped_steps,
            "skipped_in_a_row": new_state.skipped_in_a_row,
        }
        return new_state, metrics

    return lambda state, batches: jax.lax.scan(one_step, state, batches)
