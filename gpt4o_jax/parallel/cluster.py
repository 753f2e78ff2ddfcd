"""Which processes make up this job, and which one this is: from flags, the environment or TPU metadata."""

import dataclasses
import glob
import importlib.util
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

from gpt4o_jax.errors import RunError

PORT = 8482  # of the coordinator, by default


@dataclasses.dataclass(frozen=True)
class Job:
    """Process `index` of `processes`. Process 0 runs the coordinator, HOST:PORT."""

    coordinator: str
    processes: int
    index: int
    told_by: str
    local_devices: tuple[int, ...] | None = None  # None: all of this machine


def find(coordinator: str, num_processes: int, process_id: int, environment: Mapping[str, str]) -> Job | None:
    """The job this process belongs to; None if it works alone.

    The first source that says something decides: the flags (coordinator "", num_processes 0 and process_id -1 say nothing),
    JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, Slurm, TPU pods of GKE, JobSet, a Cloud TPU VM.
    num_processes=1 without the others means alone. Raises RunError if the values are contradictory or incomplete.
    """
    if num_processes == 1 and not coordinator:
        return None
    if coordinator or num_processes or process_id >= 0:
        given = (coordinator, str(num_processes or ""), str(process_id) if process_id >= 0 else "")
        return _three(dict(zip(("--coordinator", "--num_processes", "--process_id"), given, strict=True)), "flags")
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if any(environment.get(n) for n in names):
        return _three({n: environment.get(n, "") for n in names}, "environment")
    job = _slurm(environment) or _gke_tpu(environment) or _jobset(environment) or _tpu_vm(environment)
    return None if job is None or job.processes == 1 else _checked(job)


def _three(given: dict[str, str], told_by: str) -> Job | None:
    address, count, index = given
    missing = [name for name in given if not given[name]]
    if missing:
        raise RunError(f"{', '.join(missing)} missing: give all of {', '.join(given)}, for example 10.0.0.1:{PORT}, 4 and 0")
    job = _checked(Job(given[address], _number(given, count), _number(given, index), told_by))
    return None if job.processes == 1 else job


def _checked(job: Job) -> Job:
    host, _, port = job.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise RunError(f"coordinator {job.coordinator!r} ({job.told_by}): expected HOST:PORT, for example 10.0.0.1:{PORT}")
    if job.processes < 1 or not 0 <= job.index < job.processes:
        raise RunError(
            f"process id {job.index} of {job.processes} processes ({job.told_by}): expected an id from 0 to"
            f" {max(job.processes, 1) - 1}, another for each process"
        )
    return job


def _number(values: Mapping[str, str], name: str) -> int:
    try:
        return int(values[name])
    except (KeyError, ValueError):
        raise RunError(f"{name}={values.get(name, '')}: expected a whole number") from None


# ---------------------------------------------------------------- launchers


