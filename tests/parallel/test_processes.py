"""Processes that build only their own rows hold the same global batch: eight fake devices, split among fake processes."""

import errno
import json

import jax
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import MeshConfig
from gpt4o_jax.data.batches import dispatches
from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.parallel import processes
from gpt4o_jax.parallel.cluster import Job

K, B, T = 2, 16, 4
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=2, fsdp=4),
    "tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "tensor over processes": MeshConfig(data=1, fsdp=2, tensor=4),
}


class Rows:
    """Row n is filled with n, and its construction is recorded."""

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


def test_processes_wait_at_the_end_while_the_leader_finishes_a_large_checkpoint(monkeypatch):
    class Initialized(Exception):
        pass

    def initialize(*args, **limits):
        assert limits["shutdown_timeout_seconds"] == 6000 and limits["heartbeat_timeout_seconds"] == 60
        raise Initialized

    monkeypatch.setattr(processes.rollcall, "call", lambda job, limit: None)
    monkeypatch.setattr(processes, "_exit_on_abort", lambda job: None)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(Initialized), parallel.joined(Job("127.0.0.1:1", 2, 0, "test"), 60, 600):
        pass


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ExitCode.STORAGE),
        (PermissionError(errno.EACCES, "Permission denied", "config.json"), ExitCode.STORAGE),
        (RunError("x", ExitCode.DATA), ExitCode.DATA),
        (ValueError("a bug"), ExitCode.CRASHED),
    ],
)
def test_a_process_of_a_job_leaves_with_the_code_of_its_error(monkeypatch, error, code):
    left = []
    monkeypatch.setattr(processes.atexit, "register", lambda leave: leave())
    monkeypatch.setattr(processes.os, "_exit", left.append)
    processes._leave(error, lost=False)
    assert left == [code]


def test_a_full_disk_of_process_0_is_told_to_the_others(monkeypatch):
    """Otherwise they would wait for it and report a lost peer."""
    told = {}

    class Client:
        key_value_set = staticmethod(told.setdefault)
        wait_at_barrier = staticmethod(lambda *_: None)

    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.distributed.global_state, "client", Client())

    def make():
        raise OSError(errno.ENOSPC, "No space left on device", "run/config.json")

    with pytest.raises(OSError, match="No space left"):
        parallel.share("run folder", make)
    [message] = told.values()
    assert json.loads(message) == {"error": "run/config.json: No space left on device", "code": ExitCode.STORAGE}
