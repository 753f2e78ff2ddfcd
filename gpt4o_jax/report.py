"""report.md with loss.png: what a finished run was and what came out."""

from etils import epath

from gpt4o_jax.config import base_config, flatten, to_dict
from gpt4o_jax.model import flops
from gpt4o_jax.run import read_config
from gpt4o_jax.training.metrics import read_metrics


def write(workdir: epath.Path) -> dict:
    """Writes report.md and loss.png into a run folder; returns the final numbers."""
    config = read_config(workdir)
    records = read_metrics(workdir)
    train = [r for r in records if r["kind"] == "train"]
    evals = [r for r in records if r["kind"] == "eval"]
    (workdir / "loss.png").write_bytes(plot(train, evals))
    last, final = train[-1], evals[-1]
    samples = sorted((workdir / "samples").glob("*.txt"), key=lambda p: int(p.stem))
    result = {
        "workdir": str(workdir),
        "step": last["step"],
        "parameters": flops.parameter_count(config.model),
        "tokens": last["tokens"],
        **{name: final[name] for name in ("loss", "perplexity", "bits_per_byte", "accuracy")},
    }
    (workdir / "report.md").write_text(_markdown(config, train, final, result, samples))
    return result


def plot(train: list[dict], evals: list[dict]) -> bytes:
    """Training and held-out bits per byte over tokens, as a PNG."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    axes.plot(
        [r["tokens"] for r in train], [r["bits_per_byte"] for r in train], lw=1, color="tab:blue", alpha=0.6, label="training"
    )
    tokens = {r["step"]: r["tokens"] for r in train}
    points = [(tokens[r["step"]], r["bits_per_byte"]) for r in evals if r["step"] in tokens]
    axes.plot(*zip(*points, strict=True), "o-", color="tab:orange", label="held out")
    axes.annotate(f"{points[-1][1]:.3f}", points[-1], textcoords="offset points", xytext=(0, 8), ha="center")
    values = sorted(r["bits_per_byte"] for r in train)
    axes.set_ylim(min(values[0], points[-1][1]) * 0.9, values[int(0.97 * (len(values) - 1))] * 1.05)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def _markdown(config, train, final, result, samples) -> str:
    base = flatten(base_config().to_dict())
    changed = {k: v for k, v in flatten(to_dict(config)).items() if base[k] != v}
    last = train[-1]
    rates = sorted(r["tokens_per_second"] for r in train)
    goodput = {k.removeprefix("goodput/"): v for k, v in last.items() if k.startswith("goodput/")}
    mfu = sorted(r["mfu"] for r in train if "mfu" in r)
    lines = [
        f"# {epath.Path(result['workdir']).name}",
        "",
        "| held out | |",
        "|---|---|",
        f"| bits per byte | **{final['bits_per_byte']:.4f}** |",
        f"| loss (nats a token) | {final['loss']:.4f} |",
        f"| perplexity (a token) | {final['perplexity']:.2f} |",
        f"| next-token accuracy | {final['accuracy']:.3f} |",
        f"| tokens, bytes scored | {final['tokens']:,}, {final['bytes']:,} |",
        "",
        "![loss](loss.png)",
        "",
        "| training | |",
        "|---|---|",
        f"| parameters | {result['parameters']:,} |",
        f"| steps, tokens | {result['step']:,}, {result['tokens']:,} |",
        f"| tokens/s (median) | {rates[len(rates) // 2]:,.0f} |",
        f"| MFU (median) | {mfu[len(mfu) // 2]:.1%} |" if mfu else "| MFU | unknown device |",
        "| wall time | " + ", ".join(f"{k} {v:.1%}" for k, v in goodput.items() if abs(v) >= 0.0005) + " |",
        f"| skipped steps | {last['skipped_steps']} |",
        "",
        "## Config, where it differs from the defaults",
        "",
        "```",
        *(f"{k} = {v!r}" for k, v in changed.items()),
        "```",
    ]
    if samples:
        lines += ["", f"## Samples at step {samples[-1].stem}", "", "```text", samples[-1].read_text().rstrip(), "```"]
    return "\n".join(lines) + "\n"