def _slurm(env: Mapping[str, str]) -> Job | None:
    """A step of srun. The batch script itself, outside srun, is a single process without a step."""
    if "SLURM_JOB_ID" not in env or "SLURM_STEP_NODELIST" not in env or "SLURM_PROCID" not in env:
        return None
    count = _number(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS")
    first = re.match(r"([^\[,]+)(?:\[(\d+))?", env["SLURM_STEP_NODELIST"])  # node[007-015],other -> node007
    host = "".join(part or "" for part in first.groups()) if first else ""
    # A port per job: two jobs may share a node, and a requeued one keeps its id.
    port = 61440 + _number(env, "SLURM_JOB_ID") % 4096
    here = max(map(int, re.findall(r"(\d+)(?:\(x\d+\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))), default=1)
    visible = env.get("CUDA_VISIBLE_DEVICES", "").count(",") + 1 if env.get("CUDA_VISIBLE_DEVICES") else None
    local = None
    own = env.get("SLURM_GPUS_PER_TASK") or "gpu" in env.get("SLURM_TRES_PER_TASK", "")  # srun has given each task its own
    if here > 1 and visible is not None and visible > 1 and not own:
        if visible % here:
            raise RunError(
                f"{here} tasks on a node and {visible} GPUs that each of them sees (CUDA_VISIBLE_DEVICES): expected a number of"
                f" tasks that divides {visible}, such as --ntasks-per-node=1"
            )
        each = visible // here
        first = _number(env, "SLURM_LOCALID") * each
        local = tuple(range(first, first + each))
    return Job(f"{host}:{port}", count, _number(env, "SLURM_PROCID"), "Slurm", local)


def _gke_tpu(env: Mapping[str, str]) -> Job | None:
    """A pod with TPUs: GKE says which hosts form the slice, and JobSet which slices form the job."""
    if not env.get("TPU_WORKER_HOSTNAMES") or "TPU_WORKER_ID" not in env:
        return None
    return _slices(env["TPU_WORKER_HOSTNAMES"].split(","), _number(env, "TPU_WORKER_ID"), env, "GKE")


def _slices(hosts: list[str], worker: int, env: Mapping[str, str], told_by: str) -> Job:
    slices = _number(env, "MEGASCALE_NUM_SLICES") if env.get("MEGASCALE_NUM_SLICES") else 1
    which = _number(env, "MEGASCALE_SLICE_ID") if env.get("MEGASCALE_SLICE_ID") else 0
    first = env.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0] or hosts[0]
    return Job(f"{first}:{PORT}", slices * len(hosts), which * len(hosts) + worker, f"{told_by}, {slices} slice(s)")


def _jobset(env: Mapping[str, str]) -> Job | None:
    """Pods of a JobSet; launch/gke_jobset.yaml sets these variables, except JOB_COMPLETION_INDEX, which Kubernetes sets."""
    if "JOB_COMPLETION_INDEX" not in env:
        return None
    missing = [n for n in ("JOBSET_NAME", "REPLICATED_JOB_NAME", "JOB_INDEX", "JOBS", "PODS_PER_JOB") if not env.get(n)]
    if missing:
        raise RunError(
            f"JOB_COMPLETION_INDEX is set but not {', '.join(missing)}: set them as launch/gke_jobset.yaml does, give"
            " --coordinator, --num_processes and --process_id, or --num_processes=1 to train in each pod alone"
        )
    name, pods = env["JOBSET_NAME"], _number(env, "PODS_PER_JOB")
    index = _number(env, "JOB_INDEX") * pods + _number(env, "JOB_COMPLETION_INDEX")
    host = f"{name}-{env['REPLICATED_JOB_NAME']}-0-0.{name}"
    return Job(f"{host}:{PORT}", _number(env, "JOBS") * pods, index, "JobSet")


def _tpu_vm(env: Mapping[str, str]) -> Job | None:
    """A worker of a Cloud TPU: the metadata server knows the others."""
    if env.get("TPU_SKIP_MDS_QUERY") or not _has_tpu(env):
        return None
    hosts, worker = _metadata(env, "worker-network-endpoints"), _metadata(env, "agent-worker-number")
    if hosts is None or worker is None:
        return None
    addresses = [part.split(":")[-1] for part in hosts.split(",")]  # name:id:address, or addresses only
    described = dict(re.findall(r"^(\w+)\s*:\s*'?([^'\n]*)'?\s*$", _metadata(env, "tpu-env") or "", re.MULTILINE))
    return _slices(addresses, int(worker), {**described, **env}, "TPU metadata")


def _has_tpu(env: Mapping[str, str]) -> bool:
    if "GCE_METADATA_IP" in env and "tpu" in env.get("JAX_PLATFORMS", ""):
        return True
    devices = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(devices) and importlib.util.find_spec("libtpu") is not None and env.get("JAX_PLATFORMS", "tpu") != "cpu"


def _metadata(env: Mapping[str, str], key: str) -> str | None:
    server = env.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    failure: Exception | None = None
    for pause in (0, 1, 2, 4):
        time.sleep(pause)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.read().decode().strip()
        except urllib.error.HTTPError as e:
            if e.code == 404:
                return None
            failure = e
        except urllib.error.URLError as e:
            if isinstance(e.reason, socket.gaierror):  # no such host: not a Google machine
                return None
            failure = e
        except OSError as e:
            failure = e
    # A worker that took this for "alone" would leave the others waiting.
    raise RunError(f"{url}: does not answer ({failure}), so the other workers are not known; to train alone: --num_processes=1")


def this_host() -> str:
    """The name of this machine and process in messages."""
    return f"{os.uname().nodename}, pid {os.getpid()}"
