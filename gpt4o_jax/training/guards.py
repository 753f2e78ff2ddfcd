"""Stopping a run: on a signal, after saving; on divergence, with a reason."""

import contextlib
import os
import signal
import time

from gpt4o_jax.errors import ExitCode, RunError


class StopSignal:
    """Context manager: the first SIGTERM or SIGINT sets `received`, the second ends the process immediately.

    Signals within half a second count as one: launchers signal a group and each process in it.
    """

    def __init__(self, say):
        self.received: str | None = None
        self._say, self._at = say, 0.0

    def __enter__(self):
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _handle(self, number, frame):
        if self.received:
            if time.monotonic() - self._at > 0.5:
                os._exit(ExitCode.SIGNAL)
            return
        self._at = time.monotonic()
        self.received = signal.Signals(number).name
        # Python refuses a write to stderr within one that the signal interrupted; stopping matters more than saying so.
        with contextlib.suppress(RuntimeError):
            self._say(f"{self.received}: finishing the dispatch and saving; send it again to stop at once")


def check_divergence(skipped_in_a_row: int, step: int, limit: int, workdir) -> None:
    """Raises RunError (exit code 4) once `limit` steps in a row had a non-finite loss or gradient."""
    if skipped_in_a_row >= limit:
        raise RunError(
            f"diverged: {skipped_in_a_row} steps in a row up to step {step} had a non-finite loss or gradient"
            f" (limit train.max_skipped_in_a_row={limit}); begin in a new --workdir with a lower optimizer.peak_lr"
            f" or a longer warm-up: --config.init.from={workdir} takes its weights from the last checkpoint there",
            ExitCode.DIVERGED,
        )
