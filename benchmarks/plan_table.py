"""Which models fit which TPU slices, and their bottlenecks: `python benchmarks/plan_table.py [WORD ...]`.

Needs libtpu (requirements-tpu.txt). `plan` compiles every cell whose command contains all these words, each in its own process;
its result is appended to plans.jsonl, and BENCHMARKS.md is rewritten. Cells that are there already are skipped, so that an
interrupted run can be resumed; to compile a cell again, delete its line there.
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
    mesh: str  # and other knobs that the cell needs, with a dot in their names
    rows: int  # per batch


# (config, T): for each of SLICES the mesh and the rows per batch. The rows are few: as many as fit, not as many as learn best.
# Weights are sharded over all devices of a slice and replicated across slices, as far as memory allows; tensor is as wide as the
# saved activations need (a tpu7x has two devices per chip). Experts process 1,024 tokens at a time: two whole rows do not fit on
# a v6e.
MODELS = {
    ("gpt4o.py:large", 4096): [
        ("fsdp=256", 256),
        ("fsdp=512", 512),
        ("fsdp=256", 512),
        ("fsdp=128", 256),
        ("data=4 fsdp=64 tensor=4", 1024),
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
        ("fsdp=64 tensor=2", 128),
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
    Cell("llama.py:405b", 8192, "2 v6e:16x16", "fsdp=256 tensor=2 model.remat=offload", 512),
    Cell("llama.py:8b", 131_072, "v5p:8x8x8", "fsdp=32 context=16", 32),
    Cell("mixtral.py:8x7b", 4096, "v5p:4x4x8", "fsdp=16 expert=8 model.expert_chunk=1024", 256),
]

# What MaxText reached with the same model, slice and T: MFU (causal attention counted as half) and tokens/s per chip, from its
# docs/reference/models/tiering.md at 20a91e1. For 405B that page says 256 chips, but the recipe (tpu-recipes at 21efcc2,
# training/trillium/Llama3.1-405B-MaxText) uses two such slices: weights over all 512 chips, layer inputs in host memory.
# For Mixtral on v5p it says 256 chips (8x4x4): that is a v5p-256, which is named by its cores and has 128 chips.
MAXTEXT = {
    ("llama.py:8b", "v6e:16x16"): (0.4546, 7207),
    ("llama.py:70b", "v6e:16x16"): (0.5033, 960),
    ("llama.py:405b", "2 v6e:16x16"): (0.3855, 123),
    ("llama.py:2-70b", "v6e:16x16"): (0.438, 900),
    ("mixtral.py:8x7b", "v6e:16x16"): (0.3523, 3899),
    ("llama.py:2-70b", "v5p:8x8x8"): (0.654, 692),
    ("mixtral.py:8x7b", "v5p:4x4x8"): (0.5256, 2909),
}


# What marks a cell of the column "fits": its footnote.
NOTES = {
    "| with ": "with KNOB=VALUE: it fits only with this remedy; the figures include it.",
    "(remedies not recorded)": "**no** (remedies not recorded): it does not fit as it is. Records of this age do not list the"
    " remedies that `plan` tried, nor which of them were not compiled, and `plan` tries more of them now: one may make it fit.",
    "not compiled)": "**no** (n of m not compiled): n of the m remedies that `plan` tried were not compiled within the time"
    " limit; one may make it fit.",
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
    """The JSON that `plan` prints last. If it aborts: its last line of stderr, under "error"."""
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
    found, rows = recorded(), []
    for cell in CELLS:
        name = cell.config.replace(".py", "")
        rows.append("| " + " | ".join([name, f"{cell.T:,}", cell.slices, *_row(cell, found.get(cell))]) + " |")
    made = {}
    for entry in filter(None, map(found.get, CELLS)):
        made.setdefault(f"jax {entry['jax']}, libtpu {entry['libtpu']}", set()).add(f"{entry['date']}, {entry['commit']}")
    notes = [line for mark, note in NOTES.items() if any(mark in row for row in rows) for line in (note, "")]
    return [
        "## Models on slices: compiled ahead of time, not run",
        "",
        "`python benchmarks/plan_table.py` compiles the training step for each TPU slice with libtpu. GiB: the memory that the"
        " program needs per device, and what is available. A step takes at least as long as its slowest part at published rates"
        " (gpt4o_jax/training/topology.py): matmuls (compute), HBM, links within a slice (ICI) or links between slices (DCN)."
        " The rows that experts exchange by ragged-all-to-all count as none, because routers may send none."
        " Tokens/s and MFU (causal attention counted as half) are therefore upper bounds; nothing here has been run. The last"
        " column is what MaxText reports.",
        "",
        "When fsdp spans a whole slice, libtpu communicates more than necessary: on v5e and v6e all 256 chips all-reduce full"
        " gradients and each keeps its shard, twice the bytes of a reduce-scatter. On v5p and tpu7x weights are gathered in this"
        " way too, by an all-reduce of arrays that are zero outside a chip's own shard, twice the bytes of an all-gather; on"
        " tpu7x the gradients of layers are reduce-scattered. With tensor, context or expert besides fsdp, most weights are"
        " all-gathered and most gradients reduce-scattered, or passed around while matmuls run (collective-permute).",
        "",
        "Not yet compiled again: the rows of gpt4o, since b20bc55, before which each product of Muon's iteration gathered a stack"
        " of matrices; most others, since two corrections: the order of devices (0a37024), and collective-permutes in loops, of"
        " which too few were counted (91375cf).",
        "",
        *notes,
        "| model | T | slice | mesh | rows per batch | fits | GiB | bottleneck | seconds per step, at least"
        " | tokens/s per chip, at most | MFU, at most | MaxText: tokens/s per chip, MFU |",
        "|---" * 12 + "|",
        *rows,
        "",
        *(f"Compiled with {versions}: {'; '.join(sorted(when))}." for versions, when in sorted(made.items())),
    ]


def _row(cell: Cell, entry: dict | None) -> list[str]:
    theirs = MAXTEXT.get((cell.config, cell.slices))
    peer = f"{theirs[1]:,}, {theirs[0]:.1%}" if theirs else ""
    result = entry["result"] if entry else {"error": "not compiled yet"}
    if "error" in result:
        return [cell.mesh, str(cell.rows), result["error"], "", "", "", "", "", peer]
    mesh, rows, fits = cell.mesh, cell.rows, "yes" if result["fits"] else "**no**"
    needed, roofline = result["bytes"]["total"], result.get("roofline")
    tried = result.get("tried", [])
    if not result["fits"] and "tried" not in result:
        fits += " (remedies not recorded)"
    elif late := sum(t["fits"] is None for t in tried):
        fits += f" ({late} of {len(tried)} not compiled)"
    if remedy := result.get("fits_with"):
        fits = "with " + ", ".join(f"{knob.split('.')[1]}={value}" for knob, value in remedy["knobs"].items())
        needed, roofline, rows = remedy["bytes"]["total"], remedy["roofline"], remedy["knobs"].get("train.batch_size", rows)
    memory = f"{needed / 2**30:.1f} of {result['hbm'] / 2**30:.1f}" if needed else ""
    if not roofline:
        return [mesh, str(rows), fits, memory, "", "", "", "", peer]
    seconds = roofline["step_seconds_at_least"]
    rate = rows * cell.T / result["chips"] / seconds
    bottleneck = roofline["bound_by"]
    bounds = [
        bottleneck if bottleneck == "compute" else bottleneck.upper(),
        f"{seconds:.2f}",
        f"{rate:,.0f}",
        f"{roofline['mfu_causal_at_most']:.1%}",
    ]
    return [mesh, str(rows), fits, memory, *bounds, peer]


if __name__ == "__main__":
    main(sys.argv[1:])
