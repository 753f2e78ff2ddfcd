"""The training program of a config on a mesh: model, optimizer, state and the compiled step.

The training loop runs it, `benchmark train` times it, and `plan` compiles it for devices that are not present.

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
    """Built by `build`. Its methods must be called with the mesh set (jax.set_mesh)."""

    config: RunConfig
    mesh: jax.sharding.Mesh
    model: gpt.GPT
    attention: str  # the attention implementation that was chosen
    order: Schedule  # of the pipeline stages
    optimizer: optax.GradientTransformation
    shapes: TrainState
    shardings: TrainState
    batch_sharding: jax.sharding.NamedSharding
    objective: Objective

    def fresh(self, key: jax.Array) -> TrainState:
        """A randomly initialised state, created already sharded."""
        return jax.jit(self._create, out_shardings=self.shardings)(key)

    def lower(self, last_step: int, byte_lengths: np.ndarray) -> jax.stages.Lowered:
        """The lowered step over K batches: (state, Batch [K, B, T]) -> (state, metrics [K] each). The state is donated."""
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
        """Compiles `lower`'s result; on Linux, then returns the compiler's freed memory to the system (0.5 GB for 12 layers)."""
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
    """Builds the Program of a config, which must have model.vocab_size and compute_dtype resolved, on a mesh.

    Raises RunError if the requested attention implementation does not support the model, or sizes do not divide over the mesh.
    """
    m = config.model
    # Windows count as one document for attention, which is faster: cuDNN would need a mask in memory for documents.
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
        shapes = jax.eval_shape(lambda: program._create(jax.random.key(0)))  # no arrays: the devices may not be present
        shardings = state_shardings(shapes, axes, mesh, config.optimizer.offload, base)
    return dataclasses.replace(program, shapes=shapes, shardings=shardings)


def _check_memory(config: RunConfig, device) -> None:
    """Raises RunError if the config offloads to host memory and the device does not support that."""
    offloads = {"model.remat=offload": config.model.remat == "offload", "optimizer.offload=true": config.optimizer.offload}
    wanted = [knob for knob, on in offloads.items() if on]
    if wanted and HOST_MEMORY not in (kinds := [memory.kind for memory in device.addressable_memories()]):
        raise RunError(
            f"config.{wanted[0]}: a {device.platform} device here has no {HOST_MEMORY} memory (it has {', '.join(kinds)}); set"
            " optimizer.offload=false, and another model.remat, such as full"
        )
