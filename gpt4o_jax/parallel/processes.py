"""Several processes as one job: joining within a time limit, host steps of all processes, and reporting a lost peer.

Every host step (`leader_first`, `barrier`, the agreed stop) has a name and a limit, and raises RunError (exit code 76) instead of
waiting forever. A process that works alone never waits.
"""

import atexit
import collections
import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

import jax
from jax._src import distributed  # the client has no public name; Orbax takes it from here too

from gpt4o_jax import console
from gpt4o_jax.errors import ExitCode, RunError, storage_error
from gpt4o_jax.parallel import rollcall
from gpt4o_jax.parallel.cluster import Job
from gpt4o_jax.parallel.peers import Peers

T = TypeVar("T")
_LONG = 24 * 3600.0  # seconds: preparation by process 0, such as tokenising a corpus, may take hours; the watch ends it sooner
_SHORT = 2 * 3600.0  # of what takes minutes at most; much sooner where the watch (`Peers.at`) covers it
_LOST = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "Gloo", "NCCL", "Connection", "coordination service")
_uses: collections.Counter = collections.Counter()  # of each name: a JAX barrier works only once


def places(
    sharding: jax.sharding.Sharding, shape: tuple[int, ...], axis: int, devices: Iterable[jax.Device] | None = None
) -> list[int]:
    """The indices along `axis`, in order, of the parts of an array of this shape that are on `devices`.

    devices: None for those of this process. Replicas hold the same indices, as do all processes of a tensor-parallel group.
    """
    parts = sharding.devices_indices_map(shape)
    held = (parts[d][axis] for d in (sharding.addressable_devices if devices is None else devices))
    return sorted({i for part in held for i in range(shape[axis])[part]})


@contextlib.contextmanager
def joined(job: Job | None, start_limit: float, peer_limit: float):
    """Makes this process part of `job` for the duration of the block, and watches the others. Yields Peers.

    job None: only checks that there are devices.

    start_limit: seconds within which all processes must have come. peer_limit: seconds after which an unresponsive one is lost.
    Raises RunError: ids or counts that contradict each other (2), no devices of the requested platform (2), a peer that did not
    come or was lost (76).
    """
    if job is not None:
        rollcall.call(job, start_limit)
        if job.index:
            console.quiet()  # process 0 reports what happens; each process its own errors
        _exit_on_abort(job)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # JAX's own SIGTERM handler would swallow it until training listens, for example while a corpus is prepared.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            job.coordinator,
            job.processes,
            job.index,
            job.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=max(int(start_limit), 1),
            heartbeat_timeout_seconds=max(int(min(peer_limit, 60)), 1),
            # The others are at the end while process 0 still digests the last checkpoint.
            shutdown_timeout_seconds=max(int(10 * peer_limit), 1),
        )
    try:
        _devices()
        if job is not None:
            console.say(
                f"{job.processes} processes, {jax.device_count()} devices; told by {job.told_by}, coordinator {job.coordinator}"
            )
        with Peers(None if job is None else peer_limit) as peers:
            yield peers
        if job is not None:
            jax.distributed.shutdown()
    except BaseException as e:
        lost = job is not None and isinstance(e, jax.errors.JaxRuntimeError) and any(word in str(e) for word in _LOST)
        if job is not None:
            _leave(e, lost)
        if lost:
            raise _peer_lost(f"process {job.index} of {job.processes}: {str(e).splitlines()[0]}") from e
        raise


def _devices() -> None:
    try:
        jax.devices()
    except RuntimeError as e:
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = str(e).splitlines()[0]
        raise RunError(f"JAX_PLATFORMS={asked}: no such device here ({reason}); unset it to take what there is") from None


def _peer_lost(what: str) -> RunError:
    return RunError(f"a peer was lost: {what}; the same command goes on from the last checkpoint", ExitCode.PEER_LOST)


def _leave(error: BaseException, lost: bool) -> None:
    """How a process exits after an error: together with the others after a stop, immediately after anything else."""
    told = error if isinstance(error, RunError) else storage_error(error)
    code = ExitCode.PEER_LOST if lost else told.code if told else ExitCode.CRASHED
    if isinstance(error, KeyboardInterrupt):
        code = ExitCode.SIGNAL
    elif code == ExitCode.SIGNAL:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.distributed.shutdown()
        return

    def leave():  # JAX would wait for the others, who wait for this one
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code))

    atexit.register(leave)


def _exit_on_abort(job: Job) -> None:
    """Turns JAX's abort on the loss of a peer (its callback is not accessible from Python) into exit code 76."""
    who = f"gpt4o_jax: process {job.index} of {job.processes}"
    line = f"{who}: a peer was lost, see above; the same command goes on from the last checkpoint\n"

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handle(number):
        os.write(2, line.encode())
        os._exit(int(ExitCode.PEER_LOST))

    _exit_on_abort.kept = handle  # C holds no reference
    install = ctypes.CDLL(None).signal
    install.restype = ctypes.c_void_p
    install(int(signal.SIGABRT), handle)


# ---------------------------------------------------------------- host steps of all processes


def is_leader() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return jax.process_index() == 0


def leader_first(name: str, make: Callable[[], T], limit: float = _LONG) -> T:
    """make() on process 0, then on the others. A RunError of process 0 is raised on all."""
    if is_leader():
        return share(name, make, limit, keep=True)
    share(name, make, limit)
    return make()


def share(name: str, make: Callable[[], T], limit: float = _SHORT, keep: bool = False) -> T:
    """make() of process 0, a JSON value, on all. Its RunError is raised on all. keep: the others get None instead."""
    if jax.process_count() == 1:
        return make()
    key, client = _key(name), distributed.global_state.client
    if not is_leader():
        told = json.loads(_limited(name, limit, lambda ms: client.blocking_key_value_get(key, ms)))
        if "error" in told:
            raise RunError(told["error"], ExitCode(told["code"]))
        return told["value"]
    try:
        value = make()
    except Exception as e:
        told = e if isinstance(e, RunError) else storage_error(e)
        if told is not None:
            client.key_value_set(key, json.dumps({"error": str(told), "code": int(told.code)}))
            barrier(f"{name}: told", 10.0, strict=False)  # otherwise they would see a lost peer
        raise
    client.key_value_set(key, json.dumps({"value": None if keep else value}))
    return value


def barrier(name: str, limit: float = _SHORT, strict: bool = True) -> None:
    """Returns once every process has called it. After `limit` seconds it raises RunError (76) if strict, else returns."""
    if jax.process_count() == 1:
        return
    key, client = _key(name), distributed.global_state.client
    with contextlib.nullcontext() if strict else contextlib.suppress(RunError):
        _limited(name, limit, lambda ms: client.wait_at_barrier(key, ms))


def _key(name: str) -> str:
    _uses[name] += 1
    return f"gpt4o_jax/{name}/{_uses[name]}"


def _limited(name: str, limit: float, wait: Callable[[int], T]) -> T:
    try:
        return wait(int(limit * 1000))
    except jax.errors.JaxRuntimeError as e:
        raise _peer_lost(f"{name!r}: not all processes came within {limit:.0f} s ({str(e).splitlines()[0]})") from None
