"""Meshes and sharding: everything that knows about several devices."""

from gpt4o_jax.parallel.mesh import make_mesh
from gpt4o_jax.parallel.processes import places
from gpt4o_jax.parallel.rules import constrain, per_shard, shardings, shards_evenly, spec

__all__ = ["constrain", "make_mesh", "per_shard", "places", "shardings", "shards_evenly", "spec"]
