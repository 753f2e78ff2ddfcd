"""What a training process knows of its job's other processes: that they make progress, and when all of them stop."""

import contextlib
import json
import os
import sys
import threading
import time

import jax
from jax._src import distributed

from gpt4o_jax.errors import ExitCode

_STOP, _WHERE = "gpt4o_jax/stop", "gpt4o_jax/where"


class Peers:
    """A watch over a job's processes, as a context manager; limit None: this process works alone.

    JAX notices a dead peer, but not one that is alive and stuck: every collective waits for it forever. So each process reports
    where it is, and after `limit` seconds in one place ends with exit code 76, printing where the others were.
    """

    def __init__(self, limit: float | None = None):
        self._limit, self._where, self._agreed = limit, None, None
        self._ended = threading.Event()

    def __enter__(self):
        if self._limit is not None:
            threading.Thread(target=self._watch, name="peers", daemon=True).start()
        return self

    def __exit__(self, *_):
        self._ended.set()

    def at(self, what: str | None, times: int = 1) -> None:
        """This process begins `what`, which may take `times` the limit; None: unwatched, as it only concerns this process."""
        self._where = what and (what, time.monotonic(), times)

    def stop_at(self, step: int, K: int, wanted: str | None) -> tuple[int, str] | None:
        """(step to stop at, signal name) once any process wants to stop, the same in all; else None. wanted: this one's signal.

        Call it after each dispatch of K steps, once the metrics of the previous dispatch have been read: no process gets metrics
        that another has not begun to compute, so none is more than one dispatch ahead of the others here, and two dispatches
        later all of them have seen what the first one wrote.
        """
        if self._limit is None:
            return (step, wanted) if wanted else None
        client = distributed.global_state.client
        if self._agreed is None and wanted:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
                client.key_value_set(_STOP, json.dumps([step + 2 * K, wanted]))
        if self._agreed is None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # no process wants to stop
                self._agreed = tuple(json.loads(client.key_value_try_get(_STOP)))
        return self._agreed

    def _watch(self) -> None:
        client, me = distributed.global_state.client, jax.process_index()
        while not self._ended.wait(min(self._limit / 4, 5.0)):
            place = self._where
            if place is None:
                continue
            what, since, times = place
            here = time.monotonic() - since
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                client.key_value_set(f"{_WHERE}/{me}", f"{what}, for {here:.0f} s", allow_overwrite=True)
            if here > self._limit * times:
                others = {}
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    others = {key.rsplit("/", 1)[1]: value for key, value in client.key_value_dir_get(_WHERE)}
                told = "; ".join(f"process {i}: {others[i]}" for i in sorted(others, key=int))
                print(
                    f"gpt4o_jax: a peer is stuck: process {me} is at {what} for {here:.0f} s, the limit is"
                    f" {self._limit * times:.0f} (--peer_timeout); {told}; the same command goes on from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(int(ExitCode.PEER_LOST))
