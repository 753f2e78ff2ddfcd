"""Logical axis names -> mesh axes: one ordered table, for parameters and activations alike."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Every logical name in the project. A mesh axis serves one array axis at most: the first in the array's
# order gets it, so "embed" of a parameter is sharded over fsdp, while "embed" of an activation, whose batch
# already took fsdp, is whole.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "seq": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "position": (),
    "norm": (),
    "layers": (),
}


def spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """Logical names of an array's axes -> its PartitionSpec. None: that axis is whole."""
    used: set[str] = set()
    entries = []
    for name in names:
        axes = tuple(a for a in (RULES[name] if name else ()) if a not in used)
        used |= set(axes)
        entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins the sharding of an activation inside jit. Raises ValueError where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError("constrain() outside a mesh: wrap the call in `with jax.set_mesh(parallel.make_mesh()):`")
    return jax.lax.with_sharding_constraint(x, spec(names))


def shardings(axes_tree, mesh: Mesh):
    """A tree of tuples of logical names -> the tree of NamedShardings."""
    return jax.tree.map(lambda names: NamedSharding(mesh, spec(names)), axes_tree, is_leaf=lambda n: isinstance(n, tuple))
