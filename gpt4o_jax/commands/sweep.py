"""trains every variant of a sweep file with several seeds, and reports which differences are significant"""

import contextlib
import dataclasses
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from gpt4o_jax.commands import config_file
from gpt4o_jax.commands.flags import Flag
from gpt4o_jax.config import RunConfig
from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.paths import local

FLAGS = (
    Flag(
        "sweep", str, "", "FILE[:ARG] with get_config(), the baseline, and sweep(), which yields (name, {setting: value})", True
    ),
    Flag("workdir", str, "", "folder of the sweep: runs in NAME/SEED/, report.md", required=True),
    Flag("seeds", int, 3, "runs per variant, with consecutive seeds from the baseline's", low=1, high=1000),
    Flag("print", bool, False, "print the commands of runs that are not finished, one per line, and run nothing"),
)


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    variant: str
    config: RunConfig
    workdir: Path
    flags: tuple[str, ...]  # of `train`

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "gpt4o_jax", "train", *self.flags]


def main(flags: dict, overrides: dict[str, str]) -> dict | None:
    workdir = local("--workdir", flags["workdir"])
    jobs = plan(flags["sweep"], workdir, flags["seeds"], overrides)
    from gpt4o_jax import sweep_report
    from gpt4o_jax.console import say

    if flags["print"]:
        print("\n".join(shlex.join(job.command) for job in jobs if not sweep_report.complete(job.workdir)))
        return None

    _open(workdir, flags["sweep"], jobs)
    failures: dict[str, str] = {}
    with _Child() as child:
        for number, job in enumerate(jobs, 1):
            if sweep_report.complete(job.workdir):
                continue
            say(f"run {number} of {len(jobs)}: {job.workdir}")
            code, last_line = child.run(job.command)
            if child.received or code == ExitCode.SIGNAL:
                sweep_report.write(workdir, failures)
                raise RunError(
                    f"sweep stopped by {child.received or 'a signal to ' + str(job.workdir)} in run {number} of {len(jobs)};"
                    " run the same command again to continue",
                    ExitCode.SIGNAL,
                )
            if code:
                failures[str(job.workdir.relative_to(workdir))] = f"exit code {code}: {last_line}"
                say(f"{job.workdir} failed with exit code {code}; going on with the next run")
            sweep_report.write(workdir, failures)
    result = sweep_report.write(workdir, failures)
    if failures:
        first, reason = next(iter(failures.items()))
        code = int(reason.split()[2].rstrip(":"))
        raise RunError(
            f"{len(failures)} of {len(jobs)} runs failed, the first in {workdir / first} ({reason}); {workdir / 'report.md'} has"
            " the others, and the same command tries again",
            ExitCode(code) if code in set(ExitCode) else ExitCode.CRASHED,
        )
    return result


def plan(spec: str, workdir: Path, seeds: int, overrides: dict[str, str]) -> list[Job]:
    """All runs, seed by seed, so that an early report compares all variants on the same seeds.

    Raises RunError, before anything is run or written, if anything is wrong with any of them.
    """
    path = local("--sweep", spec.partition(":")[0])
    with config_file.told_in_one_line("--sweep", path):
        module = config_file.load("--sweep", path)
        if not hasattr(module, "sweep"):
            raise RunError(f"--sweep={path}: no sweep() in it; those in configs/ablations/ have one")
        variants = [(name, dict(knobs)) for name, knobs in module.sweep()]
    names = [name for name, _ in variants]
    if not names:
        raise RunError(f"--sweep={path}: sweep() yields nothing, expected (name, {{knob: value}}), the base first")
    jobs = []
    for seed in range(seeds):
        for name, knobs in variants:
            if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]*\w", name):
                raise RunError(f"--sweep={path}: variant {name!r}: expected a name of letters, digits and any of . + - _")
            if names.count(name) > 1:
                raise RunError(f"--sweep={path}: two variants are called {name!r}; runs of each need a folder of their own")
            both = sorted({"seed", *overrides} & set(knobs))
            if both:
                why = "--seeds sets it" if both[0] == "seed" else f"the command line sets it too, to {overrides[both[0]]}"
                raise RunError(f"--sweep={path}: variant {name!r} sets {both[0]}, but {why}")
            if name in ("report.md", "report.png", "sweep.json"):
                raise RunError(f"--sweep={path}: variant {name!r} has the name of a file of the sweep's own; expected another")
            jobs.append(_job(spec, workdir, name, {k: str(v) for k, v in knobs.items()} | overrides, seed))
    measures = {job.config.objective.measure: job.variant for job in jobs}
    if len(measures) > 1:
        told = ", ".join(f"{variant!r} by {measure}" for measure, variant in measures.items())
        raise RunError(f"--sweep={path}: variants are measured by different numbers ({told}) and cannot be compared")
    return jobs


def _job(spec: str, workdir: Path, name: str, knobs: dict[str, str], seed: int) -> Job:
    try:
        base = config_file.read(spec, knobs)
        knobs["seed"] = str(base.seed + seed)
        config = config_file.read(spec, knobs)
    except RunError as e:
        raise RunError(f"variant {name!r}: {e}") from None
    folder = workdir / name / str(config.seed)
    flags = (f"--config={spec}", f"--workdir={folder}", *(f"--config.{k}={v}" for k, v in knobs.items()))
    return Job(name, config, folder, flags)


def _open(workdir: Path, spec: str, jobs: list[Job]) -> None:
    """Makes the folder of the sweep, or checks that its runs are those of `jobs`, and records the sweep in it."""
    from gpt4o_jax import run, sweep_report

    if workdir.exists() and not workdir.is_dir():
        raise RunError(f"--workdir={workdir}: a file, expected a folder")
    note = workdir / sweep_report.NOTE
    known = {job.variant for job in jobs}  # already there if the commands from --print have run
    if not note.exists() and workdir.exists() and any(path.name not in known for path in workdir.iterdir()):
        raise RunError(f"--workdir={workdir}: not empty and no sweep's folder (no {note.name}); give a new or empty folder")
    for job in jobs:
        if (job.workdir / "config.json").exists():
            run.check_same(job.workdir, job.config)
    runs: dict[str, list[str]] = {}
    for job in jobs:
        runs.setdefault(job.variant, []).append(str(job.workdir.relative_to(workdir)))
    workdir.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"sweep": spec, "runs": runs}, indent=1) + "\n")


class _Child(contextlib.AbstractContextManager):
    """Runs commands one after another and passes SIGTERM and SIGINT on to the one that is running."""

    def __init__(self):
        self.received: str | None = None
        self._process: subprocess.Popen | None = None

    def __enter__(self):
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _handle(self, number, frame):
        self.received = signal.Signals(number).name
        if self._process is not None:
            self._process.send_signal(number)

    def run(self, command: list[str]) -> tuple[int, str]:
        """(exit code, negative if a signal ended it; the last line of its stderr)."""
        if self.received:
            return int(ExitCode.SIGNAL), ""
        # A separate session: Ctrl-C goes to every process of the terminal's group, and a second one ends a run unsaved.
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
        )
        if self.received:  # a signal between the check above and the start
            self._process.terminate()
        last = ""
        for line in self._process.stderr:
            sys.stderr.write(line)
            last = line.strip() or last
        return self._process.wait(), last
