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
ROWS = ("plain", "packed")
DRIFTS = {"plain": "drift", "packed": "packed drift"}  # how records name the drift of each


def recorded() -> dict[tuple, dict]:
    """(mesh, model, what) -> its newest record. what: of ROWS, whose gradients, or of DRIFTS."""
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
            for what in (*ROWS, *DRIFTS.values()):
                key = (named(sizes), model, what)
                if key in recorded() or not stages_divide(sizes, model):
                    continue
                mesh, commit = meshes.mesh_of(**sizes), current_commit()
                if what in DRIFTS.values():
                    c, packed = meshes.with_optimizer(model, "adamw"), what == DRIFTS["packed"]
                    value = meshes.assert_drifts_no_more_than_permuted_rows(c, mesh, packed, repeats(sizes))
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
        " documents; experts get as many tokens (tests/system/test_products.py: the very same, stages or not). Drift: how far 20"
        " steps of AdamW lead from one device's, by how far orders of the same rows alone do (promise: 4), for the same two kinds"
        " of rows. A dash: the layers do not make these stages. A question mark: not measured (the tests have these cells too)."
        " Dense gradients from before 6d8419c, which are those of all meshes but the first four, have the bias of keys by the"
        " largest entry of all leaves.",
        "",
        "| mesh | " + " | ".join([*models, *(f"{model}, drift" for model in models)]) + " |",
        "|---" * (1 + 2 * len(models)) + "|",
    ]
    for mesh in names:
        value = lambda *key, mesh=mesh: found[mesh, *key]["value"] if (mesh, *key) in found else None
        cells = [mesh]
        for kinds, unit in ((ROWS, 1e-6), (DRIFTS.values(), 1)):
            for model in models:
                pair = [value(model, what) for what in kinds]
                told = ", ".join("?" if x is None else f"{x / unit:.2g}" for x in pair)
                cells.append("-" if value(model, "plain") is None else told)
        lines.append("| " + " | ".join(cells) + " |")
    made = sorted({f"{entry['date']}, {entry['commit']}" for entry in found.values()})
    return [*lines, "", "; ".join(made) + "."]


if __name__ == "__main__":
    main()
