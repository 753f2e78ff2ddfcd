"""Two real processes, joined by jax.distributed: each builds its rows of the batch, and together they hold the whole one."""

import os
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.system

SCRIPT = """
import sys
import jax
import numpy as np

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[1]))

from gpt4o_jax import parallel
from gpt4o_jax.config import MeshConfig
from gpt4o_jax.data.batches import dispatches
from gpt4o_jax.data.rows import PackedRows
from gpt4o_jax.data.token_cache import TokenCache

K, B, T = 2, 16, 8
offsets = np.arange(0, 1001, 20)
rows = PackedRows(TokenCache(np.arange(3, 1003, dtype=np.uint16), offsets, 0), T, seed=0)
for config in (MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, tensor=8)):
    mesh = parallel.make_mesh(config)
    sharding = jax.sharding.NamedSharding(mesh, parallel.spec((None, "batch", "seq")))
    places = parallel.places(sharding, (K, B, T), 1)
    assert len(places) == (B if config.tensor == 8 else B // 2), places
    everything = dispatches(rows, 0, 6, K, B, 1)
    for step, share in dispatches(rows, 0, 6, K, B, 1, places=places):
        _, whole = next(everything)
        batch = jax.make_array_from_process_local_data(sharding, share, (K, B, T))
        for leaf, expected in zip(jax.tree.leaves(batch), jax.tree.leaves(whole), strict=True):
            assert leaf.shape == (K, B, T) and len(leaf.addressable_shards) == 4
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(shard.data, expected[shard.index])
        with jax.set_mesh(mesh):
            total = jax.jit(lambda b: b.tokens.sum(), out_shardings=jax.sharding.NamedSharding(mesh, jax.P()))(batch)
        assert int(total) == whole.tokens.sum()
print("same", jax.process_count())
jax.distributed.shutdown()
"""


def test_two_processes_hold_the_batch_of_one():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))} | {"JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(i), port],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in (0, 1)
    ]
    try:
        for process in started:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0 and "same 2" in out, err
    finally:
        for process in started:
            process.kill()
