"""Metric records, and where the time went."""

import contextlib
import json
import os
import time

from etils import epath


class MetricsWriter:
    """metrics.jsonl, one record a line, and the same numbers as TensorBoard events.

    A record is {"kind": "train" | "eval", "step": ..., name: number, ...}. Opening
    at `resume_step` drops what an earlier, killed process wrote beyond it, so that every
    (kind, step) stands in the file once.
    """

    def __init__(self, workdir: epath.Path, resume_step: int, tensorboard: bool):
        self._path = workdir / "metrics.jsonl"
        kept = [r for r in read_metrics(workdir) if r["step"] <= resume_step]
        temporary = workdir / "metrics.jsonl.tmp"
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
        temporary.replace(self._path)
        self._file = open(os.fspath(self._path), "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
        self._events = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(os.fspath(workdir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, kind: str, step: int, values: dict) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(workdir) -> list[dict]:
    """Every whole record of a run's metrics.jsonl, in order; a last line cut off by a kill is left out."""
    path = epath.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    *lines, _rest = path.read_text().split("\n")
    return [json.loads(line) for line in lines if line]


class Ledger:
    """Wall time by kind of work. Fractions of the time since it was made, "other" included, sum to 1."""

    KINDS = ("init", "compile", "data", "step", "eval", "sample", "checkpoint")

    def __init__(self):
        self._start = time.monotonic()
        self._seconds = dict.fromkeys(self.KINDS, 0.0)
        self._open: tuple[str, float] | None = None

    @contextlib.contextmanager
    def time(self, kind: str):
        """Charges the time inside the block to `kind`. Blocks do not nest."""
        self._open = (kind, time.monotonic())
        try:
            yield
        finally:
            self._seconds[kind] += time.monotonic() - self._open[1]
            self._open = None

    def so_far(self, *kinds: str) -> float:
        """Seconds charged to `kinds`, an open block included."""
        running = time.monotonic() - self._open[1] if self._open and self._open[0] in kinds else 0.0
        return sum(self._seconds[kind] for kind in kinds) + running

    def fractions(self) -> dict[str, float]:
        total = max(time.monotonic() - self._start, 1e-9)
        shares = {kind: self.so_far(kind) / total for kind in self.KINDS}
        return {**shares, "other": 1 - sum(shares.values())}
