"""Runs side by side: config, progress, results."""

import dataclasses
import io
import math
import os
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from gpt4o_jax.config import RunConfig, flatten, to_dict
from gpt4o_jax.errors import data_error
from gpt4o_jax.model import flops
from gpt4o_jax.paths import absolute, is_local, of_user
from gpt4o_jax.run import read_config
from gpt4o_jax.training.best import STOPPED
from gpt4o_jax.training.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class Summary:
    """One run, read from its folder. Numbers are None if nothing was logged yet."""

    workdir: epath.Path
    config: RunConfig
    train: list[dict]  # metric records, in order
    evals: list[dict]

    @property
    def step(self) -> int:
        return self.train[-1]["step"] if self.train else 0

    @property
    def finished(self) -> bool:
        """Whether the last step was done, or training stopped early, and the whole hold-out was evaluated."""
        if self.evals and STOPPED in self.evals[-1]:
            return True
        done = bool(self.train and self.evals) and self.step == self.train[-1].get("total_steps")
        return done and self.evals[-1]["step"] == self.step

    @property
    def state(self) -> str:
        total = self.train[-1].get("total_steps", "?") if self.train else "?"
        return "finished" if self.finished else f"step {self.step} of {total}"

    def held_out(self, name: str) -> float | None:
        """A number of the newest evaluation."""
        return self.evals[-1].get(name) if self.evals else None

    def last(self, name: str) -> float | None:
        """A number of the newest training record."""
        return self.train[-1].get(name) if self.train else None

    @property
    def tokens_per_second(self) -> float | None:
        return float(np.median([r["tokens_per_second"] for r in self.train])) if self.train else None

    def curve(self, name: str = "") -> tuple[list[float], list[float]]:
        """(tokens, values) of a held-out number, for every evaluation that has it. name: empty for the objective's measure."""
        if not self.train:
            return [], []
        steps, tokens = [r["step"] for r in self.train], [r["tokens"] for r in self.train]
        name = name or self.config.objective.measure
        points = [r for r in self.evals if name in r]
        return list(np.interp([r["step"] for r in points], steps, tokens)), [r[name] for r in points]


def summarise(workdir) -> Summary:
    """Reads a run folder. Raises RunError (exit code 3) if it is missing, damaged or not a run folder."""
    workdir = of_user(workdir)
    config, records = read_config(workdir), read_metrics(workdir)
    return Summary(workdir, config, *([r for r in records if r["kind"] == kind] for kind in ("train", "eval")))


def find(folders: Sequence[str]) -> list[Summary]:
    """Every run in or below `folders`. Raises RunError (exit code 3) for a folder without one."""
    found: dict[str, Summary] = {}
    for folder in folders:
        top = of_user(folder)
        if not top.is_dir():
            raise data_error(f"{folder}: no such folder; expected one with runs in or below it")
        waiting, here, seen = [top], {}, set()
        while waiting:
            path = waiting.pop()
            place = os.path.realpath(path) if is_local(path) else str(path)
            if place in seen:  # through a link, perhaps to a folder above it
                continue
            seen.add(place)
            if (path / "config.json").exists() and (path / "metrics.jsonl").exists():
                here[place] = summarise(path)
            else:
                waiting += [p for p in path.iterdir() if p.is_dir()]
        found |= here
        if not here:
            raise data_error(f"{folder}: no run in or below it (a run folder has config.json and metrics.jsonl)")
    return list(found.values())


def names(runs: Sequence[Summary]) -> list[str]:
    """The folders of the runs, without their common parent."""
    paths = [str(absolute(run.workdir)).split("/") for run in runs]
    common = 0
    while all(len(p) > common + 1 and p[common] == paths[0][common] for p in paths):
        common += 1
    return ["/".join(p[common:]) for p in paths]


