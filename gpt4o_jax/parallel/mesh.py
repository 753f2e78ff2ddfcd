"""The device mesh: one, always, also on one device."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from gpt4o_jax.config_mesh import AXES, MeshConfig


def make_mesh(config: MeshConfig = MeshConfig(), devices=None) -> Mesh:
    """A mesh over `devices` (default: all), axes as in config_mesh.AXES. Enter it with jax.set_mesh.

    Raises RunError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = tuple(config.sizes(len(devices)).values())
    # Auto: XLA propagates shardings. jax.make_mesh's own default is Explicit, under which constraints are assertions.
    auto = (AxisType.Auto,) * len(AXES)
    if list(devices) == list(jax.devices()):
        return jax.make_mesh(sizes, AXES, axis_types=auto)
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=auto)
