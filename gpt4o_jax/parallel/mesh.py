"""The device mesh, used even with a single device."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from gpt4o_jax.config_mesh import AXES, MeshConfig
from gpt4o_jax.console import say
from gpt4o_jax.errors import RunError


def make_mesh(config: MeshConfig = MeshConfig(), devices=None) -> Mesh:
    """A mesh over `devices` (default: all) with the axes of config_mesh.AXES. Enter it with jax.set_mesh.

    TPUs are arranged as their links run, with several slices along one axis; other devices in order, those of a host adjacent. If
    context or tensor then crosses GPU hosts, a message says so, not an error: hosts may share fast links, and rows may need it.
    (jax.make_mesh supports neither several slices, which GPU hosts count as too, nor every shape of a TPU slice.)
    Raises RunError if the sizes do not multiply to the number of devices, or slices do not divide an axis.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    tpus = len(devices) > 1 and devices[0].platform == "tpu"
    laid = _as_links_run(devices, sizes) if tpus else np.asarray(devices).reshape(tuple(sizes.values()))
    if devices[0].platform == "gpu":
        _tell_of_hosts(laid, sizes)
    # Auto: XLA propagates shardings. Under Explicit, constraints are assertions.
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_between(slices: int, sizes: dict[str, int]) -> str:
    """The mesh axis along which slices lie: data, or fsdp if only that divides. Raises RunError."""
    axis = next((a for a in ("data", "fsdp") if sizes[a] % slices == 0), None)
    if axis is None:
        raise RunError(
            f"{slices} slices: they lie along mesh.data or mesh.fsdp, and divide neither data={sizes['data']} nor"
            f" fsdp={sizes['fsdp']}; make one of them a multiple of {slices}"
        )
    return axis


def _tell_of_hosts(laid: np.ndarray, sizes: dict[str, int]) -> None:
    """Warns of axes that communicate in every layer and cross hosts. JAX treats a host's GPUs as a slice."""
    hosts = np.array([getattr(d, "slice_index", d.process_index) for d in laid.flat]).reshape(laid.shape)
    most = max(np.bincount(hosts.ravel()))
    for i, axis in enumerate(AXES):
        if axis in ("context", "tensor") and np.any(hosts != np.take(hosts, [0], axis=i)):
            within = [a for a in AXES[i:] if sizes[a] > 1]
            say(
                f"mesh.{axis}={sizes[axis]} runs from host to host, in every layer over the network: slow, unless they share"
                f" faster links; to stay within one, let {' x '.join(within)} be at most its {most} GPUs"
            )


def _as_links_run(devices, sizes: dict[str, int]) -> np.ndarray:
    from jax.experimental import mesh_utils

    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(list(sizes.values()), devices, allow_split_physical_axes=True)
    outer = dict.fromkeys(sizes, 1) | {axis_between(slices, sizes): slices}
    inner = [n // outer[axis] for axis, n in sizes.items()]
    return mesh_utils.create_hybrid_device_mesh(inner, list(outer.values()), devices, allow_split_physical_axes=True)
