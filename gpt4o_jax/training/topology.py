"""TPU slices that are not present: the rates of their chips, and their devices as described by libtpu."""

import dataclasses
import math
import re
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from gpt4o_jax.config import RunConfig
from gpt4o_jax.config_mesh import AXES
from gpt4o_jax.errors import RunError


class Chip(NamedTuple):
    """Published rates of one chip, and the memory that libtpu lets a program use."""

    flops: float  # bfloat16 FLOP/s
    hbm_rate: float  # bytes/s
    ici: float  # bytes/s sent over all links to chips of its slice
    dcn: float  # bytes/s sent to other slices: its share of the host's network cards
    devices: int  # JAX devices per chip
    hbm: float  # bytes of one device's memory that a program may use
    pod: tuple[int, ...]  # the largest slice


# docs.cloud.google.com/tpu/docs/v5e, v5p, v6e and tpu7x (read 2026-11), "Specification | Values": peak compute (BF16), HBM
# bandwidth, and "Bidirectional inter-chip interconnect (ICI) bandwidth per chip" of 400, 1200, 800 and 1200 GB/s, half of it for
# sending. jax-ml.github.io/scaling-book/tpus gives 10 % less per link (4.5e10 and 9e10 bytes/s one way), and for DCN 25 Gbit/s
# per chip for v5e (6.4 Tbit/s per pod of 256), 50 for v5p, 100 for v6e and tpu7x.
# hbm: libtpu 0.0.42 refuses programs that need more, of 16, 96, 32 and 2 x 96 GiB ("exceeds available HBM (15.75G)").
CHIPS = {
    "v5e": Chip(197e12, 819e9, 200e9, 3.125e9, 1, 15.75 * 2**30, (16, 16)),
    "v5p": Chip(459e12, 2765e9, 600e9, 6.25e9, 1, 95.74 * 2**30, (16, 20, 28)),
    "v6e": Chip(918e12, 1638e9, 400e9, 12.5e9, 1, 31.25 * 2**30, (16, 16)),
    "tpu7x": Chip(2307e12, 7380e9, 600e9, 12.5e9, 2, 94.75 * 2**30, (16, 16, 36)),
}


def source(family: str) -> str:
    """Where the rates of this family's chips are published."""
    return f"docs.cloud.google.com/tpu/docs/{family}; DCN: jax-ml.github.io/scaling-book/tpus"


def parse_topology(name: str) -> tuple[str, int]:
    """'v5p:8x8x8' -> ('v5p', 512 chips). Raises RunError if there is no such slice.

    libtpu would describe some of those too, then abort the process when compiling for them.
    """
    family, _, layout = name.partition(":")
    if family not in CHIPS:
        raise RunError(f"--topology={name}: expected FAMILY:AxB or FAMILY:AxBxC with FAMILY one of {', '.join(CHIPS)}")
    pod = CHIPS[family].pod
    form, largest = "x".join("ABC"[: len(pod)]), "x".join(map(str, pod))
    if not re.fullmatch(r"[1-9]\d{0,3}" + r"x[1-9]\d{0,3}" * (len(pod) - 1), layout):
        raise RunError(f"--topology={name}: expected {family}:{form}, chips along each axis of the slice, up to {largest}")
    sizes = [int(n) for n in layout.split("x")]
    if any(n > most for n, most in zip(sorted(sizes), sorted(pod), strict=True)):
        raise RunError(f"--topology={name}: there is no larger {family} than {largest}; several of them: --slices=N")
    return family, math.prod(sizes)


def described_devices(name: str, slices: int) -> list:
    """The devices of `slices` slices that libtpu has under this name. Raises RunError; ImportError without libtpu."""
    import libtpu  # noqa: F401  (jax's own error for a missing one is a traceback of its plugin loader)
    from jax.experimental import topologies

    try:
        several = {"num_slices": slices} if slices > 1 else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **several).devices)
    except jax.errors.JaxRuntimeError as e:
        reason = str(e).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise RunError(f"--topology={name}: there is no such slice; A and B must be even (libtpu: {reason})") from e


def along_slices(config: RunConfig, slices: int, devices: int, rows_given: bool) -> tuple[RunConfig, dict]:
    """(the config for all slices, the knobs that this changes): the config's mesh in each slice, copied along data.

    devices: per slice. rows_given: the batch is that of all slices; else each slice gets as many rows as the config has. With one
    slice, or if the config sets mesh sizes, which are then those of all slices, nothing changes.
    """
    if slices == 1 or any(getattr(config.mesh, axis) for axis in AXES):
        return config, {}
    sizes = config.mesh.sizes(devices)
    sizes["data"] *= slices
    knobs = {f"mesh.{axis}": n for axis, n in sizes.items() if n > 1}
    train = config.train
    if not rows_given:
        train = dataclasses.replace(train, batch_size=train.batch_size * slices)
        knobs["train.batch_size"] = train.batch_size
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes), train=train), knobs


def stand_in(config: RunConfig, devices: int, most: int = 8) -> tuple[RunConfig, int]:
    """(the config on at most `most` devices, few enough to compile on a laptop; their number): a smaller mesh, as many rows per
    device.

    devices: number that the config's mesh is for. Raises RunError if it does not fit them.
    """
    sizes = config.mesh.sizes(devices)
    small = dict(sizes)
    while math.prod(small.values()) > most:
        axis = max(small, key=small.get)
        small[axis] //= next(n for n in range(2, small[axis] + 1) if small[axis] % n == 0)
    rows = lambda sizes: sizes["data"] * sizes["fsdp"] * sizes["expert"]
    train = dataclasses.replace(config.train, batch_size=config.train.batch_size * rows(small) // rows(sizes))
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **small), train=train), math.prod(small.values())


def spread(mesh: Mesh, axes: list[str]) -> tuple[int, int]:
    """Number of (devices, chips) of a slice over which a group of devices along these axes extends."""
    group = mesh.devices[tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)].ravel()
    group = [d for d in group if _slice(d) == _slice(group[0])]
    return len(group), len({tuple(getattr(d, "coords", (d.id,))) for d in group})


def slice_count(mesh: Mesh) -> int:
    return len({_slice(d) for d in mesh.devices.flat})


def _slice(device) -> int:
    return getattr(device, "slice_index", 0)
