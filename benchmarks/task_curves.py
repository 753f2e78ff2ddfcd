"""Learning curves of the worlds: the scores that have targets in applications.py, at every evaluation during training."""

import json
import re
from pathlib import Path

PICTURE = Path(__file__).parent / "task_curves.png"
ITEMS = {"alone": 50, "joint": 20, "target": 200}  # held-out items per slice of a score


def of_run(workdir: Path, targets: dict[str, dict]) -> dict[str, dict]:
    """world -> score -> [[step, value], ...] of a run that was evaluated on the world during training.

    targets: world -> {score: target}; a score is "SLICE/METRIC", slice "*": the worst of all slices, "all": all items together.
    """
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    evals = [r for r in records if r["kind"] == "eval"]
    asked = [world for world in targets if any(name.startswith(f"{world}/") for r in evals for name in r)]
    return {world: {score: [[r["step"], _value(r, world, score)] for r in evals] for score in targets[world]} for world in asked}


def _value(record: dict, world: str, score: str) -> float:
    row, _, metric = score.partition("/")
    if row == "*":
        return min(value for name, value in record.items() if re.fullmatch(f"{world}/[^/]+/{metric}", name))
    return record[f"{world}/{metric}" if row == "all" else f"{world}/{row}/{metric}"]


def section(newest: dict) -> list[str]:
    """Of BENCHMARKS.md. newest: name -> newest record."""
    recorded = [name.removesuffix("_minutes") for name in newest if name.endswith("_minutes")]
    alone = [name for name in recorded if name != "joint" and _curves(newest, name)]
    drawn = []
    if alone:
        drawn.append(f"solid: {', '.join(alone)}, each trained alone ({ITEMS['alone']} items per slice)")
    if _curves(newest, "joint"):
        drawn.append(f"dashed: the fine-tuning of configs/applications.py ({ITEMS['joint']} items per slice)")
    if not drawn:
        return []
    return [
        "## Learning curves of the worlds",
        "",
        f"Scores during training, on fewer held-out items than the targets ({ITEMS['target']} per slice); one line per seed."
        f" {'; '.join(drawn).capitalize()}; dotted: the target.",
        "",
        f"![scores of every world over steps](benchmarks/{PICTURE.name})",
    ]


def _curves(newest: dict, name: str) -> list:
    return newest.get(f"{name}_minutes", {}).get("details", {}).get("curves", [])


def draw(newest: dict, targets: dict[str, dict]) -> None:
    """Writes PICTURE. targets: world -> {score: target}."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [(world, score) for world in targets for score in targets[world]]
    figure, axes = plt.subplots(-(-len(panels) // 3), 3, figsize=(11, 2.4 * -(-len(panels) // 3) + 0.7), layout="constrained")
    keys, drawn = {}, set()  # label in the legend -> a line; kinds of curves
    for axis, (world, score) in zip(axes.flat, panels, strict=False):
        for kind, style, runs in (("alone", "-", _curves(newest, world)), ("joint", "--", _curves(newest, "joint"))):
            for seed, run in enumerate(runs):
                if world in run:
                    steps, values = zip(*run[world][score], strict=True)
                    label = f"seed {seed}" + (", trained alone" if kind == "alone" else "")
                    [keys[label]] = axis.plot(steps, values, style, color=f"C{seed}", marker=".")
                    drawn.add(kind)
        keys["target"] = axis.axhline(targets[world][score], color="grey", linestyle=":")
        row, _, metric = score.partition("/")
        where = {"*": ", worst slice", "all": ""}.get(row, f", {row}")
        axis.set(title=f"{world}: {metric}{where}", xlabel="step", ylim=(0, 102))
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    kinds = {"alone": "each world trained alone", "joint": "fine-tuning of the joint model"}
    lines = [f"{kinds[kind]}: {ITEMS[kind]} held-out items per slice".capitalize() for kind in kinds if kind in drawn]
    figure.suptitle("\n".join(lines) + f" (targets are defined on {ITEMS['target']})", fontsize=11)
    figure.legend(keys.values(), keys, loc="outside lower center", ncols=len(keys), frameon=False)
    figure.savefig(PICTURE, dpi=80)
    plt.close(figure)
