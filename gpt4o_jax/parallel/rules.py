"""Logical axis names -> mesh axes: one ordered table for parameters and activations alike."""

import functools
import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Every logical axis name. A mesh axis shards at most one axis of an array, the first in order that wants it: "embed" of a
# parameter is sharded over fsdp, but "embed" of an activation, whose batch already uses fsdp, is whole.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "staged_batch": ("data", "fsdp", "expert", "stage"),  # at the head, which belongs to no stage
    "seq": ("context",),
    "residual": ("context", "tensor"),  # tokens of a row between blocks, where no head or hidden width takes tensor
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "position": (),
    "norm": (),
    "rank": (),  # of an adapter
    "mix": (),
    "layers": ("stage",),
    "ahead": (),  # every stage has all multi-token prediction heads
}


def spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """Logical names of an array's axes -> its PartitionSpec. None: that axis is whole.

    If two of them want one mesh axis, the first in order gets it; the other is split over its other mesh axes, or whole. That is
    not an error: `plan --show=sharding` reports it (`collisions`).
    """
    return PartitionSpec(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in _shared_out(names)[0]))


def collisions(names: tuple[str | None, ...]) -> list[tuple[str, str]]:
    """(mesh axis, the name that has it) of each mesh axis that a later name wants too, and does not get."""
    return _shared_out(names)[1]


def _shared_out(names: tuple[str | None, ...]) -> tuple[list[tuple[str, ...]], list[tuple[str, str]]]:
    """(mesh axes of each name, collisions)."""
    holder: dict[str, str] = {}
    entries, found = [], []
    for name in names:
        wanted = RULES[name] if name else ()
        found += [(axis, holder[axis]) for axis in wanted if axis in holder]
        entries.append(tuple(axis for axis in wanted if axis not in holder))
        holder |= dict.fromkeys(entries[-1], name)
    return entries, found


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Sets the sharding of an activation inside jit. Raises ValueError if no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError("constrain() outside a mesh: wrap the call in `with jax.set_mesh(parallel.make_mesh()):`")
    return jax.lax.with_sharding_constraint(x, spec(names))


def replicated(tree):
    """Makes every array of a tree whole on every device, inside jit, so that each process can read it."""
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), tree)


def shards_evenly(x: jax.Array, *names: str | None) -> bool:
    """Whether every named axis of x divides evenly into its shards on the mesh that is set."""
    return all(size % n == 0 for size, n in zip(x.shape, ways(names), strict=True))


def even(x: jax.Array, *names: str | None) -> tuple[str | None, ...]:
    """The names of x's axes, with None for those that do not divide evenly into their shards on the mesh that is set."""
    return tuple(name if size % n == 0 else None for name, size, n in zip(names, x.shape, ways(names), strict=True))


def ways(names: tuple[str | None, ...]) -> list[int]:
    """Number of shards of each of these axes on the mesh that is set."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return [math.prod(sizes[a] for a in ((entry,) if isinstance(entry, str) else entry or ())) for entry in spec(names)]


def mesh_axes(*names: str | None) -> tuple[str, ...]:
    """The mesh axes that these axes are split over."""
    return tuple(a for entry in spec(names) if entry for a in ((entry,) if isinstance(entry, str) else entry))


def per_shard(f, in_names: list[tuple[str | None, ...]], out_names: tuple[str | None, ...] | list[tuple[str | None, ...]]):
    """f as a function of the shards of its arguments, where XLA cannot partition it, or not as intended.

    An argument may be None, or a tree, with a tree of names. out_names: a list if f has several results; () for whole arrays.
    """
    outs = tuple(spec(n) for n in out_names) if isinstance(out_names, list) else spec(out_names)
    ins = tuple(jax.tree.map(spec, names, is_leaf=lambda n: isinstance(n, tuple)) for names in in_names)
    # Replication is not checked: loops in the kernels carry no types for it.
    return jax.shard_map(f, in_specs=ins, out_specs=outs, check_vma=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gathered(x: jax.Array, mesh_axis: str, axis: int, dtype=None) -> jax.Array:
    """In a shard_map: x joined, along its `axis`, with the parts of all devices along `mesh_axis`.

    The gradient is summed over these devices, and each gets its part. dtype: x, but not its gradient, is rounded to it on the
    way.
    """
    if jax.lax.axis_size(mesh_axis) == 1:  # XLA:CPU would copy x
        return x
    return jax.lax.all_gather(x.astype(dtype or x.dtype), mesh_axis, axis=axis, tiled=True).astype(x.dtype)


def _scattered(mesh_axis, axis, dtype, _, g):
    whole = jax.lax.axis_size(mesh_axis) == 1
    return (g if whole else jax.lax.psum_scatter(g, mesh_axis, scatter_dimension=axis, tiled=True),)


gathered.defvjp(lambda x, *how: (gathered(x, *how), None), _scattered)


def shardings(axes_tree, mesh: Mesh):
    """A tree of tuples of logical names -> the tree of NamedShardings."""
    return jax.tree.map(lambda names: NamedSharding(mesh, spec(names)), axes_tree, is_leaf=lambda n: isinstance(n, tuple))
