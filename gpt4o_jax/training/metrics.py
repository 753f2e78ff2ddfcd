"""Metric records, and the accounting of wall time."""

import contextlib
import json
import math
import os
import pathlib
import tempfile
import time
import uuid

from etils import epath

from gpt4o_jax.config import RunConfig, flatten, to_dict
from gpt4o_jax.errors import RunError, data_error
from gpt4o_jax.paths import is_local, upload

_UPLOAD_SECONDS = 60  # between two uploads of the records to gs://


class MetricsWriter:
    """metrics.jsonl, one record per line, with the same numbers as TensorBoard events and at Weights & Biases.

    A record is {"kind": "train" | "eval", "step": ..., name: number or null, ...}, null for what is not finite, as the loss of a
    skipped step; `read_metrics` returns NaN for it. Opening at `resume_step` drops later records of an
    earlier, killed process, so that the file has every (kind, step) once.
    """

    def __init__(self, workdir: epath.Path, resume_step: int, config: RunConfig):
        self._path = workdir / "metrics.jsonl"
        records = read_metrics(workdir)
        kept = [r for r in records if r["step"] <= resume_step]
        self.spent = _time_spent(records, resume_step)
        temporary = workdir / "metrics.jsonl.tmp"
        temporary.write_text("".join(map(_line, kept)))
        temporary.replace(self._path)
        self._whole = None if _can_append(workdir) else [_line(r) for r in kept]
        self._written = time.monotonic()
        self._file = None
        if self._whole is None:
            self._file = open(os.fspath(self._path), "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
        self._events = self._here = None
        self._board = workdir / "tensorboard"
        if config.log.tensorboard:
            from tensorboardX import SummaryWriter

            # tensorboardX's own gs:// writer uploads from a thread that an error kills, and retries for two minutes at exit.
            if self._whole is not None:
                self._here = tempfile.TemporaryDirectory(prefix="tensorboard")
            self._events = SummaryWriter(self._here.name if self._here else os.fspath(self._board), purge_step=resume_step + 1)
        self._wandb = start_wandb(workdir, config) if config.log.wandb else None

    def write(self, kind: str, step: int, values: dict) -> None:
        line = _line({"kind": kind, "step": step, **values})
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
        else:
            self._whole.append(line)
            if time.monotonic() - self._written > _UPLOAD_SECONDS:
                self.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def flush(self) -> None:
        """Uploads records and events to gs://; called before a checkpoint, so that a run resumed from it has all records.

        The last few events may be missing: tensorboardX's thread has them.
        """
        if self._whole is not None:
            self._path.write_text("".join(self._whole))
            self._written = time.monotonic()
        if self._here is not None:
            self._events.flush()  # or it would write every two minutes; does nothing once closed
            upload(pathlib.Path(self._here.name), self._board)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()  # first: its thread writes some events only now
        try:
            self.flush()
        finally:  # also if the last records cannot be stored
            if self._here is not None:
                self._here.cleanup()
            if self._wandb is not None:
                self._wandb.finish()


def _can_append(workdir: epath.Path) -> bool:
    """Objects on gs:// do not allow it: there the file is rewritten whole now and then."""
    return is_local(workdir)


def import_wandb():
    """The optional package wandb. Raises RunError if it cannot be imported."""
    try:
        import wandb
    except ImportError as e:
        raise RunError(
            f"config.log.wandb: cannot import wandb ({e}); pip install -r requirements-wandb.txt, or leave log.wandb empty"
        ) from None
    return wandb


def start_wandb(workdir: epath.Path, config: RunConfig):
    """The run at Weights & Biases, the same one whenever this folder's run is resumed. Raises RunError.

    Steps repeated after a kill are dropped there: it accepts each step once, and repeated ones have the same bits.
    """
    wandb = import_wandb()
    path = workdir / "wandb_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    folder = str(workdir) if is_local(workdir) else None
    with _wandb_told(config):
        return wandb.init(
            project=config.log.wandb,
            name=workdir.name,
            id=path.read_text(),
            resume="allow",
            dir=folder,
            config=flatten(to_dict(config)),
        )


def check_wandb(config: RunConfig) -> None:
    """Raises RunError if wandb is missing or a required login fails, before a run has written anything."""
    wandb = import_wandb()
    if os.environ.get("WANDB_MODE", "online") not in ("offline", "dryrun", "disabled"):
        with _wandb_told(config):
            wandb.login()


@contextlib.contextmanager
def _wandb_told(config: RunConfig):
    """Turns any exception of wandb into a one-line RunError."""
    try:
        yield
    except Exception as e:
        reason = " ".join(str(e).split()).rstrip(".") or type(e).__name__
        raise RunError(f"config.log.wandb={config.log.wandb}: {reason}; `wandb login`, or set WANDB_MODE=offline") from e


def read_metrics(workdir) -> list[dict]:
    """Every complete record of a run's metrics.jsonl, in order; a last line cut off by a kill is ignored.

    Raises RunError (exit code 3) for any other line that is not a record.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    *lines, _rest = path.read_bytes().split(b"\n")
    return [_record(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line]


def _line(record: dict) -> str:
    """JSON has no NaN and no infinities, though Python would write them."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _record(line: bytes, where: str) -> dict:
    try:
        record = json.loads(line)
        if record["kind"] not in ("train", "eval") or type(record["step"]) is not int:
            raise ValueError
        return {k: math.nan if v is None else v for k, v in record.items()}
    except (ValueError, KeyError, TypeError):
        text = line[:40].decode(errors="replace")
        raise data_error(
            f'{where}: damaged, got {text!r}, expected a record such as {{"kind": "train", "step": 10, ...}}; remove the line'
        ) from None


def _time_spent(records: list[dict], resume_step: int) -> dict[str, float]:
    """Seconds by kind of work before a run resumes at `resume_step`; time of steps to be repeated is "lost"."""
    timed = [r for r in records if "seconds" in r]
    kept = [r for r in timed if r["step"] <= resume_step]
    if not timed:
        return {}
    spent = {}
    if kept:
        shares = {name.removeprefix("goodput/"): v for name, v in kept[-1].items() if name.startswith("goodput/")}
        spent = {kind: share * kept[-1]["seconds"] for kind, share in shares.items()}
    lost = timed[-1]["seconds"] - (kept[-1]["seconds"] if kept else 0.0)
    return spent | {"lost": spent.get("lost", 0.0) + lost}


class Ledger:
    """Wall time by kind of work, summed over a run's successive processes. Its fractions, including "other", sum to 1.

    "lost" is the time of steps that a killed process did after its last checkpoint, as far as it recorded them.
    """

    KINDS = ("init", "compile", "data", "step", "eval", "sample", "checkpoint", "lost")

    def __init__(self):
        self._start = time.monotonic()
        self._seconds = dict.fromkeys(self.KINDS, 0.0)
        self._open: tuple[str, float] | None = None

    def add(self, spent: dict[str, float]) -> None:
        """Adds seconds by kind, including "other", of earlier processes."""
        for kind in self._seconds:
            self._seconds[kind] += spent.get(kind, 0.0)
        self._start -= sum(spent.values())

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
        """Seconds charged to `kinds`, including an open block."""
        running = time.monotonic() - self._open[1] if self._open and self._open[0] in kinds else 0.0
        return sum(self._seconds[kind] for kind in kinds) + running

    def total(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    def fractions(self) -> dict[str, float]:
        total = self.total()
        shares = {kind: self.so_far(kind) / total for kind in self.KINDS}
        return {**shares, "other": 1 - sum(shares.values())}
