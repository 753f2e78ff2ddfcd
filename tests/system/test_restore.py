"""A checkpoint is restored directly into shards: a process restoring its part never holds a whole leaf, even temporarily.

Four processes with two devices each restore what one process with eight devices wrote (fsdp=8); each reports the peak growth
of its memory. The state is mostly two tables, a parameter and its moment, each larger than all that a process should hold.
"""

import json
import subprocess
import sys

import pytest

from tests.system.jobs import environment, free_port

pytestmark = [pytest.mark.system, pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")]

SCRIPT = """
import json
import resource
import sys

import jax
from etils import epath

from gpt4o_jax import parallel
from gpt4o_jax.checkpoint.store import Store
from gpt4o_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from gpt4o_jax.parallel.cluster import find
from gpt4o_jax.training.checkpoints import restore_state, save_state
from gpt4o_jax.training.program import build

task, folder = sys.argv[1:3]
devices, n, index, port = map(int, sys.argv[3:])
jax.config.update("jax_num_cpu_devices", devices)
session = parallel.joined(find(f"127.0.0.1:{port}", n, index, {}) if n > 1 else None, 60, 60)
session.__enter__()
model = ModelConfig(
    vocab_size=65_536, d_model=1024, tied=True, n_layers=1, n_heads=8, d_ff=128, context_length=8, compute_dtype="float32"
)
config = RunConfig(model=model, optimizer=OptimizerConfig(name="lion"), mesh=MeshConfig(preset="fsdp"))
program, told = build(config, parallel.make_mesh(config.mesh)), {}


class Corpus:
    name, tokenizer = "c", type("Tokenizer", (), {"digest": "t"})


with Store(epath.Path(folder)) as store, jax.set_mesh(program.mesh):
    if task == "save":
        state = program.fresh(jax.random.key(0))
        save_state(store, 0, state, state.params, Corpus)
        store.finish()
    else:
        with open("/proc/self/statm") as f:
            before = int(f.read().split()[1]) * resource.getpagesize()
        state = jax.block_until_ready(restore_state(store, 0, program.shapes, program.shardings))
        told["grown"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        leaves = [x for x in jax.tree.leaves((state.params, state.opt_state)) if x.ndim > 2 or x.nbytes > 2**20]  # no norms
        told["parts"] = [[s.data.nbytes / x.nbytes for s in x.addressable_shards] for x in leaves]
        told["largest"] = max(x.nbytes for x in leaves)
session.__exit__(None, None, None)
print(json.dumps(told))
"""


def told_by(tmp_path, task: str, devices: int, n: int) -> list[dict]:
    """The reports of n processes with this many devices each."""
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, task, str(tmp_path / "checkpoints"), str(devices), str(n), str(i), port],
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(n)
    ]
    told = []
    try:
        for process in started:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
            told.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in started:
            process.kill()
    return told


def test_a_process_never_holds_a_leaf_whole(tmp_path):
    told_by(tmp_path, "save", devices=8, n=1)
    for told in told_by(tmp_path, "restore", devices=2, n=4):
        assert len(told["parts"]) > 10 and all(parts == [1 / 8] * 2 for parts in told["parts"])
        assert told["grown"] < told["largest"], "0.54 of it is what its shards take, the rest what it takes to read them"
    (whole,) = told_by(tmp_path, "restore", devices=1, n=1)
    assert whole["grown"] > 2 * whole["largest"], "what is whole would show"
