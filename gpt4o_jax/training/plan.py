"""Whether a config fits hardware that is not here: its training step, compiled ahead of time, and what that tells.

libtpu describes slices by name and compiles for them on any machine. Without it eight CPU devices stand in.
"""

import collections
import dataclasses
import math
import re
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from gpt4o_jax import parallel
from gpt4o_jax.config import RunConfig
from gpt4o_jax.errors import RunError
from gpt4o_jax.model import flops
from gpt4o_jax.parallel.mesh import AXES
from gpt4o_jax.training.collectives import collectives
from gpt4o_jax.training.program import Program, build


class Chip(NamedTuple):
    """Published rates of one chip: bfloat16 FLOP/s, bytes of HBM, bytes/s of HBM, of all links (ICI), to other slices (DCN)."""

    flops: float
    hbm: float
    hbm_rate: float
    ici: float
    dcn: float
    devices: int  # that JAX sees for one chip
    accelerator: str  # what TPU_ACCELERATOR_TYPE calls the family


# cloud.google.com/tpu/docs, system architecture of v5e, v5p, v6e and tpu7x: peak compute, HBM, inter-chip interconnect. DCN: a
# chip's share of its host's network card (jax-ml.github.io/scaling-book, TPUs). Put down from memory of these pages: check
# them before a decision hangs on a few percent.
CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, 3.1e9, 1, "v5litepod"),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9, 6.25e9, 1, "v5p"),
    "v6e": Chip(918e12, 32e9, 1640e9, 448e9, 12.5e9, 1, "v6e"),
    "tpu7x": Chip(2307e12, 192e9, 7380e9, 1200e9, 12.5e9, 2, "tpu7x"),
}


def parse_topology(name: str) -> tuple[str, int]:
    """'v5p:8x8x8' -> ('v5p', 512 chips). Raises RunError."""
    family, _, layout = name.partition(":")
    if family not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", layout):
        raise RunError(f"--topology={name}: expected FAMILY:AxB or FAMILY:AxBxC with FAMILY one of {', '.join(CHIPS)}")
    return family, math.prod(map(int, layout.split("x")))


def described_devices(name: str, slices: int) -> list:
    """The devices of `slices` slices that libtpu knows by this name. Raises RunError; ImportError without libtpu."""
    import libtpu  # noqa: F401  (jax's own error for a missing one is a traceback of its plugin loader)
    from jax.experimental import topologies

    try:
        several = {"num_slices": slices} if slices > 1 else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **several).devices)
    except jax.errors.JaxRuntimeError as e:
        raise RunError(f"--topology={name}: libtpu knows no such slice: {str(e).splitlines()[0]}") from e


def mesh_of(config: RunConfig, devices: list, slices: int) -> Mesh:
    """The config's mesh, laid over the slice as its links run; slices along data, or along fsdp where that divides."""
    from jax.experimental import mesh_utils

    plain = parallel.make_mesh(config.mesh, devices)  # checks the sizes
    sizes = [plain.shape[axis] for axis in AXES]
    if devices[0].platform != "tpu":
        return plain
    if slices == 1:
        laid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        between = next((i for i, n in enumerate(sizes[:2]) if n % slices == 0), None)
        if between is None:
            raise RunError(f"--slices={slices}: divides neither mesh.data={sizes[0]} nor mesh.fsdp={sizes[1]}")
        outer = [slices if i == between else 1 for i in range(len(sizes))]
        inner = [n // o for n, o in zip(sizes, outer, strict=True)]
        laid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_shards(config: RunConfig, program: Program) -> None:
    """Raises RunError where an array does not divide into its shards."""
    shape = program.mesh.shape
    rows, ways = config.train.batch_size // config.train.accumulate, shape["data"] * shape["fsdp"]
    if rows % ways:
        raise RunError(
            f"config.train.batch_size={config.train.batch_size} in accumulate={config.train.accumulate} micro-batches gives"
            f" {rows} rows, which mesh.data x mesh.fsdp = {ways} does not divide; nearest:"
            f" batch_size={max(1, round(rows / ways)) * ways * config.train.accumulate}"
        )
    for path, leaf, sharding in _leaves(program):
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError:
            raise RunError(
                f"config.mesh {dict(shape)} cannot shard {path} {leaf.shape} as {sharding.spec}: an axis does not divide"
            ) from None


def _leaves(program: Program):
    leaves = jax.tree_util.tree_leaves_with_path(program.shapes.params)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(program.shardings.params), strict=True):
        yield "/".join(str(k.key) for k in path), leaf, sharding


def show_sharding(program: Program, axes: dict) -> list[dict]:
    """Parameter by parameter: shape, logical axes, mesh axes, bytes a device."""
    names = jax.tree.leaves(axes, is_leaf=lambda n: isinstance(n, tuple))
    return [
        {
            "parameter": path,
            "shape": list(leaf.shape),
            "logical": list(logical),
            "mesh": [list(e) if isinstance(e, tuple) else e for e in sharding.spec],
            "bytes_a_device": _shard_bytes(leaf, sharding),
        }
        for (path, leaf, sharding), logical in zip(_leaves(program), names, strict=True)
    ]


def _shard_bytes(leaf, sharding) -> int:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 16
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _tree_bytes(shapes, shardings) -> int:
    return sum(_shard_bytes(x, s) for x, s in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True))


