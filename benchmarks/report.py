"""BENCHMARKS.md: the newest record of every target, met or not, with tables of what was measured beside.

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
from targets import BOTTLENECKS, COMPARISONS, OTHER, SEED, SHAPES, TARGETS, TOPICS, WORLD_NOTES, Target, topic

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.jsonl"


def records() -> dict[str, dict]:
    """name -> its newest record."""
    entries = map(json.loads, RESULTS.read_text().splitlines() if RESULTS.exists() else ())
    return {entry["name"]: entry for entry in entries}


def report() -> str:
    """BENCHMARKS.md: the newest record of every target, met or not."""
    newest = records()
    lines = ["# Benchmarks", "", *_summary(newest)]
    for heading in (*TOPICS, OTHER):
        lines += _targets_table(heading, newest)
    for shape in training_speed.SHAPES:
        if f"{shape}_over_torch" in newest:
            lines += ["", *_speed_table(shape, newest[f"{shape}_over_torch"])]
    for name, section in SECTIONS.items():
        if name in newest:
            lines += ["", *section(newest[name])]
    if curves := task_curves.section(newest):
        lines += ["", *curves]
        for note in WORLD_NOTES:
            lines += ["", note]
    if mesh_table.RESULTS.exists():
        lines += ["", *mesh_table.table()]
    lines += ["", *plan_table.table()]
    return "\n".join(lines) + "\n"


def write() -> None:
    """BENCHMARKS.md and its picture."""
    (ROOT / "BENCHMARKS.md").write_text(report())
    task_curves.draw(records(), {world: scores for world, (_, scores) in applications.WORLD_TARGETS.items()})


def _summary(newest: dict) -> list[str]:
    missed = {n: t for n, t in TARGETS.items() if n in newest and not t.met(newest[n]["value"])}
    open_ones = [name for name in TARGETS if name not in newest]
    met = len(TARGETS) - len(missed) - len(open_ones)
    lines = [f"{met} of {len(TARGETS)} targets met, {len(missed)} missed, {len(open_ones)} not measured yet."]
    if missed:
        lines += ["", "| missed | measured | target |", "|---|---|---|"]
        lines += [f"| {name} | {newest[name]['value']:.4g} | {t} |" for name, t in missed.items()]
    if open_ones:
        lines += ["", f"Not measured yet: {', '.join(open_ones)}."]
    return [
        *lines,
        "",
        "Targets are defined in benchmarks/targets.py; every measurement is in benchmarks/results.jsonl, and the newest of each"
        " target is shown here. `python benchmarks/measure.py --report` writes this file. Noise: how far repeated measurements"
        " differ.",
    ]


def _targets_table(heading: str, newest: dict) -> list[str]:
    """The targets of a topic, and records without a target to compare them with."""
    chosen = {name: t for name, t in TARGETS.items() if topic(name) == heading}
    others = [name for name in newest if name not in TARGETS and name not in SECTIONS and topic(name) == heading]
    if not chosen and not others:
        return []
    lines = ["", f"## {heading}"]
    if note := TOPICS.get(heading, ("", ""))[1]:
        lines += ["", note]
    if chosen:
        lines += [
            "",
            "| name | target | measured | met | how it is measured | noise | date | commit | machine |",
            "|---" * 9 + "|",
        ]
    for name, t in chosen.items():
        entry = newest.get(name)
        measured, met, where = "not measured", "", ["", "", ""]
        if entry:
            measured = f"{entry['value']:.4g}"
            met = "yes" if t.met(entry["value"]) else "**no**"
            where = [entry["date"], entry["commit"], entry["machine"]]
        lines.append("| " + " | ".join([name, str(t), measured, met, t.how, _noise(t, entry), *where]) + " |")
    for name in others:
        entry = newest[name]
        what = f" ({COMPARISONS[name]})" if name in COMPARISONS else ""
        said = ", ".join(f"{key} {_rounded(value)}" for key, value in entry["details"].items())
        made = "; ".join([said, f"{entry['date']}, {entry['commit']}"] if said else [f"{entry['date']}, {entry['commit']}"])
        lines += ["", f"For comparison, {name}{what}: {entry['value']:.4g} ({made})."]
    return lines


def _rounded(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(_rounded, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _noise(t: Target, entry: dict | None) -> str:
    """Of what differs between seeds: their values, or the standard deviation, where the record has them."""
    details = entry["details"] if entry else {}
    if t.noise != SEED:
        return t.noise
    if "stdev" in details:
        return f"standard deviation over seeds: {details['stdev']:.2g}"
    seeds = details.get("seeds") or details.get("percent")
    return f"seeds: {_rounded(seeds)}" if seeds else t.noise


def _made(entry: dict) -> str:
    return f"{entry['date']}, {entry['commit']}, {entry['machine']}."


def _speed_table(shape: str, entry: dict) -> list[str]:
    d = entry["details"]
    names = {mode: f"torch {mode}" for mode in training_speed.PEER_MODES} | {"ours": f"gpt4o_jax {d['compute_dtype']}"}
    memory = d["peak_gigabytes"]
    matmuls = d["product_gflops"]
    return [
        f"## {shape}: training speed",
        "",
        f"{SHAPES[shape][0]}; interleaved runs, median of {training_speed.ROUNDS}.",
        "",
        "| | tokens/s | peak memory, GB |",
        "|---|---|---|",
        *(f"| {names[mode]} | {rate:,.0f} | {memory[mode]:.2f} |" for mode, rate in d["tokens_per_second"].items()),
        "",
        f"gpt4o_jax reaches {d['achieved_gflops']:.0f} GFLOP/s with attention={d['attention']}. In the same processes, the"
        f" machine reaches {matmuls['float32']:.0f} GFLOP/s in float32 matmuls and {matmuls['bfloat16']:.0f} in bfloat16 ones,"
        f" and reads memory at {d['read_gigabytes_per_second']:.0f} GB/s. {_made(entry)}",
        *(["", BOTTLENECKS[shape]] if shape in BOTTLENECKS else []),
    ]


def _gpu_table(shape: str, entry: dict) -> list[str]:
    d, theirs = entry["details"], entry["details"]["torch_compiled_tokens_per_second"]
    return [
        f"## {shape}: training on a GPU in bfloat16, batch {d['batch']}, {d['steps']} steps",
        "",
        "| | tokens/s | MFU | peak memory, GB |",
        "|---|---|---|---|",
        f"| gpt4o_jax, attention={d['attention']} | {d['tokens_per_second']:,.0f} | {entry['value']:.1%} |"
        f" {d['peak_bytes'] / 1e9:.1f} |",
        f"| torch, compiled | {theirs if isinstance(theirs, str) else f'{theirs:,.0f}'} | | |",
        "",
        f"MFU: relative to the datasheet's dense bfloat16 rate. {_made(entry)}",
    ]


def _generation_table(batch: int, entry: dict) -> list[str]:
    d = entry["details"]
    lines = [
        f"## Generation speed, batch {batch}",
        "",
        f"GPT-2 124M, {generation_speed.PROMPT} prompt + {generation_speed.NEW} new tokens; interleaved runs, median of"
        f" {generation_speed.ROUNDS}.",
        "",
        "| | new tokens/s, prompt included | decoding only | weights, MB |",
        "|---|---|---|---|",
    ]
    for mode, rate in d["tokens_per_second"].items():
        who, weights = mode.split()
        ours = (
            [f"{d[key][weights]:.1f}" for key in ("decode_tokens_per_second", "weight_megabytes")] if who == "ours" else ["", ""]
        )
        lines.append("| " + " | ".join([mode.replace("ours", "gpt4o_jax"), f"{rate:.1f}", *ours]) + " |")
    said = f"The machine reads memory at {d['read_gigabytes_per_second']:.0f} GB/s. {_made(entry)}"
    why = BOTTLENECKS.get(f"generate_b{batch}")
    return [*lines, "", said, *(["", why] if why else [])]


def _batching_table(entry: dict) -> list[str]:
    d = entry["details"]
    lines = [
        "## Continuous and static batching",
        "",
        "64 requests of different lengths, GPT-2 124M, 8 rows.",
        "",
        "| batches | new tokens/s | seconds |",
        "|---|---|---|",
    ]
    lines += [f"| {way} | {rate:.1f} | {d['seconds'][way]:.1f} |" for way, rate in d["tokens_per_second"].items()]
    return [*lines, "", _made(entry), "", BOTTLENECKS["continuous_over_static"]]


def _speculation_table(entry: dict) -> list[str]:
    d = entry["details"]
    lines = ["## Speculative decoding on repetitive text (n-gram drafts of 4 tokens)", "", "| | new tokens/s |", "|---|---|"]
    lines += [f"| {way} | {rate:,.0f} |" for way, rate in d["tokens_per_second"].items()]
    kept, gain = d["tokens_per_pass"], entry["value"]
    why = (
        f"Bottleneck: a verification pass over five positions accepts {kept:.1f} tokens but takes {kept / gain:.1f} times as long"
        " as a single-token pass."
    )
    return [*lines, "", f"{why} {_made(entry)}"]


def _bits_table(entry: dict) -> list[str]:
    costs = entry["details"]
    lines = [
        "## Cost of quantised weights and KV cache",
        "",
        "Bits per byte on the hold-out after 300 steps of configs/quickstart.py: of the unquantised model, then what is added.",
        "",
        "| | " + " | ".join(costs) + " |",
        "|---" * (len(costs) + 1) + "|",
    ]
    for label in costs["dense"]:
        form, shown = ("{:.4f}", "unquantised") if label == "unrounded" else ("{:+.4f}", label.replace("kv_cache", "KV cache"))
        lines.append(f"| {shown} | " + " | ".join(form.format(cost[label]) for cost in costs.values()) + " |")
    return [*lines, "", f"experts: 8 experts of width 512, 2 per token. {entry['date']}, {entry['commit']}."]


def _transfer_table(entry: dict) -> list[str]:
    import mup_transfer as transfer

    losses = entry["details"]["losses"]
    said = f"Mean loss of the last {transfer.LAST} of {transfer.STEPS} steps, in nats per byte; the lowest of each model in bold."
    said += f" {entry['date']}, {entry['commit']}."
    return ["## Learning rates at two widths, with and without muP", "", transfer.markdown(losses), "", said]


def _matmul_table(entry: dict) -> list[str]:
    shapes = {name: times for name, times in entry["details"].items() if isinstance(times, dict)}
    forms = list(dict.fromkeys(form for times in shapes.values() for form in times))
    lines = ["## Matrix-vector and 8-row matmul times on XLA:CPU", "", "In microseconds, with weights read from memory.", ""]
    lines += ["| form | " + " | ".join(shapes) + " |", "|---" * (len(shapes) + 1) + "|"]
    for form in forms:
        lines.append(f"| {form} | " + " | ".join(f"{times[form]:,}" if form in times else "" for times in shapes.values()) + " |")
    how = (
        "Sums of slices: the form of gpt4o_jax/ops/weights.py, one loop that upcasts, multiplies and adds. Timed by hand (no"
        " script); best of 1 s of calls on a machine that was not idle."
    )
    return [*lines, "", f"{how} {entry['date']}, {entry['commit']}."]


SECTIONS = {
    **{f"{shape}_mfu": functools.partial(_gpu_table, shape) for shape in ("gpu_124m", "gpu_1300m")},
    **{f"generate_b{batch}_over_torch": functools.partial(_generation_table, batch) for batch in generation_speed.BATCHES},
    "continuous_over_static": _batching_table,
    "speculation_gain": _speculation_table,
    "decode_products": _matmul_table,
    "int8_weights_cost": _bits_table,
    "mup_rate_shift": _transfer_table,
}
