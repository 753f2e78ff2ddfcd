"""A pipeline: the layers of a stage lie on the devices of one place along the mesh axis "stage", micro-batches pass from
stage to stage.

S stages, R repeats, M micro-batches of b rows, n layers that a stage computes in a row: L = R * S * n in all

Item (r, m), micro-batch m on its way through the stages for the r-th time, is in stage s at step r * max(M, S) + m + s.
After each step every stage hands what it computed to the next, and the last to the first, which keeps it until its turn
comes again. With R = 1 that is GPipe's order (arXiv:1811.06965). With more, group g of n layers is in stage g % S, and the
stages wait R times shorter for the first micro-batch and after the last (arXiv:2104.04473, section 2.2, but forward and
backward one after the other). Parameters lie in order of layers, the first L / S on the first stage, whatever R is: with
R > 1 each step of training sends them to where they are computed, and their gradients back; and the backward pass computes
every group of layers once more, whatever the remat policy is within it.

Written per stage, in a shard_map over "stage" alone: the other axes are XLA's, as they are outside of it, and a shard_map
inside of a stage takes what axes are left.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt4o_jax.config_mesh import micro_batches
from gpt4o_jax.parallel.rules import ways


class Schedule(NamedTuple):
    """Who computes what when."""

    stages: int
    repeats: int
    micro_batches: int

    @property
    def between(self) -> int:
        """Steps from one repeat of a micro-batch to its next."""
        return max(self.micro_batches, self.stages)

    @property
    def steps(self) -> int:
        return (self.repeats - 1) * self.between + self.micro_batches + self.stages - 1

    @property
    def bubble(self) -> float:
        """The part of the steps in which a stage has nothing to do."""
        return 1 - self.repeats * self.micro_batches / self.steps

    def __str__(self) -> str:
        times = f", {self.repeats} times round" if self.repeats > 1 else ""
        return f"a pipeline of {self.stages} stages{times}, {self.micro_batches} micro-batches, bubble {self.bubble:.1%}"


def schedule(rows: int, repeats: int = 1, wanted: int = 0) -> Schedule:
    """Of a batch of so many rows on the mesh in force. wanted: micro-batches (config_mesh.micro_batches)."""
    stages, (devices,) = dict(jax.sharding.get_abstract_mesh().shape)["stage"], ways(("batch",))
    return Schedule(stages, repeats, 1 if rows % devices else micro_batches(rows // devices, stages, wanted))


def cut(x: jax.Array, M: int, axis: int = 0) -> jax.Array:
    """[M, ...]: row i along `axis` goes to micro-batch i % M, so that each has rows of every data shard."""
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, M, *x.shape[axis + 1 :]), axis + 1, 0)


def joined(x_Mb: jax.Array) -> jax.Array:
    """What was cut along its first axis."""
    return jnp.moveaxis(x_Mb, 0, 1).reshape(-1, *x_Mb.shape[2:])


def pipeline(stage: Callable, layers, x_Mb: jax.Array, others_Mb, order: Schedule):
    """x_Mb after all layers [M, b, ...], and what stage tells of every layer, summed over micro-batches [L, ...] each.

    stage(n of the layers, x [b, ...], others [b, ...], m) -> (x after them, what it tells of each: arrays [n, ...]).
    layers: a tree of arrays [L, ...]; others_Mb: a tree of arrays [M, ...] that every layer reads.
    """
    S, R, M = order

    def in_turn(layers_Rn, r, *inputs):
        return stage(jax.tree.map(lambda leaf: leaf[0] if R == 1 else _at(leaf, r), layers_Rn), *inputs)

    if R > 1:  # or the backward pass would keep a copy of a group's parameters for every step
        in_turn = jax.checkpoint(in_turn, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)

    def local(layers_Rn, x_Mb, others_Mb):
        s = jax.lax.axis_index("stage")

        def step(carry, t):
            waiting_Mb, x = carry
            r = jnp.clip((t - s) // order.between, 0, R - 1)
            m = jnp.clip((t - s) % order.between, 0, M - 1)  # of no item: whatever is there is computed, and dropped
            x = jnp.where(s == 0, _at(waiting_Mb, m), x)
            x, told = in_turn(layers_Rn, r, x, jax.tree.map(lambda leaf: _at(leaf, m), others_Mb), m)
            x = jax.lax.ppermute(x, "stage", [(i, (i + 1) % S) for i in range(S)])
            # On the first stage: of the item that was in the last one.
            m = (t - S + 1) % order.between
            came = (t >= S - 1) & (m < M)
            waiting_Mb = jax.lax.dynamic_update_index_in_dim(waiting_Mb, jnp.where(came, x, _at(waiting_Mb, m)), m, 0)
            return (waiting_Mb, x), told

        (done_Mb, _), told = jax.lax.scan(step, (x_Mb, x_Mb[0]), jnp.arange(order.steps))
        mine = lambda leaf, r: jnp.sum(jax.lax.dynamic_slice_in_dim(leaf, s + r * order.between, M), axis=0)
        told_Rn = jax.tree.map(lambda leaf: jnp.stack([mine(leaf, r) for r in range(R)]), told)
        return jax.lax.psum(jnp.where(s == 0, done_Mb, 0), "stage"), told_Rn

    grouped, whole = jax.P(None, "stage"), jax.P()
    local = jax.shard_map(
        local, in_specs=(grouped, whole, whole), out_specs=(whole, grouped), axis_names={"stage"}, check_vma=False
    )
    layers_Rn = jax.tree.map(lambda leaf: leaf.reshape(R, -1, *leaf.shape[1:]), layers)
    x_Mb, told_Rn = local(layers_Rn, x_Mb, others_Mb)
    return x_Mb, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), told_Rn)


def _at(x, i):
    return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
