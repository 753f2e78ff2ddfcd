"""The training program of a config on a mesh: model, optimizer, state and the compiled step. What the loop runs,
what `benchmark train` times and what can be compiled for devices that are not here.

K steps per dispatch, B rows, T positions
"""

import ctypes
import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt4o_jax import parallel
from gpt4o_jax.config import RunConfig
from gpt4o_jax.config_rules import validate_sizes
from gpt4o_jax.data.batches import Batch
from gpt4o_jax.errors import RunError
from gpt4o_jax.model import gpt, lora
from gpt4o_jax.model.attention import implementation
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.parallel.pipeline import Schedule, schedule
from gpt4o_jax.training.objective import Objective
from gpt4o_jax.training.optimizer import make_optimizer
from gpt4o_jax.training.state import HOST_MEMORY, TrainState, create, state_shardings
from gpt4o_jax.training.step import make_step


@dataclasses.dataclass(frozen=True)
class Program:
    """Built by `build`. Methods need the mesh in force."""

    config: RunConfig
    mesh: jax.sharding.Mesh
    model: gpt.GPT
    attention: str  # the implementation taken
    order: Schedule  # of the layers' stages
    optimizer: optax.GradientTransformation
    shapes: TrainState
    shardings: TrainState
    batch_sharding: jax.sharding.NamedSharding
    objective: Objective

    def fresh(self, key: jax.Array) -> TrainState:
        """A random state, every leaf born in its shards."""
        return jax.jit(self._create, out_shardings=self.shardings)(key)

    def lower(self, last_step: int, byte_lengths: np.ndarray) -> jax.stages.Lowered:
        """The step over K batches, (state, Batch [K, B, T]) -> (state, metrics [K] each), state donated; `.compile()` it."""
        step = make_step(self.model, self.optimizer, self.config, last_step, byte_lengths, self.objective.loss)
        whole = jax.sharding.NamedSharding(self.mesh, jax.P())
        jitted = jax.jit(
            step,
            in_shardings=(self.shardings, self.batch_sharding),
            out_shardings=(self.shardings, whole),
            donate_argnums=0,
        )
        train = self.config.train
        shape = (train.steps_per_dispatch, train.batch_size, self.config.model.context_length)
        ints, floats = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32))
        return jitted.lower(self.shapes, Batch(ints, ints, floats, ints, ints, dict.fromkeys(self.objective.beside, floats)))

    def compile(self, last_step: int, byte_lengths: np.ndarray) -> jax.stages.Compiled:
        """`lower`, compiled; what the compiler leaves behind (half a gigabyte for 12 layers) is given back where glibc can."""
        compiled = self.lower(last_step, byte_lengths).compile()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
        if trim:
            trim(0)
        return compiled

    def _create(self, key):
        c, init = self.config, functools.partial(gpt.init, self.model)
        if not c.lora.rank:
            return create(init, self.optimizer, key, ema=c.optimizer.ema_decay > 0)
        base = init(key)
        adapters = functools.partial(lora.init, c.lora, gpt.logical_axes(self.model), base)
        return create(adapters, self.optimizer, key, ema=c.optimizer.ema_decay > 0).replace(base=base)


def build(config: RunConfig, mesh: jax.sharding.Mesh, objective: Objective = Objective()) -> Program:
    """config: with model.vocab_size and compute_dtype resolved.

    Raises RunError where attention cannot be had as asked, or something does not divide over the mesh.
    """
    m = config.model
    # Windows are one document to attention, which is faster so: cuDNN would take documents as a mask in memory.
    packed = config.data.rows != "windows" or config.objective.method != "next_token"
    compute = Compute.on(mesh, m.compute_dtype, packed)
    ways = mesh.shape["context"]
    attention = implementation(m, compute, m.context_length, m.dropout > 0, ways) + (f" over context={ways}" if ways > 1 else "")
    validate_sizes(config, dict(mesh.shape))
    _check_memory(config, mesh.devices.flat[0])
    model = gpt.GPT(m, compute, (config.mesh.pipeline_repeats, config.mesh.pipeline_microbatches))
    with jax.set_mesh(mesh):
        base = gpt.logical_axes(model)
        axes, base = (lora.logical_axes(config.lora, base), base) if config.lora.rank else (base, None)
        optimizer = make_optimizer(config.optimizer, axes, compute.operand, m.width_ratio)
        batch_sharding = jax.sharding.NamedSharding(mesh, parallel.spec((None, "batch", "seq")))
        order = schedule(config.train.batch_size // config.train.accumulate, *model.pipeline)
        program = Program(config, mesh, model, attention, order, optimizer, None, None, batch_sharding, objective)
        shapes = jax.eval_shape(lambda: program._create(jax.random.key(0)))  # no array: the devices may not be here
        shardings = state_shardings(shapes, axes, mesh, config.optimizer.offload, base)
    return dataclasses.replace(program, shapes=shapes, shardings=shardings)


def _check_memory(config: RunConfig, device) -> None:
    """Raises RunError where something is to lie in the host's memory, and the device has no way to it."""
    offloads = {"model.remat=offload": config.model.remat == "offload", "optimizer.offload=true": config.optimizer.offload}
    wanted = [knob for knob, on in offloads.items() if on]
    if wanted and HOST_MEMORY not in (kinds := [memory.kind for memory in device.addressable_memories()]):
        raise RunError(
            f"config.{wanted[0]}: a {device.platform} device here has no {HOST_MEMORY} memory (it has {', '.join(kinds)}); set"
            " optimizer.offload=false, and another model.remat, such as full"
        )
