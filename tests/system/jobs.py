"""Jobs of real processes on this machine, for the tests in this folder."""

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from gpt4o_jax.checkpoint.store import Store

CONFIG = """
from gpt4o_jax.config import base_config

def get_config():
    c = base_config()
    c.tokenizer.kind = "byte"
    c.data.source, c.data.path, c.data.holdout, c.data.shingle_bytes = "text", "TEXT", "tail", 0
    c.model.n_layers, c.model.d_model, c.model.n_heads, c.model.context_length = 1, 32, 2, 32
    c.optimizer.warmup_steps, c.optimizer.ema_decay = 4, 0.9
    c.train.length, c.train.batch_size, c.train.steps_per_dispatch = "STEPS steps", 8, 1
    c.log.every, c.log.tensorboard = 1, False
    c.eval.every, c.sample.every, c.sample.max_new_tokens = 0, 0, 8
    c.checkpoint.every = EVERY
    return c
"""


def write_inputs(folder, steps: int, every: int) -> None:
    """Writes a text, and a config that trains on it briefly."""
    chosen = random.Random(0).choices(["to", "be", "or", "not", "that", "is", "the", "question", "whether", "nobler"], k=4000)
    (folder / "text.txt").write_text(" ".join(chosen))
    config = CONFIG.replace("TEXT", str(folder / "text.txt")).replace("STEPS", str(steps)).replace("EVERY", str(every))
    (folder / "config.py").write_text(config)


def environment(folder, **variables: str) -> dict[str, str]:
    """This process's variables without those about jobs and devices; caches in `folder`, shared by all runs."""
    strange = ("JAX_", "XLA_", "SLURM_", "TPU_", "MEGASCALE_", "JOB")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(strange)}
    caches = {"XDG_CACHE_HOME": str(folder / "cache"), "JAX_COMPILATION_CACHE_DIR": str(folder / "cache" / "xla")}
    return plain | caches | {"JAX_PLATFORMS": "cpu"} | variables


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Process:
    """One training process; `step` is the last one that it has logged. program: what Python runs. name: of its run in `folder`,
    or an address, as gs://BUCKET/NAME.
    """

    def __init__(self, folder, name: str, *flags: str, program: tuple = ("-m", "gpt4o_jax"), **variables: str):
        command = [sys.executable, *program, "train", f"--config={folder / 'config.py'}"]
        command += [f"--workdir={name if '://' in name else folder / name}", *flags]
        self.process = subprocess.Popen(
            command, env=environment(folder, **variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.step, self.lines = -1, []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)
            if "] step " in line:
                self.step = int(line.split("] step ")[1].split("/")[0])

    def wait_for(self, step: int) -> None:
        """Returns once `step` was logged or the process has ended."""
        while self.step < step and self.process.poll() is None:
            time.sleep(0.01)

    def end(self, seconds: float = 300) -> int:
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = None
        self._reader.join()
        return code

    @property
    def told(self) -> str:
        return "".join(self.lines)


def start(folder, name: str, n: int, *flags: str, **variables) -> list[Process]:
    """A job of n processes; variables: their environment variables, and `program`."""
    if n == 1:
        return [Process(folder, name, *flags, **variables)]
    where = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={n}"]
    return [Process(folder, name, *where, f"--process_id={i}", *flags, **variables) for i in range(n)]


def run(folder, name: str, n: int, *flags: str, **variables) -> list[Process]:
    """A job of n processes that must succeed."""
    job = start(folder, name, n, *flags, **variables)
    codes = [p.end() for p in job]
    assert codes == [0] * n, "\n".join(f"{i}: {code}\n{p.told}" for i, (code, p) in enumerate(zip(codes, job, strict=True)))
    return job


def losses(workdir) -> list[tuple[int, float]]:
    """(step, loss) of every training record."""
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]


def digest(workdir, step: int) -> str:
    """SHA-256 over every array of a checkpoint, as restored here: parameters, optimizer, average, counters."""
    store = Store(epath.Path(workdir) / "checkpoints")
    assert step in store.steps()
    total = hashlib.sha256()
    for item in ("params", "opt_state", "ema", "counters"):
        handler = ocp.StandardCheckpointHandler()
        stored = handler.metadata(store.path(step) / item).tree
        like = jax.tree.map(lambda m: np.empty(m.shape, m.dtype), stored)  # unsharded, whatever devices it was saved on
        tree = handler.restore(store.path(step) / item, args=ocp.args.StandardRestore(like))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            array = np.asarray(leaf)
            total.update(f"{item}{jax.tree_util.keystr(path)}{array.dtype}{array.shape}".encode() + array.tobytes())
    return total.hexdigest()
