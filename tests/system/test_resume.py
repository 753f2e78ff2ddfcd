"""A run that was stopped or killed, however often, ends with the same bits as an uninterrupted one.

Real processes: `python -m gpt4o_jax train` on a small text, one CPU device, a checkpoint every few steps.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from gpt4o_jax.checkpoint.store import Store

pytestmark = [pytest.mark.system, pytest.mark.filterwarnings("ignore:Sharding info not provided")]

STEPS, EVERY, KILLS = 300, 5, 20
CONFIG = f"""
from gpt4o_jax.config import base_config

def get_config():
    c = base_config()
    c.tokenizer.kind = "byte"
    c.data.source, c.data.path, c.data.holdout, c.data.shingle_bytes = "text", "TEXT", "tail", 0
    c.model.n_layers, c.model.d_model, c.model.n_heads, c.model.context_length = 1, 32, 2, 32
    c.optimizer.name, c.optimizer.warmup_steps, c.optimizer.ema_decay = "muon", 10, 0.9
    c.train.length, c.train.batch_size, c.train.steps_per_dispatch = "{STEPS} steps", 4, 1
    c.log.every, c.log.tensorboard = 1, False
    c.eval.every, c.sample.every, c.sample.max_new_tokens = 100, 0, 8
    c.checkpoint.every = {EVERY}
    return c
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text, a config, and caches shared by all runs."""
    made = tmp_path_factory.mktemp("resume")
    words = ["to", "be", "or", "not", "that", "is", "the", "question", "whether", "nobler"]
    chosen = random.Random(0).choices(words, k=4000)
    (made / "text.txt").write_text(" ".join(chosen))
    (made / "config.py").write_text(CONFIG.replace("TEXT", str(made / "text.txt")))
    return made


class Run:
    """A training process; `step` is the last one that it has logged."""

    def __init__(self, folder, name: str, *flags: str, **variables: str):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        environment |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache")}
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache" / "xla"), "PYTHONHASHSEED": "0"} | variables
        command = [sys.executable, "-m", "gpt4o_jax", "train", f"--config={folder / 'config.py'}", f"--workdir={folder / name}"]
        command += flags
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.step, self.lines = -1, []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)
            if "] step " in line:
                self.step = int(line.split("] step ")[1].split("/")[0])

    def wait_for(self, step: int):
        """Returns once `step` was logged or the process has ended."""
        while self.step < step and self.process.poll() is None:
            time.sleep(0.002)

    def end(self) -> int:
        code = self.process.wait(timeout=600)
        self._reader.join()
        return code


def digest(workdir, steps: int = STEPS) -> str:
    """SHA-256 over every array of the last checkpoint, as restored: parameters, optimizer, average, counters."""
    store = Store(epath.Path(workdir) / "checkpoints")
    assert store.steps()[-1] == steps
    total = hashlib.sha256()
    for item in ("params", "opt_state", "ema", "counters"):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.restore(store.path(steps) / item)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            array = np.asarray(leaf)
            total.update(f"{item}{jax.tree_util.keystr(path)}{array.dtype}{array.shape}".encode() + array.tobytes())
    return total.hexdigest()


def losses(workdir) -> list[tuple]:
    """(kind, step, loss) of every record, in file order."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [(r["kind"], r["step"], r["loss"]) for r in map(json.loads, lines)]


@pytest.fixture(scope="module")
def undisturbed(folder):
    """(digest, losses) of an uninterrupted run."""
    run = Run(folder, "undisturbed")
    assert run.end() == 0, "".join(run.lines)
    return digest(folder / "undisturbed"), losses(folder / "undisturbed")


def test_it_tells_each_step_once_and_learns(undisturbed):
    _, records = undisturbed
    steps = [step for kind, step, _ in records if kind == "train"]
    assert steps == list(range(1, STEPS + 1)), "each step once, in order"
    assert records[0][2] > records[-1][2] + 1


CIRCUMSTANCES = {
    "warm": ((), {}),
    "hash seed": ((), {"PYTHONHASHSEED": "4711"}),
    "workers": (("--config.data.workers=3", "--config.data.prefetch=7"), {}),
    "profile": (("--profile=100:110",), {}),
    "cold": ((), {"JAX_COMPILATION_CACHE_DIR": "new"}),
}


