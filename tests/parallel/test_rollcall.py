"""Processes find each other within a time limit, or each reports in one line what is wrong."""

import concurrent.futures
import json
import socket
import time

import pytest

from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.parallel import rollcall
from gpt4o_jax.parallel.cluster import Job


@pytest.fixture
def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def call(port: int, *members: tuple[int, int], limit: float = 20.0, host: str = "127.0.0.1") -> list:
    """The result of each (index, processes): None or its RunError."""

    def one(member):
        try:
            return rollcall.call(Job(f"{host}:{port}", member[1], member[0], "flags"), limit)
        except RunError as e:
            return e

    with concurrent.futures.ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(one, members))


def test_all_come_in_any_order_and_the_port_is_free_again(port):
    for _ in range(3):
        assert call(port, (3, 4), (1, 4), (2, 4), (0, 4)) == [None] * 4
    with socket.create_server(("", port)):
        pass


def test_two_with_one_id_are_told_all(port):
    done = call(port, (0, 3), (1, 3), (1, 3))
    assert len({str(e) for e in done}) == 1 and {e.code for e in done} == {ExitCode.USAGE}
    assert "two processes with id 1" in str(done[0])


def claim(port: int, index: int, processes: int) -> socket.socket:
    """A process that has announced itself and does nothing more."""
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=5)
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
    connection.sendall(json.dumps({"index": index, "processes": processes, "who": "one that ends"}).encode() + b"\n")
    return connection


@pytest.mark.parametrize("how", ["ended", "taken away"])
def test_a_process_that_is_started_again_takes_its_place(port, monkeypatch, how):
    monkeypatch.setattr(rollcall, "_PATIENCE", 0.3)  # for the process whose machine is gone, which never hangs up
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        leader = pool.submit(call, port, (0, 3))
        with claim(port, 1, 3) as before:
            if how == "ended":
                before.close()
            assert call(port, (1, 3), (2, 3)) == [None, None]
        assert leader.result() == [None]


def test_nobody_goes_on_without_one_that_has_come_and_ended(port):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        leader = pool.submit(call, port, (0, 3))
        claim(port, 1, 3).close()
        other = pool.submit(call, port, (2, 3))
        time.sleep(0.5)
        assert not leader.done() and not other.done()
        assert call(port, (1, 3)) == [None]
        assert leader.result() == other.result() == [None]


def test_one_that_has_come_and_ended_is_told_as_missing(port):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        leader = pool.submit(call, port, (0, 3), limit=1.0)
        claim(port, 1, 3).close()
        claim(port, 2, 3).close()
        assert "process 1, 2 of 3 had not come" in str(leader.result()[0])


def test_the_leader_may_not_be_there_twice(port):
    with socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True):
        (error,) = call(port, (0, 2))
    assert f"port {port} cannot be used here" in str(error) and error.code == ExitCode.USAGE


def test_counts_that_differ_are_told(port):
    done = call(port, (0, 2), (1, 3))
    assert all("was told of 3 processes" in str(e) and "of 2" in str(e) and e.code == ExitCode.USAGE for e in done)


def test_who_is_missing_is_told_within_the_limit(port):
    before = time.monotonic()
    done = call(port, (0, 4), (2, 4), limit=1.0)
    assert all("process 1, 3 of 4 had not come" in str(e) and e.code == ExitCode.PEER_LOST for e in done)
    assert time.monotonic() - before < 10


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_a_coordinator_that_is_not_reached_is_told_within_the_limit(port, host):
    (error,) = call(port, (1, 2), limit=1.0, host=host)
    assert f"coordinator {host}:{port} (flags) not reached within 1 s" in str(error) and error.code == ExitCode.PEER_LOST


def test_a_stranger_on_the_port_is_passed_over(port):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        leader = pool.submit(call, port, (0, 2))
        for sent in (b"GET / HTTP/1.0\r\n\r\n", b'{"index": 1}\n', b"[]\n"):
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
                        stranger.sendall(sent)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)
        assert call(port, (1, 2)) == [None]
        assert leader.result() == [None]
