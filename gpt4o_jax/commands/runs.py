"""compares all runs under some folders: settings that differ, progress, held-out loss, speed"""

import math
import sys

from gpt4o_jax.commands.flags import Flag
from gpt4o_jax.errors import RunError

FLAGS = (
    Flag("dir", list, None, "folders that contain runs, at any depth", required=True, positional=True),
    Flag("out", str, "", "PNG file for the curves; default: runs.png in the first folder"),
)


def main(flags: dict, overrides: dict[str, str]) -> dict:
    if flags["out"] and not flags["out"].endswith(".png"):
        raise RunError(f"runs: --out={flags['out']}: expected a file name that ends in .png")

    from gpt4o_jax import comparison
    from gpt4o_jax.paths import of_user

    runs = comparison.find(flags["dir"])
    runs.sort(key=_best_first)
    print(comparison.table(runs), file=sys.stderr)
    out = of_user(flags["out"] or of_user(flags["dir"][0]) / "runs.png")
    out.write_bytes(comparison.plot({name: [run] for name, run in zip(comparison.names(runs), runs, strict=True)}))
    differ = comparison.differing(runs)
    return {
        "runs": [
            comparison.describe(run) | {"config": {key: values[i] for key, values in differ.items()}}
            for i, run in enumerate(runs)
        ],
        "plot": str(out),
    }


def _best_first(run) -> tuple:
    """By bits per byte; then runs not measured by it or diverged, then those without any evaluation."""
    bits = run.held_out("bits_per_byte")
    known = bits is not None and math.isfinite(bits)
    return not run.evals, not known, bits if known else 0.0, str(run.workdir)
