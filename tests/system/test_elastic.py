"""A run resumes from the same bits on any mesh, devices and processes, then drifts no more than permuted rows would.

The control: the same run in float32 with the rows of each step in another order, which changes only the order of sums.
"""

import json
import shutil
import signal
import subprocess
import sys
from typing import NamedTuple

import pytest

from tests.system.jobs import digest, environment, free_port, losses, run, start, write_inputs

pytestmark = [pytest.mark.system, pytest.mark.filterwarnings("ignore:Sharding info not provided")]

STEPS = 40


class Place(NamedTuple):
    processes: int
    devices: int  # of each process
    mesh: str = "fsdp=-1"
    more: str = ""  # knobs that fewer devices may need

    def __str__(self):
        return " ".join([f"{self.processes} process(es) of {self.devices},", self.mesh, self.more]).strip()


EIGHT = Place(1, 8)
# Where the dense model goes on that was saved on eight devices, and where the mixture of experts does.
PLACES = {
    "dense": [
        Place(1, 4),
        Place(1, 2, more="train.accumulate=2 model.remat=full"),
        Place(1, 1),
        Place(2, 4),
        Place(4, 1),
        Place(2, 4, "context=4 tensor=2"),
    ],
    "experts": [
        Place(1, 8, "fsdp=2 tensor=2 context=2"),
        Place(1, 8, "expert=4 fsdp=2"),
        Place(1, 8, "stage=2 fsdp=4"),
        Place(2, 1, "stage=2"),
        Place(2, 4, "stage=2 expert=2 tensor=2"),
    ],
}
MODELS = {
    "dense": [],
    "experts": ["--config.model.n_layers=2", "--config.model.n_experts=4", "--config.model.n_shared_experts=1"],
}
GOING_ON = [(model, place) for model, places in PLACES.items() for place in places]

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


def train(folder, name: str, place: Place, model: str = "dense", stop_at: int | None = None, seed: int | None = None) -> None:
    """A run, or the rest of one. stop_at: stop it by a signal once it has logged this step. seed: of the permutation of rows."""
    flags = ["--config.model.compute_dtype=float32", *MODELS[model]]
    flags += [f"--config.mesh.{size}" for size in place.mesh.split()] + [f"--config.{knob}" for knob in place.more.split()]
    how = dict(JAX_NUM_CPU_DEVICES=str(place.devices))
    if seed is not None:
        flags, how = [*flags, str(seed)], how | {"program": ("-c", PERMUTED)}
    if stop_at is None:
        run(folder, name, place.processes, *flags, **how)
        return
    job = start(folder, name, place.processes, *flags, **how)
    job[0].wait_for(stop_at)
    job[0].process.send_signal(signal.SIGTERM)
    assert [p.end() for p in job] == [75] * place.processes, [p.told for p in job]


def furthest(folder, name: str, other: str, after: int = 0) -> float:
    """The largest difference of the losses of two runs after step `after`; both must have logged every step once."""
    (a, b) = (losses(folder / run) for run in (name, other))
    assert [step for step, _ in a] == [step for step, _ in b] == list(range(1, STEPS + 1))
    return max(abs(x - y) for (step, x), (_, y) in zip(a, b, strict=True) if step > after)


# ---------------------------------------------------------------- a run stopped on eight devices


@pytest.fixture(scope="module")
def stopped(folder):
    """model -> the step at which its run "MODEL stopped", on eight devices, was saved."""
    for model in MODELS:
        train(folder, f"{model} stopped", EIGHT, model, stop_at=8)
    return {model: losses(folder / f"{model} stopped")[-1][0] for model in MODELS}


@pytest.fixture(scope="module")
def controls(folder, stopped):
    """model -> how far permuted rows drift from the rest of its run on eight devices."""
    return {model: control(folder, model, step) for model, step in stopped.items()}


def control(folder, model: str, step: int) -> float:
    copied(folder, model, "whole")
    train(folder, f"{model} whole", EIGHT, model)
    for seed in (1, 2, 3):
        copied(folder, model, f"permuted {seed}")
        train(folder, f"{model} permuted {seed}", EIGHT, model, seed=seed)
    found = max(furthest(folder, f"{model} whole", f"{model} permuted {seed}", step) for seed in (1, 2, 3))
    assert found > 0
    return found


