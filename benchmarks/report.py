"""BENCHMARKS.md: the newest record of every promise, met or not, with tables of what was measured beside.

`python benchmarks/measure.py --report` writes it, and so does plan_table.py.
"""

import functools
import json
from pathlib import Path

import applications
import generation_speed
import mesh_table
import plan_table
import task_curves
import training_speed
from targets import BOUNDS, TARGETS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.jsonl"


def records() -> dict[str, dict]:
    """name -> its newest record."""
    entries = map(json.loads, RESULTS.read_text().splitlines() if RESULTS.exists() else ())
    return {entry["name"]: entry for entry in entries}


def report() -> str:
    """BENCHMARKS.md: the newest record of every target, met or not."""
    newest = records()
    lines = [
        "# Benchmarks",
        "",
        "Written by `python benchmarks/measure.py --report` from benchmarks/results.jsonl;",
        "the promises are in benchmarks/targets.py.",
        "",
        "| promise | target | measured | met | how | noise | date | commit | machine |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, t in TARGETS.items():
        entry = newest.get(name)
        sign = ">=" if t.at_least else "<="
        measured, met, where = "not measured", "", ["", "", ""]
        if entry:
            measured = f"{entry['value']:.4g}"
            met = "yes" if (entry["value"] >= t.number if t.at_least else entry["value"] <= t.number) else "**no**"
            where = [entry["date"], entry["commit"], entry["machine"]]
        lines.append("| " + " | ".join([name, f"{sign} {t.number:g} {t.unit}", measured, met, t.how, t.noise, *where]) + " |")
    for name, entry in newest.items():
        if name not in TARGETS and name not in SECTIONS:
            said = ", ".join(f"{k} {v}" for k, v in entry["details"].items())
            lines += ["", f"For comparison, {name}: {entry['value']:.4g} ({said}; {entry['date']}, {entry['commit']})."]
    for shape in training_speed.SHAPES:
        if f"{shape}_over_torch" in newest:
            lines += ["", *_speed_table(shape, newest[f"{shape}_over_torch"])]
    for name, section in SECTIONS.items():
        if name in newest:
            lines += ["", *section(newest[name])]
    if curves := task_curves.section(newest):
        lines += ["", *curves, "", BOUNDS["worlds"]]
    if mesh_table.RESULTS.exists():
        lines += ["", *mesh_table.table()]
    lines += ["", *plan_table.table()]
    return "\n".join(lines) + "\n"


def write() -> None:
    """BENCHMARKS.md and its picture."""
    (ROOT / "BENCHMARKS.md").write_text(report())
    task_curves.draw(records(), {world: wanted for world, (_, wanted) in applications.BARS.items()})


def _speed_table(shape: str, entry: dict) -> list[str]:
    d = entry["details"]
    names = {mode: f"torch {mode}" for mode in training_speed.PEER_MODES} | {"ours": f"gpt4o_jax {d['compute_dtype']}"}
    memory = d["peak_gigabytes"]
    products = d["product_gflops"]
    return [
        f"## {shape}: training, medians of {training_speed.ROUNDS} runs in turns",
        "",
        "| | tokens/s | peak memory, GB |",
        "|---|---|---|",
        *(f"| {names[mode]} | {rate:,.0f} | {memory[mode]} |" for mode, rate in d["tokens_per_second"].items()),
        "",
        f"gpt4o_jax: {d['achieved_gflops']:.0f} GFLOP/s (6N + 12LdT), attention by {d['attention']}. The machine in the same"
        f" processes: products {products['float32']:.0f} GFLOP/s in float32 and {products['bfloat16']:.0f} in bfloat16, reads"
        f" {d['read_gigabytes_per_second']:.0f} GB/s. {entry['date']}, {entry['commit']}, {entry['machine']}.",
        *(["", BOUNDS[shape]] if shape in BOUNDS else []),
    ]


def _gpu_table(shape: str, entry: dict) -> list[str]:
    d, theirs = entry["details"], entry["details"]["torch_compiled_tokens_per_second"]
    return [
        f"## {shape}: training on a GPU in bfloat16, batch {d['batch']}, {d['steps']} steps",
        "",
        "| | tokens/s | share of the datasheet's rate | peak memory, GB |",
        "|---|---|---|---|",
        f"| gpt4o_jax, attention by {d['attention']} | {d['tokens_per_second']:,.0f} | {entry['value']:.1%} |"
        f" {d['peak_bytes'] / 1e9:.1f} |",
        f"| torch, compiled | {theirs if isinstance(theirs, str) else f'{theirs:,.0f}'} | | |",
        "",
        f"{entry['date']}, {entry['commit']}, {entry['machine']}.",
    ]


def _generation_table(batch: int, entry: dict) -> list[str]:
    d = entry["details"]
    lines = [f"## Generation, batch {batch}: GPT-2 124M, 128 + 128 tokens, medians of runs in turns", ""]
    lines += ["| | new tokens/s, prompt included | decoding alone | weights, MB |", "|---|---|---|---|"]
    for mode, rate in d["tokens_per_second"].items():
        who, weights = mode.split()
        ours = (
            [f"{d[key][weights]:.1f}" for key in ("decode_tokens_per_second", "weight_megabytes")] if who == "ours" else ["", ""]
        )
        lines.append("| " + " | ".join([mode.replace("ours", "gpt4o_jax"), f"{rate:.1f}", *ours]) + " |")
    said = f"The machine reads {d['read_gigabytes_per_second']:.0f} GB/s. {entry['date']}, {entry['commit']}, {entry['machine']}."
    return [*lines, "", said, *(["", BOUNDS[f"generate_b{batch}"]] if f"generate_b{batch}" in BOUNDS else [])]


def _batching_table(entry: dict) -> list[str]:
    d = entry["details"]
    lines = ["## 64 requests of different lengths: GPT-2 124M, 8 rows", "", "| | new tokens/s | seconds |", "|---|---|---|"]
    lines += [f"| {way} | {rate:.1f} | {d['seconds'][way]:.1f} |" for way, rate in d["tokens_per_second"].items()]
    return [*lines, "", BOUNDS["continuous_over_static"]]


def _speculation_table(entry: dict) -> list[str]:
    d = entry["details"]
    lines = ["## Text that repeats itself, continued with and without drafts of 4 tokens", "", "| | new tokens/s |", "|---|---|"]
    lines += [f"| {way} | {rate:,.0f} |" for way, rate in d["tokens_per_second"].items()]
    kept, gain = d["tokens_per_pass"], entry["value"]
    bound = (
        f"What bounds it: a pass over five places keeps {kept:.1f} tokens, so it would be {kept:.1f} times as fast were such a"
        f" pass as short as one over a single place; it takes {kept / gain:.1f} times as long."
    )
    return [*lines, "", f"{bound} {entry['date']}, {entry['commit']}, {entry['machine']}."]


def _bits_table(entry: dict) -> list[str]:
    costs = entry["details"]
    lines = ["## Weights and caches in fewer bits: bits per byte on the hold-out, after 300 steps of configs/quickstart.py", ""]
    lines += ["| | " + " | ".join(costs) + " |", "|---" * (len(costs) + 1) + "|"]
    for label in costs["dense"]:
        form = "{:.4f}" if label == "unrounded" else "{:+.4f}"
        lines.append(f"| {label} | " + " | ".join(form.format(cost[label]) for cost in costs.values()) + " |")
    return [*lines, "", f"experts: 8, of which a token passes 2, of width 512. {entry['date']}, {entry['commit']}."]


def _transfer_table(entry: dict) -> list[str]:
    import mup_transfer as transfer

    losses = entry["details"]["losses"]
    said = (
        f"The mean loss of the last {transfer.LAST} of {transfer.STEPS} steps, in nats a byte; the least of each model in bold."
    )
    said += f" {entry['date']}, {entry['commit']}."
    return ["## Learning rates at two widths, with muP and without", "", transfer.markdown(losses), "", said]


def _products_table(entry: dict) -> list[str]:
    shapes = {name: times for name, times in entry["details"].items() if isinstance(times, dict)}
    forms = list(dict.fromkeys(form for times in shapes.values() for form in times))
    lines = ["## Products of one or eight rows on XLA:CPU, microseconds, weights from memory", ""]
    lines += ["| form | " + " | ".join(shapes) + " |", "|---" * (len(shapes) + 1) + "|"]
    for form in forms:
        lines.append(f"| {form} | " + " | ".join(f"{times[form]:,}" if form in times else "" for times in shapes.values()) + " |")
    how = "Timed by hand, no command writes it: fastest of 1 s of calls on a machine that was not quiet"
    return [*lines, "", f"{how}. {entry['date']}, {entry['commit']}."]


SECTIONS = {
    **{f"{shape}_mfu": functools.partial(_gpu_table, shape) for shape in ("gpu_124m", "gpu_1300m")},
    **{f"generate_b{batch}_over_torch": functools.partial(_generation_table, batch) for batch in generation_speed.BATCHES},
    "continuous_over_static": _batching_table,
    "speculation_gain": _speculation_table,
    "decode_products": _products_table,
    "int8_weights_cost": _bits_table,
    "mup_rate_shift": _transfer_table,
}
