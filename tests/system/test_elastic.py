"""A run resumes from the same bits on any number of devices and processes, then drifts no more than permuted rows would.

The control: the same run in float32 with the rows of each step in another order, which changes only the order of sums.
"""

import shutil
import signal
import subprocess
import sys

import pytest

from tests.system.jobs import digest, environment, free_port, losses, run, start, write_inputs

pytestmark = [pytest.mark.system, pytest.mark.filterwarnings("ignore:Sharding info not provided")]

STEPS = 40
# (processes, devices of each)
PLACES = [(1, 4), (1, 2), (1, 1), (2, 4), (4, 1)]
named = lambda place: f"{place[0]} process(es) of {place[1]}"

PERMUTED = """
import sys

import jax
import numpy as np

from gpt4o_jax.__main__ import main
from gpt4o_jax.training import loop

seed, real = int(sys.argv.pop()), loop.dispatches


def permuted(*args):
    for step, batch in real(*args):
        order = np.random.default_rng([seed, step]).permutation(batch.tokens.shape[1])
        yield step, jax.tree.map(lambda x: x[:, order], batch)


loop.dispatches = permuted
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("elastic")
    write_inputs(made, STEPS, 10)
    return made


def train(folder, name: str, place: tuple[int, int], stop_at: int | None = None, seed: int | None = None) -> None:
    """A run, or the rest of one. stop_at: stop it by a signal once it has logged this step. seed: of the permutation of rows."""
    n, devices = place
    flags = ["--config.model.compute_dtype=float32", "--config.mesh.preset=fsdp"]
    how = dict(JAX_NUM_CPU_DEVICES=str(devices))
    if seed is not None:
        flags, how = [*flags, str(seed)], how | {"program": ("-c", PERMUTED)}
    if stop_at is None:
        run(folder, name, n, *flags, **how)
        return
    job = start(folder, name, n, *flags, **how)
    job[0].wait_for(stop_at)
    job[0].process.send_signal(signal.SIGTERM)
    assert [p.end() for p in job] == [75] * n, [p.told for p in job]


def furthest(folder, name: str, other: str, after: int = 0) -> float:
    """The largest difference of the losses of two runs after step `after`; both must have logged every step once."""
    (a, b) = (losses(folder / run) for run in (name, other))
    assert [step for step, _ in a] == [step for step, _ in b] == list(range(1, STEPS + 1))
    return max(abs(x - y) for (step, x), (_, y) in zip(a, b, strict=True) if step > after)


# ---------------------------------------------------------------- a run stopped on eight devices


@pytest.fixture(scope="module")
def stopped(folder):
    """The step at which "stopped", on eight devices, was saved."""
    train(folder, "stopped", (1, 8), stop_at=8)
    return losses(folder / "stopped")[-1][0]


@pytest.fixture(scope="module")
def control(folder, stopped):
    """How far permuted rows drift from the rest of the run on eight devices."""
    copied(folder, "whole")
    train(folder, "whole", (1, 8))
    for seed in (1, 2, 3):
        copied(folder, f"permuted {seed}")
        train(folder, f"permuted {seed}", (1, 8), seed=seed)
    found = max(furthest(folder, "whole", f"permuted {seed}", stopped) for seed in (1, 2, 3))
    assert found > 0
    return found


def copied(folder, name: str) -> None:
    shutil.copytree(folder / "stopped", folder / name)


@pytest.mark.parametrize("place", PLACES, ids=named)
def test_a_run_of_eight_devices_goes_on_elsewhere(folder, stopped, control, place):
    name = f"on {named(place)}"
    copied(folder, name)
    train(folder, name, place)
    assert furthest(folder, name, "whole", stopped) <= 4 * control


def test_a_run_of_eight_devices_goes_on_with_two_processes_and_comes_back(folder, stopped, control):
    copied(folder, "back")
    train(folder, "back", (2, 1), stop_at=stopped + 4)
    train(folder, "back", (1, 8))
    assert furthest(folder, "back", "whole", stopped) <= 4 * control


RESTORE = """
import sys

import jax
from etils import epath

from gpt4o_jax import parallel, run
from gpt4o_jax.checkpoint.store import Store
from gpt4o_jax.config import MeshConfig
from gpt4o_jax.parallel.cluster import find
from gpt4o_jax.training.loop import restore_state, save_state
from gpt4o_jax.training.program import build

index, n, port, source, target, step = *map(int, sys.argv[1:4]), *map(epath.Path, sys.argv[4:6]), int(sys.argv[6])


class Corpus:
    name, tokenizer = "c", type("Tokenizer", (), {"digest": "t"})


with parallel.joined(find(f"127.0.0.1:{port}", n, index, {}) if n > 1 else None, 60, 60):
    mesh = parallel.make_mesh(MeshConfig(data=1, fsdp=-1))
    with jax.set_mesh(mesh), Store(target / "checkpoints") as store:
        program = build(run.read_config(source), mesh)
        state = restore_state(Store(source / "checkpoints"), step, program.shapes, program.shardings)
        save_state(store, step, state, state.ema, Corpus)
"""


def test_arrays_are_the_same_on_any_number_of_devices_and_processes(folder, stopped):
    """Saved by one process with eight devices, then restored, sharded over all devices and saved by each place, then by eight."""
    before, wanted = folder / "stopped", digest(folder / "stopped", stopped)
    for place in [*PLACES, (1, 8)]:
        (n, devices), port = place, str(free_port())
        after = folder / f"arrays {named(place)}"
        after.mkdir()
        command = lambda i: [sys.executable, "-c", RESTORE, str(i), str(n), port, str(before), str(after), str(stopped)]
        variables = environment(folder, JAX_NUM_CPU_DEVICES=str(devices))
        job = [subprocess.Popen(command(i), env=variables, stderr=subprocess.PIPE, text=True) for i in range(n)]
        told = [p.communicate(timeout=300)[1] for p in job]
        assert [p.returncode for p in job] == [0] * n, told
        assert digest(after, stopped) == wanted
        shutil.copy(before / "config.json", after)
        before = after


# ---------------------------------------------------------------- runs started by several processes


def test_fresh_runs_of_one_two_and_four_processes_are_as_near_as_permuted_rows(folder):
    for name, place, seed in [("of 1", (1, 1), None), ("of 2", (2, 1), None), ("of 4", (4, 1), None)] + [
        (f"of 1, permuted {seed}", (1, 1), seed) for seed in (1, 2, 3)
    ]:
        train(folder, name, place, seed=seed)
    allowed = 4 * max(furthest(folder, "of 1", f"of 1, permuted {seed}") for seed in (1, 2, 3))
    assert 0 < furthest(folder, "of 1", "of 2") <= allowed
    assert 0 < furthest(folder, "of 1", "of 4") <= allowed
