"""Expert parallelism: rows travel to the devices that hold their experts, and the results travel back.

Nothing is dropped, so a device has room for all rows of its group, p times as many as an even router sends it. With chunks of
tokens, the room is that of one chunk.

p devices along the mesh axis, M tokens of a device, k experts per token, n = M * k rows of a device, e experts of a device,
E = p * e experts in all, most: rows that one device can have for another, r = p * most rows that a device has room for

Source: GShard (arXiv:2006.16668) for the two all-to-alls, here with unequal numbers of rows.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt4o_jax.ops import experts as ops
from gpt4o_jax.ops.adapted import Adapted
from gpt4o_jax.ops.compute import Compute

AXIS = "expert"


def experts(
    x_MD: jax.Array,
    chosen_Mk: jax.Array,
    gates_Mk: jax.Array,
    gate_eDF: jax.Array | Adapted | None,
    up_eDF: jax.Array | Adapted,
    down_eFD: jax.Array | Adapted,
    activation: Callable,
    compute: Compute,
) -> jax.Array:
    """ops.experts in a shard_map, each device along the axis "expert" holding e of the experts; chosen_Mk counts all. [M, D]."""
    p, e = jax.lax.axis_size(AXIS), up_eDF.shape[0]
    order_n, inverse_n, sizes_E = ops.by_expert(chosen_Mk, p * e)
    all_ppe = jax.lax.all_gather(sizes_E, AXIS).reshape(p, p, e)  # rows by (device that has them, device that wants them, expert)
    most = len(x_MD) * min(chosen_Mk.shape[1], e)  # a token's experts are distinct
    route = _Route(jnp.sum(all_ppe, axis=-1), chosen_Mk.reshape(-1)[order_n] // e)
    how = (most, compute.ragged)

    # The products would round their operands after arrival; rounded before, half as many bytes are sent.
    x_rD = _there(how, ops.sorted_rows(x_MD.astype(compute.operand), order_n, inverse_n), route).astype(jnp.float32)
    mine_pe = all_ppe[:, jax.lax.axis_index(AXIS)]
    runs_pe1 = jnp.concatenate([mine_pe, most - jnp.sum(mine_pe, axis=1, keepdims=True)], axis=1)  # last in each: unused room
    owner_r = jnp.repeat(jnp.tile(jnp.arange(e + 1), p), runs_pe1.reshape(-1), total_repeat_length=p * most)
    order_r = jnp.argsort(owner_r, stable=True)
    inverse_r = jnp.argsort(order_r)
    sizes_e = jnp.sum(mine_pe, axis=0)
    y_rD = ops.feed_forward(ops.permuted(x_rD, order_r, inverse_r), sizes_e, gate_eDF, up_eDF, down_eFD, activation, compute)
    y_nD = _back(how, ops.permuted(y_rD, inverse_r, order_r), route)
    return ops.weighted_sum(y_nD, order_n, inverse_n, gates_Mk)


# ---------------------------------------------------------------- there and back, transposes of each other


class _Route(NamedTuple):
    sent_pp: jax.Array  # number of rows from each device (first axis) to each
    to_n: jax.Array  # the device to which each of this one's rows, sorted by expert, goes

    def here(self):
        """(this device's index, where its rows for each device start)."""
        me = jax.lax.axis_index(AXIS)
        return me, (jnp.cumsum(self.sent_pp, axis=1) - self.sent_pp)[me]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _there(how, x_nD, route):
    """All devices' rows for this one, those of device i starting at i * most, zeros between. [r, D]."""
    (most, ragged), p = how, len(route.sent_pp)
    me, start_p = route.here()
    if ragged:
        room_rD = jnp.zeros((p * most, x_nD.shape[1]), x_nD.dtype)
        place_p = jnp.full(p, me * most, jnp.int32)
        return jax.lax.ragged_all_to_all(x_nD, room_rD, start_p, route.sent_pp[me], place_p, route.sent_pp[:, me], axis_name=AXIS)
    # Without a ragged exchange (ops/compute.py), every device sends the most that it could have for another.
    place = jnp.arange(most)
    parts_pmD = jnp.where(
        (place < route.sent_pp[me][:, None])[..., None], jnp.take(x_nD, start_p[:, None] + place, axis=0, mode="clip"), 0
    )
    return jax.lax.all_to_all(parts_pmD, AXIS, 0, 0).reshape(p * most, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _back(how, y_rD, route):
    """Returns what `_there` brought to where it came from. [n, D]."""
    (most, ragged), p, n = how, len(route.sent_pp), len(route.to_n)
    me, start_p = route.here()
    if ragged:
        room_nD = jnp.zeros((n, y_rD.shape[1]), y_rD.dtype)
        held_p = most * jnp.arange(p, dtype=jnp.int32)
        start_of_mine_p = (jnp.cumsum(route.sent_pp, axis=1) - route.sent_pp)[:, me]
        return jax.lax.ragged_all_to_all(
            y_rD, room_nD, held_p, route.sent_pp[:, me], start_of_mine_p, route.sent_pp[me], axis_name=AXIS
        )
    parts_rD = jax.lax.all_to_all(y_rD.reshape(p, most, -1), AXIS, 0, 0).reshape(p * most, -1)
    return parts_rD[route.to_n * most + jnp.arange(n) - start_p[route.to_n]]


_there.defvjp(lambda how, x_nD, route: (_there(how, x_nD, route), route), lambda how, route, g: (_back(how, g, route), None))
_back.defvjp(lambda how, y_rD, route: (_back(how, y_rD, route), route), lambda how, route, g: (_there(how, g, route), None))
