"""The roll call: processes find each other before JAX joins them.

If a process is missing, or two claim the same id, JAX aborts after its time limit with a C++ stack trace. Here process 0 listens
on the port that JAX will take over, every other process reports who it is, and each is told in one line what is wrong, or to go
on. A process restarted meanwhile takes the place of the one that ended.
"""

import contextlib
import json
import socket
import time
from typing import NamedTuple

from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.parallel.cluster import Job, this_host

_PATIENCE = 5.0  # seconds for one message


class _Member(NamedTuple):
    """A process other than 0 that has reported and waits for the others."""

    who: str
    connection: socket.socket


def call(job: Job, limit: float) -> None:
    """Returns once all processes of the job are there; else raises RunError within `limit` seconds, the same on all within reach.

    Exit code 2 if ids or counts contradict each other or the port is taken, 76 if some did not come or could not reach process 0.
    """
    host, _, port = job.coordinator.rpartition(":")
    deadline = time.monotonic() + limit
    if job.index == 0:
        _lead(job, int(port), deadline, limit)
    else:
        _report(job, host.strip("[]"), int(port), deadline, limit)


def _lead(job: Job, port: int, deadline: float, limit: float) -> None:
    dual = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, backlog=4096, dualstack_ipv6=dual
        )
    except OSError as e:
        raise RunError(
            f"coordinator {job.coordinator}: port {port} cannot be used here ({e.strerror}); give another port"
        ) from None
    members: dict[int, _Member] = {}
    with server, contextlib.ExitStack() as connections:
        problem, code, waiting = None, ExitCode.USAGE, []
        while problem is None and (len(members) < job.processes - 1 or _strike_off(members, list(members))):
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                _strike_off(members, list(members))
                missing = ", ".join(str(i) for i in range(1, job.processes) if i not in members)
                problem = f"after {limit:.0f} s process {missing} of {job.processes} had not come to {job.coordinator}"
                code = ExitCode.PEER_LOST
                break
            connections.enter_context(connection)
            said = _read(connection)
            if said is None:
                continue  # not a process of ours
            problem = _contradiction(job, members, said)
            if problem:
                waiting.append(connection)
            else:
                members[said["index"]] = _Member(said["who"], connection)
        waiting += [member.connection for member in members.values()]
        for connection in waiting:
            with contextlib.suppress(OSError):
                connection.settimeout(_PATIENCE)
                connection.sendall(json.dumps({"problem": problem, "code": code}).encode() + b"\n")
        if problem is None:
            # They hang up first, so that the port is immediately free for JAX.
            for connection in waiting:
                with contextlib.suppress(OSError):
                    connection.recv(1)
    if problem:
        raise RunError(problem, code)


def _strike_off(members: dict[int, _Member], asked: list[int]) -> bool:
    """Removes those of `asked` that no longer answer, so that a restart can take their place; whether there were any.

    They have to be asked: a machine that was taken away does not hang up.
    """
    for index in asked:
        with contextlib.suppress(OSError):
            members[index].connection.sendall(json.dumps({"there": members[index].who}).encode() + b"\n")
    until = time.monotonic() + _PATIENCE
    gone = [i for i in asked if _read(members[i].connection, max(until - time.monotonic(), 0.01)) is None]
    for index in gone:
        members.pop(index).connection.close()
    return bool(gone)


def _contradiction(job: Job, members: dict[int, _Member], said: dict) -> str | None:
    index, count, who = said["index"], said["processes"], said["who"]
    if count != job.processes:
        return f"{who} was told of {count} processes, process 0 ({this_host()}) of {job.processes}: give all the same number"
    if index == 0 or (index in members and not _strike_off(members, [index])):
        before = members[index].who if index else this_host()
        return f"two processes with id {index}: {before}; {who}; give each its own, from 0 to {job.processes - 1}"
    return None


def _report(job: Job, host: str, port: int, deadline: float, limit: float) -> None:
    message = json.dumps({"index": job.index, "processes": job.processes, "who": this_host()}).encode() + b"\n"
    why = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(left, _PATIENCE)) as connection:
                connection.sendall(message)
                while "there" in (answer := _read(connection, max(deadline - time.monotonic(), 0) + _PATIENCE) or {}):
                    connection.sendall(message)
                if answer:
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


def _read(connection: socket.socket, seconds: float = _PATIENCE) -> dict | None:
    """One line of JSON that is one of our messages, or None."""
    try:
        connection.settimeout(seconds)
        said = json.loads(connection.makefile("rb").readline(4096))
    except (OSError, ValueError):
        return None
    kinds = ({"index", "processes", "who"}, {"there"}, {"problem", "code"})
    return said if isinstance(said, dict) and any(names <= set(said) for names in kinds) else None
