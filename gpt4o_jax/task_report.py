"""Scores of generated answers: tables, bar charts, learning curves, and every answer with its score."""

import dataclasses
import json
from collections.abc import Sequence

from etils import epath

from gpt4o_jax import comparison
from gpt4o_jax.comparison import Summary
from gpt4o_jax.evaluation.generation import Task, leading
from gpt4o_jax.tasks import metrics


@dataclasses.dataclass(frozen=True)
class Answered:
    """A task, a model's answers to its items, and the scores: slice -> metric -> score, the row "all" last."""

    task: Task
    said: list[str]
    scores: dict[str, dict[str, metrics.Score]]

    @property
    def numbers(self) -> dict:
        """The scores as plain numbers."""
        return {row: {name: dataclasses.asdict(s) for name, s in scores.items()} for row, scores in self.scores.items()}


def text_table(found: Sequence[Answered]) -> str:
    """One Markdown table over all tasks: the leading metric for each slice, every metric over all items."""
    lines = ["| task | slice | items | metric | score [95 % interval] |", "|---|---|--:|---|--:|"]
    for a in found:
        first = leading(a.task)
        for row, scores in a.scores.items():
            for name, score in scores.items():
                if row == "all" or name == first.get(row, a.task.metrics[0]):
                    lines.append(f"| {a.task.name} | {row} | {score.items} | {name} | {score} |")
    return "\n".join(lines) + "\n"


def save(folder: epath.Path, found: Sequence[Answered]) -> None:
    """TASK.jsonl with every prompt, answer, reference and score; scores.json, scores.md, scores.png of all tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    for a in found:
        lines = [_line(a.task, item, said) for item, said in zip(a.task.items, a.said, strict=True)]
        (folder / f"{a.task.name}.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    (folder / "scores.json").write_text(json.dumps({a.task.name: a.numbers for a in found}, indent=1) + "\n")
    (folder / "scores.md").write_text(text_table(found))
    (folder / "scores.png").write_bytes(plot_scores(found))


def _line(task: Task, item, said: str) -> dict:
    return {
        "slice": item.slice,
        "prompt": [{"role": m.role, "content": m.text} for m in item.prompt],
        "answer": said,
        "references": item.references,
        **{name: metrics.each(name, [said], [item])[0] for name in task.metrics if metrics.can_score(name, item)},
    }


def plot_scores(found: Sequence[Answered]) -> bytes:
    """The leading metric of each slice of each task as bars with their intervals, as a PNG."""
    from matplotlib.figure import Figure

    bars = []
    for n, a in enumerate(found):
        first = leading(a.task)
        metric = lambda row, a=a, first=first: first.get(row, a.task.metrics[0])
        bars += [(n, f"{a.task.name} {row} ({metric(row)})", s[metric(row)]) for row, s in a.scores.items() if s]
    figure = Figure(figsize=(8, 1 + 0.28 * len(bars)), dpi=120)
    axes = figure.subplots()
    for at, (n, _, score) in enumerate(bars):
        reach = [[max(score.value - score.low, 0)], [max(score.high - score.value, 0)]]
        axes.barh(at, score.value, color=comparison.colours(len(found))(n), xerr=reach, capsize=2)
    axes.set_yticks(range(len(bars)), [label for _, label, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 105)
    axes.grid(axis="x", alpha=0.3)
    return comparison.png(figure)


# ---------------------------------------------------------------- in the report of a run


def curves(run: Summary) -> dict[str, tuple[list[float], list[float]]]:
    """ "TASK/METRIC" -> (tokens, scores) of every evaluation that has it."""
    names = [n for n in (run.evals[-1] if run.evals else ()) if "/" in n and not n.endswith("/bits_per_byte")]
    return {n: run.curve(n) for n in names}


def plot_curves(run: Summary) -> bytes:
    """The scores of tasks over tokens: one panel per task, its slices as thin lines, as a PNG."""
    from matplotlib.figure import Figure

    found = curves(run)
    names = list(dict.fromkeys(n.partition("/")[0] for n in found))
    figure = Figure(figsize=(7, 2.2 * len(names)), dpi=120)
    for axes, name in zip(figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0], names, strict=True):
        for metric, (tokens, scores) in found.items():
            if metric.startswith(f"{name}/"):
                thin = metric.count("/") > 1
                axes.plot(tokens, scores, "-" if thin else "o-", ms=3, lw=0.8 if thin else 1.5, label=metric.partition("/")[2])
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_xlabel("training tokens")
    return comparison.png(figure)
