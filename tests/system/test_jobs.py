"""A run of several processes: the same bits again, stopped and killed, on another number of processes; every mistake one line."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.system.jobs import Process, digest, environment, free_port, run, start, write_inputs

pytestmark = [pytest.mark.system, pytest.mark.filterwarnings("ignore:Sharding info not provided")]

STEPS, EVERY = 40, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("jobs")
    write_inputs(made, STEPS, EVERY)
    return made


@pytest.fixture(scope="module")
def undisturbed(folder):
    """(digest, losses) of a run of two processes that nobody touched."""
    job = run(folder, "undisturbed", 2)
    assert "2 processes, 2 devices" in job[0].told and "] step " in job[0].told
    assert "step" not in job[1].told, "told once"
    return digest(folder / "undisturbed", STEPS), losses(folder / "undisturbed")


def losses(workdir) -> list[tuple]:
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]


def test_each_step_is_told_once_and_the_same_again(folder, undisturbed):
    assert [step for step, _ in undisturbed[1]] == list(range(1, STEPS + 1))
    run(folder, "again", 2)
    assert (digest(folder / "again", STEPS), losses(folder / "again")) == undisturbed


@pytest.mark.parametrize("who", [0, 1])
def test_a_signal_to_one_stops_all_at_one_step_and_the_run_goes_on_to_the_same_bits(folder, undisturbed, who):
    name = f"signal {who}"
    job = start(folder, name, 2)
    job[0].wait_for(13)
    job[who].process.send_signal(signal.SIGTERM)
    assert [p.end() for p in job] == [75, 75], job[0].told + job[1].told
    (said,) = {line.split("gpt4o_jax: ")[1] for p in job for line in p.lines if "stopped by" in line}
    stopped = int(said.split("at step ")[1].split()[0])
    assert 13 < stopped < STEPS and digest(folder / name, stopped)
    run(folder, name, 2)
    assert (digest(folder / name, STEPS), losses(folder / name)) == undisturbed


@pytest.mark.parametrize("who, how", [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_peer_that_is_lost_ends_the_others_and_the_run_goes_on_to_the_same_bits(folder, undisturbed, who, how):
    name = f"lost {who} {how}"
    job = start(folder, name, 2, "--peer_timeout=10")
    job[0].wait_for(15)
    job[who].process.send_signal(how)
    before = time.monotonic()
    assert job[1 - who].end(120) == 76, job[1 - who].told
    assert time.monotonic() - before < 60
    assert "a peer was lost" in job[1 - who].told
    job[who].process.kill()
    job[who].end()
    run(folder, name, 2)
    assert (digest(folder / name, STEPS), losses(folder / name)) == undisturbed


STUCK = """
import sys, time
from gpt4o_jax import parallel
from gpt4o_jax.parallel.cluster import find
with parallel.joined(find("127.0.0.1:" + sys.argv[2], 2, int(sys.argv[1]), {}), 60, 4) as peers:
    peers.at("step 7" if sys.argv[1] == "0" else "data")
    time.sleep(100)
"""


def test_a_peer_that_is_stuck_is_told_with_its_place(folder):
    port = str(free_port())
    command = lambda i: [sys.executable, "-c", STUCK, str(i), port]
    job = [subprocess.Popen(command(i), env=environment(folder), stderr=subprocess.PIPE, text=True) for i in (0, 1)]
    told = [p.communicate(timeout=120)[1] for p in job]
    assert [p.returncode for p in job] == [76, 76], told
    assert any("a peer is stuck" in t and "process 0: step 7, for" in t and "process 1: data, for" in t for t in told), told


JOINED = """
import sys, time
from gpt4o_jax import parallel
from gpt4o_jax.parallel.cluster import find
with parallel.joined(find("127.0.0.1:" + sys.argv[2], 2, int(sys.argv[1]), {}), 60, 60):
    print("joined", flush=True)
    time.sleep(100)
"""


def test_sigterm_ends_a_process_that_has_joined_and_does_not_train_yet(folder):
    port = str(free_port())
    command = lambda i: [sys.executable, "-c", JOINED, str(i), port]
    job = [subprocess.Popen(command(i), env=environment(folder), stdout=subprocess.PIPE, text=True) for i in (0, 1)]
    assert [p.stdout.readline() for p in job] == ["joined\n"] * 2
    for p in job:
        p.terminate()
    try:
        codes = [p.wait(30) for p in job]
    finally:
        for p in job:
            p.kill()
    assert -signal.SIGTERM in codes and set(codes) <= {-signal.SIGTERM, 76}, "76: saw the other one go first"


RESTORE = """
import sys
import jax
from etils import epath
from gpt4o_jax import parallel, run
from gpt4o_jax.checkpoint.store import Store
from gpt4o_jax.config import MeshConfig
from gpt4o_jax.parallel.cluster import find
from gpt4o_jax.training.loop import restore_state
from gpt4o_jax.training.program import build

