"""Learning curves of the worlds: the scores that the bars of applications.py are about, at every evaluation while training."""

import json
import re
from pathlib import Path

PICTURE = Path(__file__).parent / "task_curves.png"


def of_run(workdir: Path, bars: dict[str, dict]) -> dict[str, dict]:
    """world -> bar -> [[step, score], ...] of a run that was asked for the world while it trained.

    bars: world -> its bars, "SLICE/METRIC"; slice "*": the worst of all slices, "all": of all items together.
    """
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    evals = [r for r in records if r["kind"] == "eval"]
    asked = [world for world in bars if any(name.startswith(f"{world}/") for r in evals for name in r)]
    return {world: {bar: [[r["step"], _score(r, world, bar)] for r in evals] for bar in bars[world]} for world in asked}


def _score(record: dict, world: str, bar: str) -> float:
    row, _, metric = bar.partition("/")
    if row == "*":
        return min(score for name, score in record.items() if re.fullmatch(f"{world}/[^/]+/{metric}", name))
    return record[f"{world}/{metric}" if row == "all" else f"{world}/{row}/{metric}"]


def section(newest: dict) -> list[str]:
    """Of BENCHMARKS.md. newest: name -> newest record."""
    if not any(_curves(newest, name.removesuffix("_minutes")) for name in newest if name.endswith("_minutes")):
        return []
    return [
        "## Learning curves of the worlds",
        "",
        "Scores while training, of fewer held-out items than in the table above (50 of each slice alone, 20 in the joint model),"
        " each seed a line: whole lines each world alone, where its newest record has them, dashed ones the fine-tuning of"
        " configs/applications.py; dotted: the bar.",
        "",
        f"![scores of every world over steps](benchmarks/{PICTURE.name})",
    ]


def _curves(newest: dict, name: str) -> list:
    return newest.get(f"{name}_minutes", {}).get("details", {}).get("curves", [])


def draw(newest: dict, bars: dict[str, dict]) -> None:
    """Writes PICTURE."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    alone, joint = {world: _curves(newest, world) for world in bars}, _curves(newest, "joint")
    panels = [(world, bar) for world in bars for bar in bars[world]]
    figure, axes = plt.subplots(-(-len(panels) // 3), 3, figsize=(11, 2.4 * -(-len(panels) // 3)), layout="constrained")
    for axis, (world, bar) in zip(axes.flat, panels, strict=False):
        for runs, style in ((alone[world], "-"), (joint, "--")):
            for seed, run in enumerate(runs):
                if world in run:
                    steps, scores = zip(*run[world][bar], strict=True)
                    axis.plot(steps, scores, style, color=f"C{seed}", marker=".")
        axis.axhline(bars[world][bar], color="grey", linestyle=":")
        axis.set(title=f"{world}: {bar.replace('*', 'worst slice').replace('/', ', ')}", xlabel="step", ylim=(0, 102))
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.savefig(PICTURE, dpi=80)
    plt.close(figure)