def copied(folder, model: str, name: str) -> None:
    shutil.copytree(folder / f"{model} stopped", folder / f"{model} {name}")


@pytest.mark.parametrize(("model", "place"), GOING_ON, ids=str)
def test_a_run_of_eight_devices_goes_on_elsewhere(folder, stopped, controls, model, place):
    name = f"{model} on {place}"
    copied(folder, model, f"on {place}")
    train(folder, name, place, model)
    assert furthest(folder, name, f"{model} whole", stopped[model]) <= 4 * controls[model]


@pytest.mark.parametrize(("model", "place"), [("dense", Place(2, 1)), ("experts", PLACES["experts"][-1])], ids=str)
def test_a_run_of_eight_devices_goes_on_with_two_processes_and_comes_back(folder, stopped, controls, model, place):
    name = f"{model} back"
    copied(folder, model, "back")
    train(folder, name, place, model, stop_at=stopped[model] + 4)
    train(folder, name, EIGHT, model)
    assert furthest(folder, name, f"{model} whole", stopped[model]) <= 4 * controls[model]


RESTORE = """
import json
import sys

import jax
from etils import epath

from gpt4o_jax import parallel, run
from gpt4o_jax.checkpoint.store import Store
from gpt4o_jax.config import MeshConfig
from gpt4o_jax.parallel.cluster import find
from gpt4o_jax.training.checkpoints import restore_state, save_state
from gpt4o_jax.training.program import build

index, n, port, step = map(int, sys.argv[1:5])
source, target, sizes = *map(epath.Path, sys.argv[5:7]), json.loads(sys.argv[7])


class Corpus:
    name, tokenizer = "c", type("Tokenizer", (), {"digest": "t"})


with parallel.joined(find(f"127.0.0.1:{port}", n, index, {}) if n > 1 else None, 60, 60):
    mesh = parallel.make_mesh(MeshConfig(**sizes))
    with jax.set_mesh(mesh), Store(target / "checkpoints") as store:
        program = build(run.read_config(source), mesh)
        state = restore_state(Store(source / "checkpoints"), step, program.shapes, program.shardings)
        save_state(store, step, state, state.ema, Corpus)
"""


@pytest.mark.parametrize("model", MODELS)
def test_arrays_are_the_same_on_any_mesh(folder, stopped, model):
    """Saved by one process with eight devices, then restored into its shards and saved by each place, then by eight."""
    before, step = folder / f"{model} stopped", stopped[model]
    wanted = digest(before, step)
    for place in [*PLACES[model], EIGHT]:
        after, port = folder / f"{model} arrays {place}", free_port()
        after.mkdir()
        sizes = json.dumps({axis: int(n) for axis, n in (size.split("=") for size in place.mesh.split())})
        rest = [str(x) for x in (place.processes, port, step, before, after, sizes)]
        variables = environment(folder, JAX_NUM_CPU_DEVICES=str(place.devices))
        job = [
            subprocess.Popen([sys.executable, "-c", RESTORE, str(i), *rest], env=variables, stderr=subprocess.PIPE, text=True)
            for i in range(place.processes)
        ]
        told = [p.communicate(timeout=300)[1] for p in job]
        assert [p.returncode for p in job] == [0] * place.processes, told
        assert digest(after, step) == wanted
        shutil.copy(before / "config.json", after)
        before = after


# ---------------------------------------------------------------- runs started by several processes


def test_fresh_runs_of_one_two_and_four_processes_are_as_near_as_permuted_rows(folder):
    for n in (1, 2, 4):
        train(folder, f"of {n}", Place(n, 1))
    for seed in (1, 2, 3):
        train(folder, f"of 1, permuted {seed}", Place(1, 1), seed=seed)
    allowed = 4 * max(furthest(folder, "of 1", f"of 1, permuted {seed}") for seed in (1, 2, 3))
    assert 0 < furthest(folder, "of 1", "of 2") <= allowed
    assert 0 < furthest(folder, "of 1", "of 4") <= allowed
