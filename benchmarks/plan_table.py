"""Which models fit which slices, and what bounds them: `python benchmarks/plan_table.py [WORD ...]`.

Needs libtpu (requirements-tpu.txt). `plan` compiles every cell whose command has all these words, in a process of its own;
what it says is appended to plans.jsonl, and BENCHMARKS.md is written anew. A cell that is there already is left out, so this can
be stopped and started; one that is no longer wanted, or should be compiled again, is deleted there.
"""

import datetime
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from commits import current_commit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "plans.jsonl"

SLICES = ("v5e:16x16", "v5p:8x8x8", "v6e:16x16", "tpu7x:4x4x4", "4 v5e:16x16")


class Cell(NamedTuple):
    config: str  # in configs/
    T: int
    slices: str  # as in SLICES
    mesh: str  # and other knobs that it needs, with a dot in their names
    rows: int  # of a batch


# (config, T): for each of SLICES the mesh and the rows of a batch. The rows are few: what fits decides, not what learns best.
# Weights are split over all devices of a slice and copied between slices, as far as memory allows; tensor is as wide as saved
# activations need (a tpu7x has two devices a chip). Experts take 1,024 tokens at a time: for two whole rows a v6e has no room.
MODELS = {
    ("gpt4o.py:large", 4096): [
        ("fsdp=256", 256),
        ("fsdp=512", 512),
        ("fsdp=256", 512),
        ("fsdp=128", 256),
        ("data=4 fsdp=256", 1024),
    ],
    ("gpt4o.py:xl", 8192): [
        ("fsdp=64 tensor=4", 256),
        ("fsdp=512", 512),
        ("fsdp=256", 512),
        ("fsdp=128", 256),
        ("data=4 fsdp=64 tensor=4", 1024),
    ],
    ("gpt4o.py:xxl", 8192): [
        ("fsdp=32 tensor=8", 64),
        ("fsdp=128 tensor=4", 512),
        ("fsdp=64 tensor=4", 128),
        ("fsdp=32 tensor=4", 128),
        ("data=4 fsdp=32 tensor=8", 256),
    ],
    ("llama.py:8b", 8192): [
        ("fsdp=64 tensor=4", 256),
        ("fsdp=512", 512),
        ("fsdp=256", 512),
        ("fsdp=128", 256),
        ("data=4 fsdp=64 tensor=4", 1024),
    ],
    ("llama.py:70b", 8192): [
        ("fsdp=32 tensor=8", 64),
        ("fsdp=128 tensor=4", 512),
        ("fsdp=64 tensor=4", 128),
        ("fsdp=32 tensor=4", 128),
        ("data=4 fsdp=32 tensor=8", 256),
    ],
    ("llama.py:405b", 8192): [
        ("fsdp=32 tensor=8", 32),
        ("fsdp=64 tensor=8", 256),
        ("fsdp=32 tensor=8", 32),
        ("fsdp=16 tensor=8", 32),
        ("fsdp=128 tensor=8", 128),
    ],
    ("mixtral.py:8x7b", 4096): [
        ("fsdp=32 expert=8 model.expert_chunk=1024", 256),
        ("fsdp=64 expert=8 model.expert_chunk=1024", 1024),
        ("fsdp=32 expert=8 model.expert_chunk=1024", 512),
        ("fsdp=16 expert=8 model.expert_chunk=1024", 256),
        ("data=4 fsdp=32 expert=8 model.expert_chunk=1024", 1024),
    ],
}
CELLS = [Cell(*model, s, *how) for model, row in MODELS.items() for s, how in zip(SLICES, row, strict=True)]
CELLS += [
    Cell("llama.py:2-70b", 4096, "v5p:8x8x8", "fsdp=128 tensor=4", 512),
    Cell("llama.py:2-70b", 4096, "v6e:16x16", "fsdp=64 tensor=4", 256),
    Cell("llama.py:405b", 8192, "2 v6e:16x16", "fsdp=512 model.remat=offload", 512),
    Cell("llama.py:8b", 131_072, "v5p:8x8x8", "fsdp=32 context=16", 32),
    Cell("mixtral.py:8x7b", 4096, "v5p:4x4x8", "fsdp=16 expert=8 model.expert_chunk=1024", 256),
]

# What MaxText reached on the same model, slice and T: MFU (causal attention counted as half) and tokens/s a chip; its
# docs/reference/models/tiering.md at 20a91e1. For 405B that says 256 chips, of which its recipe (tpu-recipes at 21efcc2,
# training/trillium/Llama3.1-405B-MaxText) takes two slices: weights over all 512, the inputs of layers in the host's memory.
# For Mixtral on v5p it says 256 chips (8x4x4): that is a v5p-256, so called by its cores, of 128 chips.
MAXTEXT = {
    ("llama.py:8b", "v6e:16x16"): (0.4546, 7207),
    ("llama.py:70b", "v6e:16x16"): (0.5033, 960),
    ("llama.py:405b", "2 v6e:16x16"): (0.3855, 123),
    ("llama.py:2-70b", "v6e:16x16"): (0.438, 900),
    ("mixtral.py:8x7b", "v6e:16x16"): (0.3523, 3899),
    ("llama.py:2-70b", "v5p:8x8x8"): (0.654, 692),
    ("mixtral.py:8x7b", "v5p:4x4x8"): (0.5256, 2909),
}


