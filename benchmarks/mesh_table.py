"""Does every mesh compute the same run? `python benchmarks/mesh_table.py`, then `measure.py --report`.

The cases of tests/system/test_products.py, on eight fake CPU devices: for every mesh and model the largest error of a gradient
against one device, and how far training drifts. Each is appended to meshes.jsonl; one that is there already is left out, so this
can be stopped and started. To have all of them anew, delete the file.
"""

import datetime
import importlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "meshes.jsonl"
TRAINED = ("dense", "experts")


def recorded() -> dict[tuple, dict]:
    """(mesh, model, what) -> its newest record. what: "plain", "packed" or "drift"."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {(entry["mesh"], entry["model"], entry["what"]): entry for entry in map(json.loads, lines)}


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from commits import current_commit

    importlib.import_module("tests.conftest")  # makes eight devices of the CPU
    from tests.parallel import meshes
    from tests.system.test_products import MESHES, named, repeats, stages_divide

    for sizes in MESHES:
        for model in meshes.MODELS:
            for what in ("plain", "packed", *(("drift",) if model in TRAINED else ())):
                key = (named(sizes), model, what)
                if key in recorded() or not stages_divide(sizes, model):
                    continue
                mesh, commit = meshes.mesh_of(**sizes), current_commit()
                if what == "drift":
                    value = meshes.assert_drifts_no_more_than_permuted_rows(
                        meshes.with_optimizer(model, "adamw"), mesh, repeats(sizes)
                    )
                else:
                    got = meshes.loss_and_gradients(meshes.config(model), mesh, meshes.batch(what == "packed"), repeats(sizes))
                    value = meshes.assert_equal(got, meshes.on_one_device(model, what == "packed"))
                entry = dict(zip(("mesh", "model", "what"), key, strict=True)) | {"value": value, "commit": commit}
                with RESULTS.open("a") as f:
                    f.write(json.dumps(entry | {"date": datetime.date.today().isoformat()}) + "\n")
                print(f"{' '.join(key)}: {value:.2g}", file=sys.stderr)


def table() -> list[str]:
    """The section of BENCHMARKS.md."""
    found = recorded()
    names = list(dict.fromkeys(mesh for mesh, _, _ in found))
    models = list(dict.fromkeys(model for _, model, _ in found))
    lines = [
        "## Every mesh against one device",
        "",
        "By `python benchmarks/mesh_table.py`: eight fake CPU devices, float32, models of tests/parallel/meshes.py. Gradients:"
        " the largest error of any leaf, by the leaf's largest entry, in millionths (promise: 10), for rows of one and of several"
        " documents; experts get the same tokens. Drift: how far 20 steps of AdamW lead from one device's, by how far orders"
        " of the same rows alone do (promise: 4). A dash: the layers do not make these stages.",
        "",
        "| mesh | " + " | ".join([*models, *(f"{model}, drift" for model in TRAINED)]) + " |",
        "|---" * (1 + len(models) + len(TRAINED)) + "|",
    ]
    for mesh in names:
        value = lambda *key, mesh=mesh: found[mesh, *key]["value"] if (mesh, *key) in found else None
        errors = [[value(model, what) for what in ("plain", "packed")] for model in models]
        cells = ["-" if None in pair else ", ".join(f"{1e6 * error:.2g}" for error in pair) for pair in errors]
        drifts = [value(model, "drift") for model in TRAINED]
        lines.append("| " + " | ".join([mesh, *cells, *("-" if d is None else f"{d:.2g}" for d in drifts)]) + " |")
    made = sorted({f"{entry['date']}, {entry['commit']}" for entry in found.values()})
    return [*lines, "", "; ".join(made) + "."]


if __name__ == "__main__":
    main()
