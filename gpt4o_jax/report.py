"""report.md of a run, finished or not, with loss.png, training.png and, if it has tasks, tasks.png."""

import re
import statistics

from etils import epath

from gpt4o_jax import comparison, task_report
from gpt4o_jax.comparison import Summary
from gpt4o_jax.config import base_config, flatten, to_dict
from gpt4o_jax.model import flops

SAMPLES = 5  # shown, spread over the run, including the first and the last


def write(workdir: epath.Path) -> dict:
    """Writes the report into a run folder; returns the newest numbers (None: none yet). Raises RunError if it is no run."""
    run = comparison.summarise(workdir)
    (run.workdir / "loss.png").write_bytes(plot_loss(run))
    (run.workdir / "training.png").write_bytes(plot_training(run))
    if task_report.curves(run):
        (run.workdir / "tasks.png").write_bytes(task_report.plot_curves(run))
    (run.workdir / "report.md").write_text(_markdown(run))
    return {
        "workdir": str(run.workdir),
        "step": run.step,
        "parameters": flops.parameter_count(run.config.model),
        "tokens": run.last("tokens"),
        **{name: run.held_out(name) for name in run.config.objective.scores},
    }


def plot_loss(run: Summary) -> bytes:
    """The measure of the objective, in training and held out, over tokens, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.subplots()
    measure = run.config.objective.measure
    training = [r[measure] for r in run.train]
    axes.plot([r["tokens"] for r in run.train], training, lw=1, color="tab:blue", alpha=0.6, label="training")
    tokens, held_out = run.curve()
    axes.plot(tokens, held_out, "o-", color="tab:orange", label="held out")
    if held_out:
        where = dict(textcoords="offset points", xytext=(0, 8), ha="center")
        axes.annotate(f"{held_out[-1]:.3f}", (tokens[-1], held_out[-1]), **where)
    values = comparison.finite(training)
    if values and measure == "bits_per_byte":
        # Leaves out the steep fall of the first few per cent, below which the rest would be a flat line.
        top = sorted(values)[int(0.97 * (len(values) - 1))]
        axes.set_ylim(min(comparison.finite([*values, *held_out])) * 0.9, top * 1.05)
    axes.set_xlabel("training tokens")
    axes.set_ylabel(measure.replace("_", " "))
    axes.grid(alpha=0.3)
    axes.legend()
    return comparison.png(figure)


def plot_training(run: Summary) -> bytes:
    """Learning rate, gradient norm and throughput over steps, one above the other, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), dpi=120)
    panels = {"learning_rate": "linear", "grad_norm": "log", "tokens_per_second": "linear"}
    for axes, (name, scale) in zip(figure.subplots(3, 1, sharex=True), panels.items(), strict=True):
        axes.plot([r["step"] for r in run.train], [r[name] for r in run.train], lw=1)
        axes.set_yscale(scale if comparison.finite([r[name] for r in run.train]) else "linear")
        axes.set_ylabel(name.replace("_", " "), fontsize=8)
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    return comparison.png(figure)


def _markdown(run: Summary) -> str:
    defaults = flatten(base_config().to_dict())
    changed = {k: v for k, v in flatten(to_dict(run.config)).items() if defaults[k] != v}
    return "\n".join(
        [
            f"# {run.workdir.name}",
            "",
            *([] if run.finished else [f"Not finished: {run.state}.", ""]),
            *_held_out(run),
            *_tasks(run),
            *_training(run),
            "## Config, where it differs from the defaults",
            "",
            "```",
            *(f"{k} = {v!r}" for k, v in changed.items()),
            "```",
            *_samples(run.workdir),
            "",
        ]
    )


def _held_out(run: Summary) -> list[str]:
    if not run.evals:
        return []
    final = run.evals[-1]
    if run.config.objective.method != "next_token":
        named = {name: value for name, value in final.items() if name not in ("kind", "step", "time")}
        rows = [f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in named.items()]
        return [f"| held out, step {final['step']:,} | |", "|---|---|", *rows, ""]
    return [
        f"| held out, step {final['step']:,} | |",
        "|---|---|",
        f"| bits per byte | **{final['bits_per_byte']:.4f}** |",
        f"| loss (nats a token) | {final['loss']:.4f} |",
        f"| perplexity (a token) | {final['perplexity']:.2f} |",
        f"| next-token accuracy | {final['accuracy']:.3f} |",
        f"| tokens, bytes scored | {final['tokens']:,}, {final['bytes']:,} |",
        "",
    ]


def _tasks(run: Summary) -> list[str]:
    scores = {name: values[-1] for name, (_, values) in task_report.curves(run).items()}
    if not scores:
        return []
    rows = [f"| {name} | {value:.1f} |" for name, value in scores.items()]
    return [f"| task, step {run.evals[-1]['step']:,} | |", "|---|---|", *rows, "", "![tasks](tasks.png)", ""]


def _training(run: Summary) -> list[str]:
    if not run.train:
        return []
    last = run.train[-1]
    rates = [r["tokens_per_second"] for r in run.train]
    mfu = [r["mfu"] for r in run.train if "mfu" in r]
    goodput = {k.removeprefix("goodput/"): v for k, v in last.items() if k.startswith("goodput/")}
    parts = min(10, len(rates))
    over_time = [statistics.median(rates[i * len(rates) // parts : (i + 1) * len(rates) // parts]) for i in range(parts)]
    return [
        "![loss](loss.png)",
        "",
        "| training | |",
        "|---|---|",
        f"| parameters | {flops.parameter_count(run.config.model):,} |",
        f"| steps, tokens | {last['step']:,}, {last['tokens']:,} |",
        f"| tokens/s (median) | {statistics.median(rates):,.0f} |",
        f"| tokens/s, over the run | {', '.join(f'{rate:,.0f}' for rate in over_time)} |",
        f"| MFU (median) | {statistics.median(mfu):.1%} |" if mfu else "| MFU | unknown device |",
        f"| wall time | {last['seconds'] / 60:.1f} minutes, restarts included |",
        f"| goodput: the share of it spent in training steps | {goodput.get('step', 0):.1%} |",
        "| all of it | " + ", ".join(f"{k} {v:.1%}" for k, v in goodput.items() if abs(v) >= 0.0005) + " |",
        f"| skipped steps | {last['skipped_steps']} |",
        "",
        "![learning rate, gradient norm, throughput](training.png)",
        "",
    ]


def _samples(workdir: epath.Path) -> list[str]:
    folder = workdir / "samples"
    texts = [p for p in folder.glob("*.txt") if p.stem.isdecimal()] if folder.exists() else []
    found = sorted(texts, key=lambda p: int(p.stem))
    chosen = sorted({round(i * (len(found) - 1) / (SAMPLES - 1)) for i in range(SAMPLES)}) if found else []
    lines = []
    for path in (found[i] for i in reversed(chosen)):
        text = path.read_text().rstrip()
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))  # longer than any in the text
        lines += ["", f"## Samples at step {path.stem}", "", f"{fence}text", text, fence]
    return lines
