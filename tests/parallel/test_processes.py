"""Processes that build only their own rows hold the same global batch: eight fake devices, shared out among fake processes."""

import jax
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import MeshConfig
from gpt4o_jax.data.batches import dispatches

K, B, T = 2, 16, 4
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=2, fsdp=4),
    "tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "tensor over processes": MeshConfig(data=1, fsdp=2, tensor=4),
}


class Rows:
    """Row n is full of n, and is counted."""

    def __init__(self):
        self.T, self.built = T, []

    def __getitem__(self, n):
        self.built.append(n)
        return np.full(T + 1, n, np.int32), np.ones(T + 1, np.int32)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("name", MESHES)
def test_each_process_builds_what_its_devices_hold(name, processes):
    mesh = parallel.make_mesh(MESHES[name])
    sharding = jax.sharding.NamedSharding(mesh, parallel.spec((None, "batch", "seq")))
    (_, whole), *_ = dispatches(Rows(), 0, K, K, B, prefetch=1)
    whole = jax.device_put(whole, sharding)
    devices, seen = mesh.devices.flatten(), set()
    copies = max(1, MESHES[name].tensor * processes // 8)  # processes that hold the same rows
    for mine in devices.reshape(processes, -1):
        rows = Rows()
        places = parallel.places(sharding, (K, B, T), 1, mine)
        ((_, share),) = dispatches(rows, 0, K, K, B, prefetch=1, places=places)
        assert sorted(rows.built) == sorted(s * B + p for s in range(K) for p in places)
        assert len(places) == B * copies // processes
        seen |= set(places)
        for name_of_leaf in ("tokens", "targets", "weights", "positions", "segments"):
            for shard in getattr(whole, name_of_leaf).addressable_shards:
                if shard.device in mine:
                    here = [places.index(p) for p in range(B)[shard.index[1]]]
                    np.testing.assert_array_equal(getattr(share, name_of_leaf)[:, here], shard.data)
    assert seen == set(range(B)), "and together they build all"


def test_one_process_holds_every_place():
    sharding = jax.sharding.NamedSharding(parallel.make_mesh(), parallel.spec((None, "batch", "seq")))
    assert parallel.places(sharding, (K, B, T), 1) == list(range(B))
