"""1, 2 and 4 real, connected processes each build their rows of the batch and together hold the whole batch."""

import subprocess
import sys

import pytest

from tests.system.jobs import environment, free_port

pytestmark = pytest.mark.system

SCRIPT = """
import sys
import jax
import numpy as np

from gpt4o_jax import parallel
from gpt4o_jax.config import MeshConfig
from gpt4o_jax.data.batches import dispatches
from gpt4o_jax.data.rows import PackedRows
from gpt4o_jax.data.token_cache import TokenCache
from gpt4o_jax.parallel.cluster import find

index, n, port = map(int, sys.argv[1:])
jax.config.update("jax_num_cpu_devices", 8 // n)
job = find(f"127.0.0.1:{port}", n, index, {})
session = parallel.joined(job, 60, 60)
session.__enter__()
assert (jax.process_count(), jax.process_index(), jax.device_count()) == (n, index, 8)

K, B, T = 2, 16, 8
offsets = np.arange(0, 1001, 20)
rows = PackedRows(TokenCache(np.arange(3, 1003, dtype=np.uint16), offsets, 0), T, seed=0)
for config in (MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, tensor=8)):
    mesh = parallel.make_mesh(config)
    sharding = jax.sharding.NamedSharding(mesh, parallel.spec((None, "batch", "seq")))
    places = parallel.places(sharding, (K, B, T), 1)
    assert len(places) == (B if config.tensor == 8 else B // n), places
    everything = dispatches(rows, 0, 6, K, B, 1)
    for step, share in dispatches(rows, 0, 6, K, B, 1, places=places):
        _, whole = next(everything)
        batch = jax.make_array_from_process_local_data(sharding, share, (K, B, T))
        for leaf, expected in zip(jax.tree.leaves(batch), jax.tree.leaves(whole), strict=True):
            assert leaf.shape == (K, B, T) and len(leaf.addressable_shards) == 8 // n
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(shard.data, expected[shard.index])
        with jax.set_mesh(mesh):
            total = jax.jit(lambda b: b.tokens.sum(), out_shardings=jax.sharding.NamedSharding(mesh, jax.P()))(batch)
        assert int(total) == whole.tokens.sum()
session.__exit__(None, None, None)
print("same", jax.process_count())
"""


@pytest.mark.parametrize("n", [1, 2, 4])
def test_processes_hold_the_batch_of_one(tmp_path, n):
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(i), str(n), port],
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(n)
    ]
    try:
        for process in started:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0 and f"same {n}" in out, err
    finally:
        for process in started:
            process.kill()