index, n, port, source, target, step = *map(int, sys.argv[1:4]), *map(epath.Path, sys.argv[4:6]), int(sys.argv[6])
with parallel.joined(find(f"127.0.0.1:{port}", n, index, {}), 60, 60):
    config = run.read_config(source)
    mesh = parallel.make_mesh(MeshConfig(data=1, fsdp=-1))
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        state = restore_state(Store(source / "checkpoints"), step, program.shapes, program.shardings)
        counters = {"step": state.step, "skipped_steps": state.skipped_steps, "skipped_in_a_row": state.skipped_in_a_row}
        counters["rng"] = jax.random.key_data(state.rng)
        items = {"params": state.params, "opt_state": state.opt_state, "ema": state.ema, "counters": counters}
        with Store(target / "checkpoints") as store:
            store.save(step, items, {"step": step})
"""


def test_samples_and_answers_of_a_model_that_lies_over_processes(folder):
    """While it trains; as many prompts as make rows that are split over both."""
    knobs = {
        "train.length": "2 steps", "mesh.data": 1, "mesh.fsdp": 2, "model.context_length": 64, "sample.every": 1,
        "sample.prompts": "('to', 'not')", "eval.batch_size": 2, "eval.tasks": "('arithmetic',)", "eval.task_items": 1,
    }  # fmt: skip
    run(folder, "answers", 2, *(f"--config.{knob}={value}" for knob, value in knobs.items()))
    for step in (1, 2):
        assert (folder / "answers" / "samples" / f"{step}.txt").read_text().startswith("[0] to")
    *_, last = map(json.loads, (folder / "answers" / "metrics.jsonl").read_text().splitlines())
    assert (last["kind"], last["step"]) == ("eval", 2) and 0 <= last["arithmetic/exact_match"] <= 1


def test_arrays_are_the_same_on_any_number_of_processes(folder, undisturbed):
    """Saved by 2, restored and saved again by 1, by 4, by 2; sharded over all their devices."""
    before = folder / "undisturbed"
    for n in (1, 4, 2):
        after, port = folder / f"on {n}", str(free_port())
        if n > 1:
            after.mkdir()
        command = lambda i: [sys.executable, "-c", RESTORE, str(i), str(n), port, str(before), str(after), str(STEPS)]
        job = [subprocess.Popen(command(i), env=environment(folder), stderr=subprocess.PIPE, text=True) for i in range(n)]
        told = [p.communicate(timeout=300)[1] for p in job]
        assert [p.returncode for p in job] == [0] * n, told
        assert digest(after, STEPS) == undisturbed[0]
        (after / "config.json").write_text((before / "config.json").read_text())
        before = after


def test_a_run_of_two_goes_on_with_one_and_with_four(folder, undisturbed):
    job = start(folder, "elastic", 2)
    job[0].wait_for(5)
    job[1].process.send_signal(signal.SIGTERM)
    assert [p.end() for p in job] == [75, 75], job[0].told + job[1].told
    (one,) = start(folder, "elastic", 1)
    one.wait_for(20)
    one.process.send_signal(signal.SIGTERM)
    assert one.end() == 75 and "continuing from step" in one.told
    (last, *_) = run(folder, "elastic", 4)
    assert "continuing from step" in last.told
    got, expected = losses(folder / "elastic"), undisturbed[1]
    assert [step for step, _ in got] == [step for step, _ in expected]
    assert max(abs(a[1] - b[1]) for a, b in zip(got, expected, strict=True)) < 0.02  # bfloat16, sums in another order


def test_a_mistake_met_by_the_leader_is_told_by_all(folder):
    (folder / "foreign").mkdir(exist_ok=True)
    (folder / "foreign" / "file").write_text("")
    job = start(folder, "foreign", 2)
    assert [p.end() for p in job] == [2, 2]
    assert all("not empty and no run folder" in p.told and "Traceback" not in p.told for p in job)


@pytest.mark.parametrize(
    "code, message, flags, variables",
    [
        (2, "process id 5 of 2 processes", ("--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=5"), {}),
        (2, "JAX_PLATFORMS=tpu: no such device here", (), {"JAX_PLATFORMS": "tpu", "TPU_SKIP_MDS_QUERY": "1"}),
        (
            76,
            "coordinator 127.0.0.1:1 (flags) not reached within 2 s",
            ("--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=1", "--start_timeout=2"),
            {},
        ),
    ],
)
def test_a_process_that_cannot_join_says_so_in_one_line(folder, code, message, flags, variables):
    alone = Process(folder, "never", *flags, **variables)
    assert alone.end() == code, alone.told
    (line,) = [line for line in alone.lines if line.startswith("gpt4o_jax: ")]
    assert message in line and "Traceback" not in alone.told
    assert not (folder / "never").exists()
