"""report.md of a sweep: mean and spread over seeds, and which differences from the base are more than noise."""

import dataclasses
import json
import math
import statistics
import warnings
from collections.abc import Sequence

import numpy as np
from etils import epath

from gpt4o_jax import comparison
from gpt4o_jax.comparison import Summary
from gpt4o_jax.config import base_config, flatten, to_dict
from gpt4o_jax.errors import data_error
from gpt4o_jax.paths import of_user

NOTE = "sweep.json"  # {"sweep": FILE[:ARG], "runs": {variant: [folder of each seed]}, "failures": {folder: why}}, the base first


@dataclasses.dataclass(frozen=True)
class Difference:
    """Difference of two means, its 95 % interval and the p-value of Welch's t-test (None: under two values, or no spread)."""

    mean: float
    low: float | None
    high: float | None
    p: float | None


def difference(values: Sequence[float], base: Sequence[float]) -> Difference:
    """mean(values) - mean(base). Two-sided Welch test: the variances may differ (doi:10.1093/biomet/34.1-2.28)."""
    mean = statistics.mean(values) - statistics.mean(base)
    if min(len(values), len(base)) < 2:
        return Difference(mean, None, None, None)
    from scipy.stats import ttest_ind

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # samples without any spread, whose p is nan
        test = ttest_ind(values, base, equal_var=False)
        interval = test.confidence_interval(0.95)
    if not math.isfinite(test.pvalue):
        return Difference(mean, None, None, None)
    return Difference(mean, float(interval.low), float(interval.high), float(test.pvalue))


