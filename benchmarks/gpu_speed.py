"""MFU of the training step on one GPU, compared with torch.compile on the same GPU where torch is installed. One call:

python benchmarks/gpu_speed.py [SHAPE ...]          (default: every shape); `tiny` is for trying the script anywhere

Needs jax, flax, optax and numpy only (the package from its sources: run in the root of the repository). Prints one
JSON object per line and appends records to results.jsonl, which `measure.py --report` turns into BENCHMARKS.md.
Ours and torch run in separate processes, one after the other: JAX holds most of a GPU's memory until it ends. If a batch
fails, half of it is tried, then a quarter; torch, in this environment or that of PEERS_PYTHON, gets the batch that ran.
FLOP are 6N + 12LdT per token; the denominator is the datasheet's dense bfloat16 rate.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt4o_jax import parallel
from gpt4o_jax.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from gpt4o_jax.training.throughput import measure

ROOT = Path(__file__).resolve().parent.parent
PEERS = os.environ.get("PEERS_PYTHON", sys.executable)

# name: (layers, heads, width, T, B, vocabulary, remat, steps per dispatch, timed dispatches)
SHAPES = {
    "gpu_124m": (12, 12, 768, 1024, 32, 50304, "none", 10, 5),
    "gpu_1300m": (24, 16, 2048, 2048, 8, 50304, "none", 5, 10),
    "tiny": (2, 2, 64, 128, 2, 512, "none", 2, 2),
}


def ours(shape: str, B: int) -> dict:
    layers, heads, width, T, _, vocabulary, remat, K, dispatches = SHAPES[shape]
    model = ModelConfig(
        vocab_size=vocabulary,
        context_length=T,
        n_layers=layers,
        n_heads=heads,
        d_model=width,
        positions="learned",
        norm="layer",
        norm_eps=1e-5,
        mlp="gelu_tanh",
        qk_norm=False,
        bias=True,
        tied=True,
        output_init="scaled",
        compute_dtype="bfloat16",
        remat=remat,
        scan_unroll=layers,
    )
    train = TrainConfig(batch_size=B, steps_per_dispatch=K)
    data = DataConfig(rows="windows")  # a row is one document, as in torch
    config = RunConfig(model=model, data=data, optimizer=OptimizerConfig(name="adamw"), train=train)
    return measure(config, parallel.make_mesh(), dispatches)


def torch_compiled(shape: str, B: int) -> dict:
    layers, heads, width, T, _, vocabulary, _, K, dispatches = SHAPES[shape]
    numbers = map(str, (layers, heads, width, T, B, vocabulary, K * dispatches))
    return last_line(PEERS, "benchmarks/torch_gpt2.py", *numbers, "bfloat16-compiled")


def last_line(*command: str) -> dict:
    """The JSON that a script prints last, or {"error": its exit code}, so that other results are not lost."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": f"exit code {done.returncode}"}


def has_torch() -> bool:
    """Whether PEERS can run the comparison."""
    return subprocess.run([PEERS, "-c", "import torch, transformers"], cwd=ROOT, stderr=subprocess.DEVNULL).returncode == 0


def main(names: list[str]) -> None:
    if names[:1] == ["ours"]:
        print(json.dumps(ours(names[1], int(names[2]))))
        return
    unknown = set(names) - set(SHAPES)
    if unknown:
        sys.exit(f"gpu_speed.py: no shape {', '.join(sorted(unknown))}; shapes: {', '.join(SHAPES)}")
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    failed = []
    for shape in names or [s for s in SHAPES if s != "tiny"]:
        whole = SHAPES[shape][4]
        for B in sorted({whole, max(whole // 2, 1), max(whole // 4, 1)}, reverse=True):
            details = last_line(sys.executable, "benchmarks/gpu_speed.py", "ours", shape, str(B))
            if "error" not in details:
                break
        else:
            failed.append(f"{shape}: {details['error']}")
            continue
        theirs = torch_compiled(shape, B) if has_torch() else {"error": "not measured: no torch and transformers there"}
        details["torch_compiled_tokens_per_second"] = theirs.get("tokens_per_second") or theirs["error"]
        K, dispatches = SHAPES[shape][-2:]
        entry = {
            "name": f"{shape}_mfu",
            "value": details["mfu"],
            "details": {"batch": B, "steps": K * dispatches, **details},
            "date": datetime.date.today().isoformat(),
            "commit": git.stdout.strip() or "unknown",
            "machine": f"{details['device']}, Python {platform.python_version()}",
        }
        print(json.dumps(entry), flush=True)
        if shape != "tiny":
            with (ROOT / "benchmarks" / "results.jsonl").open("a") as f:
                f.write(json.dumps(entry) + "\n")
    if failed:
        sys.exit(f"gpu_speed.py: {'; '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
