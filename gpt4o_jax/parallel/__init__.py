"""Meshes and sharding: everything that deals with several devices."""

from gpt4o_jax.parallel.mesh import make_mesh
from gpt4o_jax.parallel.peers import Peers
from gpt4o_jax.parallel.processes import barrier, is_leader, joined, leader_first, places, share
from gpt4o_jax.parallel.rules import constrain, even, gathered, mesh_axes, per_shard, replicated, shardings, shards_evenly, spec

__all__ = [
    "Peers",
    "barrier",
    "constrain",
    "even",
    "gathered",
    "is_leader",
    "joined",
    "leader_first",
    "make_mesh",
    "mesh_axes",
    "per_shard",
    "places",
    "replicated",
    "shardings",
    "shards_evenly",
    "share",
    "spec",
]  # fmt: skip