def command(cell: Cell) -> list[str]:
    topology = cell.slices.split()
    mesh = {"data": "1", "fsdp": "1"} | dict(part.split("=") for part in cell.mesh.split())
    knobs = {name if "." in name else f"mesh.{name}": value for name, value in mesh.items()}
    knobs |= {"model.context_length": cell.T, "train.batch_size": cell.rows, "train.accumulate": 1}
    flags = [f"--topology={topology[-1]}", *(["--slices=" + topology[0]] if topology[1:] else [])]
    return [
        "plan",
        f"--config=configs/{cell.config}",
        *flags,
        "--try_seconds=480",
        *(f"--config.{name}={value}" for name, value in knobs.items()),
    ]


def recorded() -> dict[Cell, dict]:
    """The newest record of each cell."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {Cell(*entry["cell"]): entry for entry in map(json.loads, lines)}


def compile_cell(cell: Cell) -> dict:
    """What `plan` says, in its last line. It may abort: then the last of what it told stands under "error"."""
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "gpt4o_jax", *command(cell)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:500]}
    return json.loads(done.stdout.splitlines()[-1])


def main(words: list[str]) -> None:
    import report  # which imports this file too

    cells = sorted(CELLS, key=lambda cell: (cell.config, cell.slices) not in MAXTEXT)
    for number, cell in enumerate(cells, 1):
        if cell in recorded() or not all(word in " ".join(command(cell)) for word in words):
            continue
        commit = current_commit()
        print(f"{number}/{len(CELLS)}: {' '.join(command(cell))}", file=sys.stderr)
        result = compile_cell(cell)
        versions = {name: version(name) for name in ("jax", "libtpu")}
        entry = {"cell": cell, "result": result, "date": datetime.date.today().isoformat(), "commit": commit} | versions
        print(result.get("error") or f"fits: {result['fits']}", file=sys.stderr)
        with RESULTS.open("a") as f:
            f.write(json.dumps(entry) + "\n")
        report.write()
    report.write()


def table() -> list[str]:
    """The section of BENCHMARKS.md."""
    found = recorded()
    lines = [
        "## Models on slices: compiled ahead of time, not run",
        "",
        "By `python benchmarks/plan_table.py`: the training step, compiled by libtpu for the slice. GiB: what the program needs"
        " of a device's memory, and what it may use. A step takes at least what its slowest part takes at published rates"
        " (gpt4o_jax/training/topology.py): products, HBM, links in a slice (ICI), links between slices (DCN). So tokens/s and"
        " MFU (causal attention counted as half) are upper bounds that nothing here has reached, next to what MaxText has.",
        "",
        "Where fsdp takes a whole slice, libtpu sends more than it has to. All 256 chips of a v5e or v6e add up whole gradients"
        " (an all-reduce), of which each then keeps its part, for twice the bytes of a reduce-scatter. On v5p and tpu7x they"
        " gather weights that way too: they add up arrays that are zeros but for a chip's own part, for twice the bytes of an"
        " all-gather; tpu7x scatters the gradients of layers. With tensor, context or expert beside fsdp, weights are mostly"
        " gathered and gradients scattered, or passed round while products are computed (collective-permute).",
        "",
        "**no** (n of m not compiled): of m remedies that `plan` tried so many took too long to compile, so they may fit.",
        "",
        "| model | T | slice | mesh | rows | fits | GiB | bound by | s a step, at least | tokens/s a chip, at most | MFU, at most"
        " | MaxText: tokens/s, MFU |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in CELLS:
        name = cell.config.replace(".py", "")
        lines.append("| " + " | ".join([name, f"{cell.T:,}", cell.slices, *_row(cell, found.get(cell))]) + " |")
    made = sorted({f"{e['date']}, {e['commit']}, jax {e['jax']}, libtpu {e['libtpu']}" for e in map(found.get, CELLS) if e})
    return [*lines, "", "; ".join(made) + "."]


def _row(cell: Cell, entry: dict | None) -> list[str]:
    theirs = MAXTEXT.get((cell.config, cell.slices))
    peer = f"{theirs[1]:,}, {theirs[0]:.1%}" if theirs else ""
    result = entry["result"] if entry else {"error": "not compiled yet"}
    if "error" in result:
        return [cell.mesh, str(cell.rows), result["error"], "", "", "", "", "", peer]
    mesh, rows, fits = cell.mesh, cell.rows, "yes" if result["fits"] else "**no**"
    needed, roofline = result["bytes"]["total"], result.get("roofline")
    tried = result.get("tried", [])
    if late := sum(t["fits"] is None for t in tried):
        fits += f" ({late} of {len(tried)} not compiled)"
    if remedy := result.get("fits_with"):
        fits = "with " + ", ".join(f"{knob.split('.')[1]}={value}" for knob, value in remedy["knobs"].items())
        needed, roofline, rows = remedy["bytes"]["total"], remedy["roofline"], remedy["knobs"].get("train.batch_size", rows)
    memory = f"{needed / 2**30:.1f} of {result['hbm'] / 2**30:.1f}" if needed else ""
    if not roofline:
        return [mesh, str(rows), fits, memory, "", "", "", "", peer]
    seconds = roofline["step_seconds_at_least"]
    rate = rows * cell.T / result["chips"] / seconds
    bounds = [roofline["bound_by"], f"{seconds:.2f}", f"{rate:,.0f}", f"{roofline['mfu_causal_at_most']:.1%}"]
    return [mesh, str(rows), fits, memory, *bounds, peer]


if __name__ == "__main__":
    main(sys.argv[1:])
