"""The device mesh: one, always, also on one device."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from gpt4o_jax.config import MeshConfig
from gpt4o_jax.errors import RunError

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig = MeshConfig(), devices=None) -> Mesh:
    """A mesh over `devices` (default: all), sizes from `config`, -1 filled. Enter it with jax.set_mesh.

    Raises RunError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    given = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % given == 0:
        sizes[sizes.index(-1)] = len(devices) // given
    if math.prod(sizes) != len(devices):
        shape = ", ".join(f"{a}={getattr(config, a)}" for a in AXES)
        raise RunError(
            f"config.mesh ({shape}) does not fit {len(devices)} device(s): axis sizes must multiply to that number, or one be -1"
        )
    # Auto: XLA propagates shardings. jax.make_mesh's own default is Explicit, under which constraints are assertions.
    auto = (AxisType.Auto,) * len(AXES)
    if list(devices) == list(jax.devices()):
        return jax.make_mesh(tuple(sizes), AXES, axis_types=auto)
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=auto)