def read(workdir) -> tuple[str, dict[str, dict[str, Summary | None]]]:
    """(FILE[:ARG] of the sweep, {variant: {run folder: the run, None if it has not begun}}). Raises RunError."""
    workdir = of_user(workdir)
    path = workdir / NOTE
    if not path.exists():
        raise data_error(f"{workdir}: no {NOTE}; expected the folder that `sweep` wrote")
    try:
        note = json.loads(path.read_text())
        folders = {str(variant): list(map(str, names)) for variant, names in note["runs"].items()}
        spec = str(note["sweep"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise data_error(f"{path}: damaged (not what `sweep` wrote)") from None
    begun = lambda folder: comparison.summarise(folder) if (folder / "config.json").exists() else None
    return spec, {variant: {name: begun(workdir / name) for name in names} for variant, names in folders.items()}


def complete(workdir) -> bool:
    """Whether `train` has nothing left to do in this run folder: report.md is the last thing it writes."""
    workdir = epath.Path(workdir)
    return (workdir / "report.md").exists() and comparison.summarise(workdir).finished


def write(workdir, failures: dict[str, str] | None = None) -> dict:
    """Writes report.md and report.png. Returns the numbers of every variant. Raises RunError if it is not a sweep's folder.

    failures: run folder -> why it ended, recorded with the sweep; None: those already recorded.
    """
    workdir = of_user(workdir)
    spec, runs = read(workdir)
    note = json.loads((workdir / NOTE).read_text())
    if failures is None:
        failures = note.get("failures", {})
    else:
        (workdir / NOTE).write_text(json.dumps(note | {"failures": failures}, indent=1) + "\n")
    measure = _measure(runs)
    done = {variant: [r for r in of.values() if r is not None and r.finished] for variant, of in runs.items()}
    scores = {variant: [v for r in of if math.isfinite(v := r.held_out(measure))] for variant, of in done.items()}
    base = next(iter(runs))
    variants = {}
    for variant, values in scores.items():
        versus = difference(values, scores[base]) if values and scores[base] and variant != base else None
        variants[variant] = {
            "n": len(values),
            measure: statistics.mean(values) if values else None,
            "stdev": statistics.stdev(values) if len(values) > 1 else None,
            "difference": versus and dataclasses.asdict(versus),
            "tokens_per_second": _mean([r.tokens_per_second for r in done[variant]]),
            "minutes": _mean([r.last("seconds") / 60 for r in done[variant] if r.last("seconds") is not None]),
        }
    (workdir / "report.png").write_bytes(plot(done, measure))
    (workdir / "report.md").write_text(_markdown(workdir.name, spec, runs, variants, measure, failures))
    return {"workdir": str(workdir), "base": base, "measure": measure, "variants": variants}


def _measure(runs: dict[str, dict[str, Summary | None]]) -> str:
    """The measure of the runs' objective: the same for all, since `sweep` rejects others."""
    begun = (run for of in runs.values() for run in of.values() if run is not None)
    return next((run.config.objective.measure for run in begun), "bits_per_byte")


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def plot(groups: dict[str, Sequence[Summary]], measure: str) -> bytes:
    """Curves of every run beside the last held-out value of the measure (a dot per run, a line for the mean), as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=110)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    comparison.draw_curves(left, groups)
    colours = comparison.colours(len(groups))
    for i, runs in enumerate(groups.values()):
        values = [r.held_out(measure) for r in runs]
        right.plot([i] * len(values), values, "o", color=colours(i), alpha=0.6)
        if values:
            right.hlines(statistics.mean(values), i - 0.25, i + 0.25, color=colours(i))
    right.set_xticks(range(len(groups)), list(groups), rotation=30, ha="right", fontsize=8)
    right.set_ylabel(f"final held-out {measure.replace('_', ' ')}")
    right.grid(alpha=0.3)
    return comparison.png(figure)


def table(variants: dict[str, dict], measure: str = "bits_per_byte") -> list[str]:
    """Lines of a Markdown table of `write`'s numbers."""
    rows = [
        f"| variant | n | {measure.replace('_', ' ')} | difference | 95 % interval | p | tokens/s | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    text = lambda value, how: "-" if value is None else format(value, how)
    for name, v in variants.items():
        score = text(v[measure], ".4f") + (f" ± {v['stdev']:.4f}" if v["stdev"] is not None else "")
        d = v["difference"] or {"mean": None, "low": None, "high": None, "p": None}
        interval = "-" if d["low"] is None else f"{d['low']:+.4f} to {d['high']:+.4f}"
        cells = [name, str(v["n"]), score, text(d["mean"], "+.4f"), interval, text(d["p"], ".2g")]
        rows.append(f"| {' | '.join(cells)} | {text(v['tokens_per_second'], ',.0f')} | {text(v['minutes'], '.1f')} |")
    return rows


def _markdown(title: str, spec: str, runs: dict, variants: dict, measure: str, failures: dict[str, str]) -> str:
    base = next(iter(runs))
    lines = [
        f"# {title}",
        "",
        f"`{spec}`: held-out {measure.replace('_', ' ')} at the end of each run, mean ± standard deviation over n seeds; the"
        f" difference to `{base}` with its 95 % interval and the two-sided p-value of Welch's t-test, not corrected for several"
        " comparisons.",
        "",
        *table(variants, measure),
        "",
        "![curves and final values](report.png)",
    ]
    open_runs = {name: run for of in runs.values() for name, run in of.items() if run is None or not run.finished}
    if open_runs:
        lines += ["", "## Not finished", ""]
        lines += [f"- {name}: {failures.get(name) or (run.state if run else 'not begun')}" for name, run in open_runs.items()]
    configs = {variant: flatten(to_dict(run.config)) for variant, of in runs.items() for run in of.values() if run}
    if base in configs:
        defaults = flatten(base_config().to_dict())
        lines += ["", f"## Config of `{base}`, where it differs from the defaults", "", *_changes(defaults, configs[base])]
        for variant in runs:
            if variant in configs and variant != base:
                lines += ["", f"## `{variant}`, where it differs from `{base}`", "", *_changes(configs[base], configs[variant])]
    return "\n".join(lines) + "\n"


def _changes(before: dict, after: dict) -> list[str]:
    """Changed knobs as a code block, without the seed: every variant has several."""
    return ["```", *(f"{k} = {v!r}" for k, v in after.items() if before[k] != v and k != "seed"), "```"]
