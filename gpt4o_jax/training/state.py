"""Everything a run carries from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gpt4o_jax import parallel


@flax.struct.dataclass
class TrainState:
    """A pytree; `step` counts steps done and is the whole position in the data."""

    step: jax.Array  # int32
    params: Any
    opt_state: Any
    ema: Any  # averaged parameters, or None
    rng: jax.Array  # typed key; step s uses fold_in(rng, s)
    skipped_steps: jax.Array  # int32: steps left out because a gradient was not finite
    skipped_in_a_row: jax.Array  # int32
    base: Any = None  # what the params are adapters of (model/lora.py), and no step changes; None: they are all weights


HOST_MEMORY = "pinned_host"  # what JAX calls the memory of a device's host that it copies from and to by itself


def create(init_params, optimizer: optax.GradientTransformation, key: jax.Array, ema: bool) -> TrainState:
    """A fresh state; init_params: key -> parameters. Pure, so jit (or eval_shape) it."""
    init_key, train_key = jax.random.split(key)
    params = init_params(init_key)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        zero, params, optimizer.init(params), jax.tree.map(jnp.copy, params) if ema else None, train_key, zero, zero
    )


def state_shardings(state_shapes: TrainState, axes, mesh: jax.sharding.Mesh, offload: bool = False, base=None) -> TrainState:
    """Shardings of a whole state: optimizer leaves that mirror a parameter lie where it lies, the rest is replicated.

    The rest is scalars, and the rows and columns of means that Adafactor keeps for a matrix: too few numbers to shard.
    offload: the former lie in the memory of the device's host. base: axes of what no step changes, where there is such.
    """
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    by_param = parallel.shardings(axes, mesh)
    mirrored = jax.tree.map(lambda s: s.with_memory_kind(HOST_MEMORY), by_param) if offload else by_param
    opt_state = _like_params(state_shapes.opt_state, state_shapes.params, mirrored, whole)
    ema, below = None if state_shapes.ema is None else by_param, None if base is None else parallel.shardings(base, mesh)
    return TrainState(whole, by_param, opt_state, ema, whole, whole, whole, below)


def _like_params(opt_state, params, by_param, whole):
    """A leaf whose path ends with the path of a parameter of the same shape gets that parameter's sharding."""
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
