"""The roll call: processes find each other before JAX joins them.

JAX's own way of saying that a process is missing, or that two claim one id, is to abort after its time limit with a stack of
C++ functions. Here process 0 listens on the port that JAX will take over, every other one says who it is, and each is told in
one line what is wrong, or to go on.
"""

import contextlib
import json
import socket
import time

from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.parallel.cluster import Job, this_host

_PATIENCE = 5.0  # seconds for one message


def call(job: Job, limit: float) -> None:
    """Returns once all processes of the job are there. Raises RunError, the same in all that can be told, within `limit` seconds.

    Exit code 2 where ids or counts contradict each other, 76 where some did not come or the coordinator is not reached.
    """
    host, _, port = job.coordinator.rpartition(":")
    deadline = time.monotonic() + limit
    if job.index == 0:
        _lead(job, int(port), deadline, limit)
    else:
        _report(job, host.strip("[]"), int(port), deadline, limit)


def _lead(job: Job, port: int, deadline: float, limit: float) -> None:
    present, waiting = {0: this_host()}, []
    dual = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, backlog=4096, dualstack_ipv6=dual
        )
    except OSError as e:
        raise RunError(
            f"coordinator {job.coordinator}: port {port} cannot be used here ({e.strerror}); give another port"
        ) from None
    with server, contextlib.ExitStack() as connections:
        problem = None
        while len(present) < job.processes and problem is None:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                break
            connections.enter_context(connection)
            said = _read(connection)
            if said is None:
                continue  # something that is no process of ours
            waiting.append(connection)
            problem = _contradiction(job, present, said)
            present[said["index"]] = said["who"]
        code = ExitCode.USAGE
        if problem is None and len(present) < job.processes:
            missing = ", ".join(str(i) for i in range(job.processes) if i not in present)
            problem, code = (
                f"after {limit:.0f} s process {missing} of {job.processes} had not come to {job.coordinator}",
                ExitCode.PEER_LOST,
            )
        for connection in waiting:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps({"problem": problem, "code": code}).encode() + b"\n")
        if problem is None:
            # They hang up first: the port is then free at once for JAX.
            for connection in waiting:
                with contextlib.suppress(OSError):
                    connection.recv(1)
    if problem:
        raise RunError(problem, code)


def _contradiction(job: Job, present: dict[int, str], said: dict) -> str | None:
    index, count, who = said["index"], said["processes"], said["who"]
    if count != job.processes:
        return f"{who} was told of {count} processes, process 0 ({present[0]}) of {job.processes}: give all the same number"
    if index in present:
        return f"two processes with id {index}: {present[index]}; {who}; give each its own, from 0 to {job.processes - 1}"
    return None


def _report(job: Job, host: str, port: int, deadline: float, limit: float) -> None:
    message = json.dumps({"index": job.index, "processes": job.processes, "who": this_host()}).encode() + b"\n"
    why = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(left, _PATIENCE)) as connection:
                connection.sendall(message)
                connection.settimeout(max(deadline - time.monotonic(), 0) + _PATIENCE)
                answer = _read(connection, patient=True)
                if answer is not None:
                    if answer["problem"]:
                        raise RunError(answer["problem"], ExitCode(answer["code"]))
                    return
        except OSError as e:
            why = e.strerror or str(e)
        time.sleep(min(0.2, max(deadline - time.monotonic(), 0)))
    raise RunError(
        f"process {job.index} of {job.processes}: coordinator {job.coordinator} ({job.told_by}) not reached within {limit:.0f} s"
        f" ({why}); is process 0 running there, and does the network let port {port} through?",
        ExitCode.PEER_LOST,
    )


def _read(connection: socket.socket, patient: bool = False) -> dict | None:
    """One line of JSON, or None."""
    if not patient:
        connection.settimeout(_PATIENCE)
    try:
        line = connection.makefile("rb").readline(4096)
        said = json.loads(line)
        return said if isinstance(said, dict) and ({"index", "processes", "who"} <= set(said) or "problem" in said) else None
    except (OSError, ValueError):
        return None
