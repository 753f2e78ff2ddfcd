"""Pipeline parallelism: the layers of a stage are on the devices at one place of the mesh axis "stage", and micro-batches pass
from stage to stage.

S stages, R repeats, M micro-batches of b rows, n consecutive layers that a stage computes: L = R * S * n in all

Item (r, m), micro-batch m on pass r through the stages, is in stage s at step r * max(M, S) + m + s. After each step every stage
hands its result to the next, and the last to the first, which keeps it until its turn comes again. R = 1 is GPipe's order
(arXiv:1811.06965). With R > 1, group g of n layers is in stage g % S, and the stages' idle time before the first micro-batch and
after the last is R times shorter (arXiv:2104.04473, section 2.2, but all forward passes before the backward ones). Parameters are
in order of layers, the first L / S on the first stage, whatever R is: with R > 1 each training step sends them to where they are
computed, and their gradients back, and the backward pass recomputes every group of layers, whatever the remat policy within it.

Written per stage, in a shard_map over "stage" alone: the other axes are left to XLA, as outside of it, and a shard_map inside a
stage takes the axes that are left.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt4o_jax.config_mesh import micro_batches
from gpt4o_jax.parallel.rules import ways


class Schedule(NamedTuple):
    """Which stage computes which micro-batch when."""

    stages: int
    repeats: int
    micro_batches: int

    @property
    def between(self) -> int:
        """Steps between successive repeats of a micro-batch."""
        return max(self.micro_batches, self.stages)

    @property
    def steps(self) -> int:
        return (self.repeats - 1) * self.between + self.micro_batches + self.stages - 1

    @property
    def bubble(self) -> float:
        """Fraction of the steps in which a stage is idle."""
        return 1 - self.repeats * self.micro_batches / self.steps

    def __str__(self) -> str:
        times = f", {self.repeats} times round" if self.repeats > 1 else ""
        return f"a pipeline of {self.stages} stages{times}, {self.micro_batches} micro-batches, bubble {self.bubble:.1%}"


def schedule(rows: int, repeats: int = 1, wanted: int = 0) -> Schedule:
    """The schedule of a batch of `rows` rows on the mesh that is set. wanted: micro-batches (config_mesh.micro_batches)."""
    stages, (devices,) = dict(jax.sharding.get_abstract_mesh().shape)["stage"], ways(("batch",))
    return Schedule(stages, repeats, 1 if rows % devices else micro_batches(rows // devices, stages, wanted))


def cut(x: jax.Array, M: int, axis: int = 0) -> jax.Array:
    """[M, ...]: row i along `axis` goes to micro-batch i % M, so that each has rows from every data shard."""
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, M, *x.shape[axis + 1 :]), axis + 1, 0)


def joined(x_Mb: jax.Array) -> jax.Array:
    """The inverse of `cut` along the first axis."""
    return jnp.moveaxis(x_Mb, 0, 1).reshape(-1, *x_Mb.shape[2:])


def pipeline(stage: Callable, layers, x_Mb: jax.Array, others_Mb, order: Schedule):
    """(x_Mb [M, b, ...] after all layers; what `stage` reports of each layer, summed over micro-batches, [L, ...] each).

    stage(n of the layers, x [b, ...], others [b, ...], m) -> (x after them, reports of each layer: arrays [n, ...]).
    layers: a tree of arrays [L, ...]; others_Mb: a tree of arrays [M, ...] that every layer reads.
    """
    S, R, M = order

    def in_turn(layers_Rn, r, *inputs):
        return stage(jax.tree.map(lambda leaf: leaf[0] if R == 1 else _at(leaf, r), layers_Rn), *inputs)

    if R > 1:  # else the backward pass would keep a copy of a group's parameters for every step
        in_turn = jax.checkpoint(in_turn, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)

    def local(layers_Rn, x_Mb, others_Mb):
        s = jax.lax.axis_index("stage")

        def step(carry, t):
            waiting_Mb, x = carry
            r = jnp.clip((t - s) // order.between, 0, R - 1)
            m = jnp.clip((t - s) % order.between, 0, M - 1)  # if there is no item, whatever is there is computed and dropped
            x = jnp.where(s == 0, _at(waiting_Mb, m), x)
            x, told = in_turn(layers_Rn, r, x, jax.tree.map(lambda leaf: _at(leaf, m), others_Mb), m)
            x = jax.lax.ppermute(x, "stage", [(i, (i + 1) % S) for i in range(S)])
            # On the first stage: the micro-batch that has left the last one.
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