def differing(runs: Sequence[Summary]) -> dict[str, list]:
    """Config keys that differ between the runs -> their values, in the order of the runs."""
    configs = [flatten(to_dict(r.config)) for r in runs]
    return {k: [c[k] for c in configs] for k in configs[0] if any(c[k] != configs[0][k] for c in configs)}


def describe(run: Summary) -> dict:
    """The numbers of a run that are worth comparing; None: not available yet."""
    return {
        "workdir": str(run.workdir),
        "state": run.state,
        "finished": run.finished,
        "step": run.step,
        "parameters": flops.parameter_count(run.config.model),
        "bits_per_byte": run.held_out("bits_per_byte"),
        run.config.objective.measure: run.held_out(run.config.objective.measure),
        "loss": run.held_out("loss"),
        "tokens": run.last("tokens"),
        "tokens_per_second": run.tokens_per_second,
        "seconds": run.last("seconds"),
        "goodput": run.last("goodput/step"),
    }


COLUMNS: dict[str, Callable[[float], str]] = {
    "bits_per_byte": "{:.4f}".format,
    "loss": "{:.4f}".format,
    "tokens": "{:,}".format,
    "tokens_per_second": "{:,.0f}".format,
    "goodput": "{:.1%}".format,
}


def table(runs: Sequence[Summary]) -> str:
    """One line per run: progress, results, speed, and the config keys that differ."""
    differ = differing(runs)
    measures = dict.fromkeys(run.config.objective.measure for run in runs)
    columns = {name: "{:.4f}".format for name in measures} | COLUMNS
    rows = [["run", "state", *(c.replace("_", " ") for c in columns), *differ]]
    for i, (name, run) in enumerate(zip(names(runs), runs, strict=True)):
        numbers = describe(run)
        cells = ["-" if numbers.get(c) is None else text(numbers[c]) for c, text in columns.items()]
        rows.append([name, run.state, *cells, *(_one_line(values[i]) for values in differ.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _one_line(value) -> str:
    return str(value) if str(value).isprintable() and str(value).strip() else repr(value)  # data.separator is often a newline


def plot(groups: dict[str, Sequence[Summary]]) -> bytes:
    """The curves of `draw_curves` as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, max(4.5, 0.2 * len(groups))), dpi=120)
    draw_curves(figure.subplots(), groups)
    return png(figure)


def draw_curves(axes, groups: dict[str, Sequence[Summary]]) -> None:
    """Plots the held-out measure of each run's objective over tokens: one colour per group, training curves thin behind."""
    palette, shown = colours(len(groups)), []
    for i, (name, runs) in enumerate(groups.items()):
        label = name
        for run in runs:
            training = [r[run.config.objective.measure] for r in run.train]
            axes.plot([r["tokens"] for r in run.train], training, lw=0.7, alpha=0.3, color=palette(i))
            tokens, values = run.curve()
            axes.plot(tokens, values, "o-", ms=3, lw=1.2, color=palette(i), label=label)
            label = None  # one entry in the legend per group
            shown += values + training[len(training) // 5 :]
    if len(set(finite(shown))) > 1:
        axes.set_ylim(min(finite(shown)) * 0.97, max(finite(shown)) * 1.02)
        beside = dict(loc="upper left", bbox_to_anchor=(1, 1)) if len(groups) > 8 else {}
        axes.legend(fontsize=8, **beside)
    axes.set_xlabel("training tokens")
    measures = sorted({run.config.objective.measure.replace("_", " ") for runs in groups.values() for run in runs})
    axes.set_ylabel(f"{', '.join(measures)} (o: held out)")
    axes.grid(alpha=0.3)


def finite(values: Sequence[float]) -> list[float]:
    """The values that an axis can show: a diverged run has others."""
    return [v for v in values if math.isfinite(v)]


def colours(count: int):
    """A colormap whose first `count` entries can be told apart."""
    import matplotlib

    return matplotlib.colormaps["tab10" if count <= 10 else "turbo"].resampled(max(10, count))


def png(figure) -> bytes:
    """A matplotlib Figure as PNG bytes."""
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