@pytest.mark.parametrize("what", CIRCUMSTANCES)
def test_the_same_run_gives_the_same_bits_whatever_the_circumstances(folder, undisturbed, what):
    """Another hash seed, threads that build batches, a profile, programs compiled again or taken from the cache."""
    flags, variables = CIRCUMSTANCES[what]
    cache = folder / "cache" / variables.get("JAX_COMPILATION_CACHE_DIR", "xla")
    compiled = lambda: {p.name for p in cache.glob("*-cache")}
    before = compiled()
    run = Run(folder, what, *flags, **variables | {"JAX_COMPILATION_CACHE_DIR": str(cache)})
    assert run.end() == 0, "".join(run.lines)
    assert (digest(folder / what), losses(folder / what)) == undisturbed
    assert bool(before) == (what != "cold") and compiled()
    assert what != "warm" or compiled() == before, "nothing was compiled again"
    assert what != "profile" or any((folder / what / "profile").rglob("*.xplane.pb"))


def test_a_signal_saves_and_the_same_command_goes_on(folder, undisturbed):
    """SIGTERM, then SIGINT: exit code 75 and a checkpoint at exactly that step, which is no multiple of checkpoint.every."""
    workdir = folder / "stopped"
    for number, step in ((signal.SIGTERM, 71), (signal.SIGINT, 163)):
        run = Run(folder, "stopped")
        run.wait_for(step)
        run.process.send_signal(number)
        assert run.end() == 75, "".join(run.lines)
        saved = Store(epath.Path(workdir) / "checkpoints").steps()[-1]
        assert step <= saved < STEPS and f"at step {saved} of {STEPS}, saved" in run.lines[-1]
        assert losses(workdir) == [r for r in undisturbed[1] if r[1] <= saved]
    last = Run(folder, "stopped")
    assert last.end() == 0, "".join(last.lines)
    assert any(f"continuing from step {saved} of" in line for line in last.lines)
    assert (digest(workdir), losses(workdir)) == undisturbed


def test_twenty_kills_change_no_bit(folder, undisturbed):
    """SIGKILL at random moments: during start-up, between steps, while a checkpoint is written."""
    moments, workdir, reached = random.Random(0), folder / "killed", []
    for kill in range(KILLS):
        run = Run(folder, "killed")
        if kill % 5 == 4:
            time.sleep(moments.uniform(0, 5))  # somewhere during start-up
        else:
            run.wait_for(max(reached, default=0) + moments.randint(1, STEPS // KILLS))
            time.sleep(moments.uniform(0, 0.1))
        run.process.kill()
        assert run.end() == -signal.SIGKILL, "".join(run.lines)
        assert not any("damaged" in line for line in run.lines), "".join(run.lines)
        reached.append(run.step)
    print("steps reached before each kill:", reached)
    assert max(reached) > STEPS / 4
    last = Run(folder, "killed")
    assert last.end() == 0, "".join(last.lines)
    assert any("continuing from step" in line for line in last.lines)
    assert (digest(workdir), losses(workdir)) == undisturbed


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor", "schedule_free"])
def test_kills_change_no_bit_of_any_optimizer(folder, optimizer):
    """Three SIGKILLs in 60 steps, two of them while the batch grows; the tests above cover Muon."""
    flags = (
        f"--config.optimizer.name={optimizer}",
        "--config.optimizer.schedule=constant",
        f"--config.optimizer.ema_decay={0.0 if optimizer == 'schedule_free' else 0.9}",
        "--config.train.length=60 steps",
        "--config.train.accumulate=4",
        "--config.train.batch_warmup_steps=40",
    )
    whole = Run(folder, f"{optimizer}_whole", *flags)
    assert whole.end() == 0, "".join(whole.lines)
    for step in (13, 31, 52):
        run = Run(folder, optimizer, *flags)
        run.wait_for(step)
        run.process.kill()
        assert run.end() == -signal.SIGKILL, "".join(run.lines)
    last = Run(folder, optimizer, *flags)
    assert last.end() == 0, "".join(last.lines)
    assert digest(folder / optimizer, 60) == digest(folder / f"{optimizer}_whole", 60)
    assert losses(folder / optimizer) == losses(folder / f"{optimizer}_whole")


def test_kills_change_no_bit_of_a_mixture_of_experts(folder):
    """Three SIGKILLs in 60 steps: the routers' biases, which no optimizer moves, are restored with the rest."""
    flags = (
        "--config.model.n_experts=4",
        "--config.model.router_bias=True",
        "--config.train.length=60 steps",
        "--config.checkpoint.every=20",
    )
    whole = Run(folder, "experts_whole", *flags)
    assert whole.end() == 0, "".join(whole.lines)
    for step in (13, 27, 52):
        run = Run(folder, "experts", *flags)
        run.wait_for(step)
        run.process.kill()
        assert run.end() == -signal.SIGKILL, "".join(run.lines)
    last = Run(folder, "experts", *flags)
    assert last.end() == 0, "".join(last.lines)
    assert digest(folder / "experts", 60) == digest(folder / "experts_whole", 60)
    assert losses(folder / "experts") == losses(folder / "experts_whole")
