"""A run of several processes gives the same bits when repeated, stopped or killed; every mistake is one line.

On another number of processes and devices: test_elastic.py."""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.system.jobs import Process, digest, environment, free_port, losses, run, start, write_inputs

pytestmark = [pytest.mark.system, pytest.mark.filterwarnings("ignore:Sharding info not provided")]

STEPS, EVERY = 40, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("jobs")
    write_inputs(made, STEPS, EVERY)
    return made


@pytest.fixture(scope="module")
def undisturbed(folder):
    """(digest, losses) of an uninterrupted run of two processes."""
    job = run(folder, "undisturbed", 2)
    assert "2 processes, 2 devices" in job[0].told and "] step " in job[0].told
    assert "step" not in job[1].told, "told once"
    return digest(folder / "undisturbed", STEPS), losses(folder / "undisturbed")


def test_each_step_is_told_once(undisturbed):
    assert [step for step, _ in undisturbed[1]] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_repeat_gives_the_same_bits(folder, undisturbed, n):
    first, again = "undisturbed" if n == 2 else f"first of {n}", f"again of {n}"
    for name in (first, again)[n == 2 :]:
        run(folder, name, n)
    a, b = ((digest(folder / name, STEPS), losses(folder / name)) for name in (first, again))
    assert a == b


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


SLEEPS = """
import sys, time
from gpt4o_jax.__main__ import main
from gpt4o_jax.training import loop
from gpt4o_jax.training.program import Program

if "--process_id=1" in sys.argv:
    if sys.argv.pop() == "state":
        loop.restore_state = Program.fresh = lambda *args: time.sleep(1000)
    else:
        Program.compile = lambda *args: time.sleep(1000)
else:
    sys.argv.pop()
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("where, told", [("state", "is at the state"), ("compile", "is at compiling")])
def test_a_peer_that_is_stuck_before_the_first_step_is_told_too(folder, where, told):
    job = start(folder, f"stuck in {where}", 2, "--peer_timeout=3", where, program=("-c", SLEEPS))
    assert [p.end(120) for p in job] == [76, 76], [p.told for p in job]
    assert any("a peer is stuck: process" in p.told and told in p.told for p in job), [p.told for p in job]


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


def test_samples_and_answers_of_a_model_that_lies_over_processes(folder):
    """During training, with enough prompts that their rows are split over both processes."""
    knobs = {
        "train.length": "2 steps", "mesh.data": 1, "mesh.fsdp": 2, "model.context_length": 64, "sample.every": 1,
        "sample.prompts": "('to', 'not')", "eval.batch_size": 2, "eval.tasks": "('arithmetic',)", "eval.task_items": 1,
    }  # fmt: skip
    run(folder, "answers", 2, *(f"--config.{knob}={value}" for knob, value in knobs.items()))
    for step in (1, 2):
        assert (folder / "answers" / "samples" / f"{step}.txt").read_text().startswith("[0] to")
    *_, last = map(json.loads, (folder / "answers" / "metrics.jsonl").read_text().splitlines())
    assert (last["kind"], last["step"]) == ("eval", 2) and 0 <= last["arithmetic/exact_match"] <= 1


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
    """If libtpu is installed, it looks for a TPU, and JAX reports what it found."""
    alone = Process(folder, "never", *flags, **variables)
    assert_one_line(alone, code, message)
    assert not (folder / "never").exists()


def assert_one_line(process: Process, code: int, message: str, limit: float = 60) -> None:
    """limit: seconds, many times what it takes, in case a process never ends."""
    assert process.end(limit) == code, process.told
    (line,) = [line for line in process.lines if line.startswith("gpt4o_jax: ")]
    assert message in line and "Traceback" not in process.told


def test_a_coordinator_that_listens_and_never_answers_is_told(folder):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        alone = Process(folder, "never", f"--coordinator={address}", "--num_processes=2", "--process_id=1", "--start_timeout=3")
        assert_one_line(alone, 76, f"coordinator {address} (flags) not reached within 3 s (no answer)")


@pytest.mark.parametrize(
    "ids, ends",
    [
        ((0, 1, 1), {(2, "two processes with id 1: ")}),
        ((0, 0), {(2, "cannot be used here"), (76, "after 5 s process 1 of 2 had not come")}),
    ],
    ids=str,
)
def test_processes_with_one_id_are_told(folder, ids, ends):
    where = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={len(ids)}"]
    limit = "--start_timeout=60" if len(ids) == 3 else "--start_timeout=5"
    job = [Process(folder, "never", *where, f"--process_id={i}", limit) for i in ids]
    codes = {p.end(120): p for p in job}
    assert set(codes) == {code for code, _ in ends}, [p.told for p in job]
    for code, message in ends:
        assert_one_line(codes[code], code, message)
    assert not (folder / "never").exists()
