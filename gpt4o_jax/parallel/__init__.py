"""Meshes and sharding: everything that knows about several devices."""

from gpt4o_jax.parallel.mesh import make_mesh
from gpt4o_jax.parallel.rules import constrain, shardings, spec

__all__ = ["constrain", "make_mesh", "shardings", "spec"]
