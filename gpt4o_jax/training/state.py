"""The training state: everything carried from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gpt4o_jax import parallel


@flax.struct.dataclass
class TrainState:
    """A pytree. `step` counts the steps done and alone determines the position in the data."""

    step: jax.Array  # int32
    params: Any
    opt_state: Any
    ema: Any  # averaged parameters, or None
    rng: jax.Array  # typed key; step s uses fold_in(rng, s)
    skipped_steps: jax.Array  # int32: steps skipped because the loss or gradient was not finite
    skipped_in_a_row: jax.Array  # int32
    base: Any = None  # with LoRA (model/lora.py): the frozen weights; params are then the adapters


HOST_MEMORY = "pinned_host"  # JAX's memory kind for host memory that the device can copy from and to


def create(init_params, optimizer: optax.GradientTransformation, key: jax.Array, ema: bool) -> TrainState:
    """A fresh state; init_params: key -> parameters. Pure, so jit (or eval_shape) it."""
    init_key, train_key = jax.random.split(key)
    params = init_params(init_key)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        zero, params, optimizer.init(params), jax.tree.map(jnp.copy, params) if ema else None, train_key, zero, zero
    )


def state_shardings(state_shapes: TrainState, axes, mesh: jax.sharding.Mesh, offload: bool = False, base=None) -> TrainState:
    """Shardings of the whole state: optimizer leaves with the shape of a parameter get its sharding, the rest is replicated.

    The rest are scalars, and Adafactor's row and column means: too small to shard.
    axes: logical axes of the parameters. offload: optimizer leaves that mirror a parameter go to host memory.
    base: logical axes of the frozen weights, with LoRA.
    """
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    by_param = parallel.shardings(axes, mesh)
    mirrored = jax.tree.map(lambda s: s.with_memory_kind(HOST_MEMORY), by_param) if offload else by_param
    opt_state = _like_params(state_shapes.opt_state, state_shapes.params, mirrored, whole)
    ema, below = None if state_shapes.ema is None else by_param, None if base is None else parallel.shardings(base, mesh)
    return TrainState(whole, by_param, opt_state, ema, whole, whole, whole, below)


def _like_params(opt_state, params, by_param, whole):
    """Gives each leaf whose path ends with the path of a parameter of the same shape that parameter's sharding."""
    wanted = {
        jax.tree_util.keystr(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(by_param), strict=True)
    }

    def pick(path, leaf):
        for start in range(len(path)):
            shape, sharding = wanted.get(jax.tree_util.keystr(path[start:]), (None, None))
            if shape == leaf.shape:
                return sharding
        return whole

    return jax.tree_util.tree_map_with_path(pick, opt_state)
