"""Which job a process belongs to: from flags, the environment, or a metadata server, in that order."""

import http.server
import threading

import pytest

from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.parallel.cluster import Job, find

JAX = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[007-010,12],x3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "9",
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
}  # fmt: skip
GKE = {"TPU_WORKER_HOSTNAMES": "h0,h1,h2,h3", "TPU_WORKER_ID": "3", "JOB_COMPLETION_INDEX": "3"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "first:8080"}
JOBSET = {"JOBSET_NAME": "run", "REPLICATED_JOB_NAME": "gpu", "JOB_INDEX": "1", "JOBS": "2", "PODS_PER_JOB": "3"}


def told(environment, coordinator="", num_processes=0, process_id=-1):
    return find(coordinator, num_processes, process_id, environment)


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        (JAX, Job("a:1", 4, 2, "environment")),
        (JAX | SLURM, Job("a:1", 4, 2, "environment")),
        (JAX | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (SLURM, Job("node007:61441", 8, 5, "Slurm")),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}, Job("node007:61441", 8, 5, "Slurm", (1,))),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, Job("node007:61441", 8, 5, "Slurm", (4, 5, 6, 7))),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2", "SLURM_GPUS_PER_TASK": "3"}, Job("node007:61441", 8, 5, "Slurm")),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, Job("node007:61441", 8, 5, "Slurm")),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)", "CUDA_VISIBLE_DEVICES": "0,1"}, Job("node007:61441", 8, 5, "Slurm")),
        (SLURM | {"SLURM_STEP_NODELIST": "login-1"}, Job("login-1:61441", 8, 5, "Slurm")),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),  # the batch script itself
        (GKE, Job("h0:8482", 4, 3, "GKE, 1 slice(s)")),
        (GKE | SLICES, Job("first:8482", 8, 7, "GKE, 2 slice(s)")),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (JOBSET | {"JOB_COMPLETION_INDEX": "2"}, Job("run-gpu-0-0.run:8482", 6, 5, "JobSet")),
    ],
)
def test_the_environment_tells_it(environment, expected):
    assert told(environment) == expected


def test_flags_come_first_and_one_process_is_none():
    assert told(JAX | SLURM, "b:2", 3, 0) == Job("b:2", 3, 0, "flags")
    assert told(SLURM, num_processes=1) is None
    assert told({}, "b:2", 1, 0) is None


@pytest.mark.parametrize(
    "message, environment, flags",
    [
        ("--num_processes, --process_id missing", {}, ("b:2",)),
        ("--process_id missing", {}, ("b:2", 2)),
        ("JAX_PROCESS_ID missing", {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}, ()),
        ("process id 2 of 2 processes (flags): expected an id from 0 to 1", {}, ("b:2", 2, 2)),
        ("coordinator 'b' (flags): expected HOST:PORT", {}, ("b", 2, 1)),
        ("coordinator 'b:x'", {}, ("b:x", 2, 1)),
        ("coordinator 'b:70000'", {}, ("b:70000", 2, 1)),
        ("JAX_NUM_PROCESSES=two: expected a whole number", JAX | {"JAX_NUM_PROCESSES": "two"}, ()),
        ("SLURM_PROCID=", SLURM | {"SLURM_PROCID": ""}, ()),
        ("process id 8 of 8 processes (Slurm)", SLURM | {"SLURM_PROCID": "8"}, ()),
        ("2 tasks on a node and 3 GPUs", SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"}, ()),
        ("not JOBSET_NAME, REPLICATED_JOB_NAME, JOB_INDEX, JOBS, PODS_PER_JOB", {"JOB_COMPLETION_INDEX": "0"}, ()),
    ],
)
def test_what_does_not_fit_together_is_told(message, environment, flags):
    with pytest.raises(RunError) as error:
        told(environment, *flags)
    assert message in str(error.value) and error.value.code == ExitCode.USAGE


def told_by_metadata(failures: list[int], answers: dict[str, str]) -> Job | None:
    """What is found with a server that fails its first requests with the status codes `failures`, then gives answers by name."""
    left = list(failures)

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            answer = answers.get(self.path.rsplit("/", 1)[1])
            self.send_response(left.pop(0) if left else 404 if answer is None else 200)
            self.end_headers()
            self.wfile.write((answer or "").encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            return told({"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}", "JAX_PLATFORMS": "tpu"})
        finally:
            server.shutdown()


def test_a_metadata_server_that_is_slow_to_answer_is_asked_again(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    answers = {"worker-network-endpoints": "10.0.0.1,10.0.0.2", "agent-worker-number": "1", "tpu-env": ""}
    assert told_by_metadata([503, 500], answers) == Job("10.0.0.1:8482", 2, 1, "TPU metadata, 1 slice(s)")
    with pytest.raises(RunError, match=r"does not answer .*503.*to train alone: --num_processes=1"):
        told_by_metadata([503] * 4, answers)
    assert told_by_metadata([], {}) is None, "it knows of no slice"


@pytest.mark.parametrize("hosts", ["10.0.0.1,10.0.0.2", "unknown:8470:10.0.0.1,unknown:8470:10.0.0.2"])
@pytest.mark.parametrize("slices", [1, 2])
def test_a_cloud_tpu_is_told_by_its_metadata_server(hosts, slices):
    answers = {"worker-network-endpoints": hosts, "agent-worker-number": "1", "tpu-env": "TYPE: 'v5p'\nZONE: 'us-x'\n"}
    if slices == 2:
        answers["tpu-env"] += "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.9.9.9:80'\n"

    found = told_by_metadata([], answers)
    told_by = f"TPU metadata, {slices} slice(s)"
    assert found == (Job("10.9.9.9:8482", 4, 3, told_by) if slices == 2 else Job("10.0.0.1:8482", 2, 1, told_by))