def compile_step(config: RunConfig, mesh: Mesh, chip: Chip | None) -> dict:
    """Compiles one training step for `mesh`; what it needs and sends. config: vocab_size and compute_dtype resolved.

    Bytes are those of a device (of a chip where it is one device). chip: None where the devices only stand in: then
    there is no verdict and no roofline.
    """
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps_per_dispatch=1))
    program = build(config, mesh)
    check_shards(config, program)
    state = {
        "parameters": _tree_bytes(program.shapes.params, program.shardings.params),
        "optimizer": _tree_bytes(program.shapes.opt_state, program.shardings.opt_state),
    }
    result = {"attention": program.attention, "mesh": dict(mesh.shape), "bytes": state, "remat": config.model.remat}
    with jax.set_mesh(mesh):
        lowered = program.lower(10_000, np.ones(config.model.vocab_size, np.int32))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as e:
            if chip is None or "RESOURCE_EXHAUSTED" not in str(e):
                raise
            used = re.search(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm", str(e))
            return result | {"fits": False, "compiler": used[0] if used else str(e).splitlines()[0][:200]}
    memory = compiled.memory_analysis()
    state["arguments"] = memory.argument_size_in_bytes
    # Activations, gradients and what else lives for a while: the compiler packs them into one pool and tells its size.
    state["temporaries"] = memory.temp_size_in_bytes
    state["code"] = memory.generated_code_size_in_bytes
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    state["total"] = state["arguments"] + state["temporaries"] + state["code"] + new
    ids = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    result["collectives"] = collectives(compiled.as_text(), dict(mesh.shape), ids)
    if chip is not None:
        result |= {"fits": state["total"] <= chip.hbm / chip.devices, "hbm": chip.hbm / chip.devices}
    return result


def roofline(config: RunConfig, chip: Chip, mesh: Mesh, found: list[dict], arguments: int) -> dict:
    """Lower bounds of a step's seconds and the MFU that they leave: compute, HBM, and links between chips and slices.

    compute: 6N + 12LDT, and under remat=full another forward pass, at the peak. hbm: parameters and optimizer, read and
    written once. ici, dcn: (n - 1) / n of every array of the collectives (twice for an all-reduce) over the chip's links.
    A step takes at least the longest of them.
    """
    chips, tokens = mesh.devices.size / chip.devices, config.train.batch_size * config.model.context_length
    useful = flops.train_flops_per_token(config.model) * tokens
    again = {"full": 4 / 3}.get(config.model.remat, 1.0)
    seconds = {"compute": useful * again / chips / chip.flops, "hbm": 2 * arguments * chip.devices / chip.hbm_rate}
    slices = len({getattr(d, "slice_index", 0) for d in mesh.devices.flat})
    crossing = {axis for i, axis in enumerate(mesh.axis_names) if _crosses(mesh, i)}
    links = collections.Counter()
    for c in found:
        axes = c["axes"].split("+")
        n, twice = math.prod(mesh.shape[a] for a in axes), 2 if c["kind"] == "all-reduce" else 1
        links["ici"] += twice * c["bytes"] * (n - 1) / n
        if crossing & set(axes):  # the members of a group that share a slice share what must leave it
            links["dcn"] += twice * c["bytes"] * (slices - 1) / slices / (n / slices)
    seconds["ici"] = links["ici"] * chip.devices / chip.ici
    seconds["dcn"] = links["dcn"] * chip.devices / chip.dcn
    bound = max(seconds.values())
    return {
        "seconds": seconds,
        "bound_by": max(seconds, key=seconds.get),
        "step_seconds_at_least": bound,
        "mfu_at_most": useful / chips / chip.flops / bound,
    }


def _crosses(mesh: Mesh, axis: int) -> bool:
    """Whether devices along this axis of the mesh lie in several slices."""
    row = mesh.devices[tuple(slice(None) if i == axis else 0 for i in range(mesh.devices.ndim))]
    return len({getattr(d, "slice_index", 0) for d in row}) > 1


def remedies(config: RunConfig, sizes: dict[str, int]):
    """(what it is, the config changed), the mildest first: the next remat policy, more fsdp, smaller micro-batches."""
    model, train, mesh = config.model, config.train, config.mesh
    order = ("none", "dots", "full")
    for policy in order[order.index(model.remat) + 1 :]:
        yield f"model.remat={policy}", dataclasses.replace(config, model=dataclasses.replace(model, remat=policy))
    config = dataclasses.replace(config, model=dataclasses.replace(model, remat="full"))
    if sizes["data"] > 1:
        mesh = dataclasses.replace(mesh, data=1, fsdp=sizes["data"] * sizes["fsdp"], tensor=sizes["tensor"])
        config = dataclasses.replace(config, mesh=mesh)
        yield f"model.remat=full, mesh.data=1, mesh.fsdp={mesh.fsdp}", config
    ways, rows = sizes["data"] * sizes["fsdp"], train.batch_size
    while rows % 2 == 0 and rows // 2 // train.accumulate % ways == 0 and rows // 2 >= ways:
        rows //= 2
        smaller = dataclasses.replace(config, train=dataclasses.replace(train, batch_size=rows))
        yield f"model.remat=full, train.batch_size={rows}", smaller
