"""Does every mesh compute the same training run? `python benchmarks/mesh_table.py`, then `measure.py --report`.

The cases of tests/system/test_products.py, on eight fake CPU devices: for every mesh and model, the largest error of a gradient
against one device, and how far training drifts. Each is appended to meshes.jsonl and skipped if it is there already, so that an
interrupted run can be resumed. To measure everything again, delete the file.
"""

import datetime
import importlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "meshes.jsonl"
ROWS = ("plain", "packed")
DRIFTS = {"plain": "drift", "packed": "packed drift"}  # the names of their drifts in records


def recorded() -> dict[tuple, dict]:
    """(mesh, model, what) -> its newest record. what: one of ROWS (its gradients), or a value of DRIFTS."""
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
    rows = []
    for mesh in names:
        value = lambda *key, mesh=mesh: found[mesh, *key]["value"] if (mesh, *key) in found else None
        cells = [mesh]
        for kinds, unit in ((ROWS, 1e-6), (DRIFTS.values(), 1)):
            for model in models:
                pair = [value(model, what) for what in kinds]
                told = ", ".join("?" if x is None else f"{x / unit:.2g}" for x in pair)
                cells.append("-" if value(model, "plain") is None else told)
        rows.append("| " + " | ".join(cells) + " |")
    made = sorted({f"{entry['date']}, {entry['commit']}" for entry in found.values()})
    marks = {cell for row in rows for cell in row.replace(",", "").split()}
    dash = " A dash: the model's layers cannot be divided into these stages."
    question = " A question mark: not measured (the tests cover these cells too)."
    return [
        "## Every mesh against one device",
        "",
        "Written by `python benchmarks/mesh_table.py`: eight fake CPU devices, float32, models of tests/parallel/meshes.py;"
        " compiled like the tests, without LLVM's optimizations (tests/conftest.py).",
        "",
        "Gradients: largest error of any leaf relative to the leaf's largest entry, x 1e-6 (target: 10), for rows with one and"
        " with several documents. Drift: deviation of losses and parameters from single-device training over 20 AdamW steps"
        " (the larger of the two), relative to the deviation caused by permuting the rows alone (target: 4), for the same two"
        " kinds of rows. Each expert receives as many tokens as on one device (tests/system/test_products.py: the same tokens,"
        f" with and without stages).{dash if '-' in marks else ''}{question if '?' in marks else ''}",
        "",
        "Dense gradients measured before 6d8419c, those of all meshes but the first eleven, compare the bias of the keys with the"
        " largest entry of all leaves.",
        "",
        "| mesh | " + " | ".join([*models, *(f"{model}, drift" for model in models)]) + " |",
        "|---" * (1 + 2 * len(models)) + "|",
        *rows,
        "",
        f"Measured: {'; '.join(made)}.",
    ]


if __name__ == "__main__":
    main()
