"""Training speed compared with torch's on this machine: each mode in its own process, interleaved, median over the rounds.

PEERS_PYTHON names the interpreter of an environment with requirements-peers.txt (default: this one).
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# GPT-2's architecture as in transformers; name: (layers, heads, width, T, B, vocabulary, timed dispatches, steps in each).
SHAPES = {
    "gpt2_124m": (12, 12, 768, 1024, 1, 50257, 3, 1),
    "wide_384": (6, 6, 384, 256, 16, 65, 4, 1),
    "narrow_128": (4, 4, 128, 64, 12, 65, 10, 10),
}
PEER_MODES = ("float32", "bfloat16", "float32-compiled", "bfloat16-compiled")
ROUNDS = 3


def measure(shape: str) -> dict:
    """name -> (value, details) for results.jsonl: ratio to torch's fastest mode, to the float32 matmul rate, memory ratio."""
    runs = {name: [] for name in ("ours", *PEER_MODES)}
    for _ in range(ROUNDS):
        for name in runs:
            runs[name].append(_ours(shape) if name == "ours" else _torch(shape, name))
    rate = {name: statistics.median(r["tokens_per_second"] for r in results) for name, results in runs.items()}
    best = max(PEER_MODES, key=lambda name: rate[name])
    ours = runs["ours"]
    middle = lambda key: statistics.median(key(r) for r in ours)
    memory = {name: statistics.median(r["peak_bytes"] for r in results) for name, results in runs.items()}
    details = {
        "tokens_per_second": rate,
        "best_of_torch": best,
        "peak_gigabytes": {name: round(x / 1e9, 2) for name, x in memory.items()},
        "achieved_gflops": middle(lambda r: r["achieved_gflops"]),
        "product_gflops": {d: middle(lambda r, d=d: r["product_gflops"][d]) for d in ("float32", "bfloat16")},
        "read_gigabytes_per_second": middle(lambda r: r["read_gigabytes_per_second"]),
        "compute_dtype": ours[0]["compute_dtype"],
        "attention": ours[0]["attention"],
    }
    share = middle(lambda r: r["achieved_gflops"] / r["product_gflops"]["float32"])
    return {
        f"{shape}_over_torch": (rate["ours"] / rate[best], details),
        f"{shape}_over_float32_products": (share, {}),
    } | (
        {"gpt2_124m_memory_over_torch": (memory["ours"] / min(memory[m] for m in PEER_MODES), {})} if shape == "gpt2_124m" else {}
    )


def _ours(shape: str) -> dict:
    layers, heads, width, T, B, vocabulary, dispatches, K = SHAPES[shape]
    knobs = {
        "model.n_layers": layers, "model.scan_unroll": layers, "model.n_heads": heads, "model.d_model": width,
        "model.context_length": T, "model.vocab_size": vocabulary, "model.positions": "learned", "model.norm": "layer",
        "model.norm_eps": 1e-5, "model.mlp": "gelu_tanh", "model.qk_norm": False, "model.bias": True, "model.tied": True,
        "model.output_init": "scaled", "optimizer.name": "adamw", "train.batch_size": B, "train.steps_per_dispatch": K,
        "log.every": K, "eval.every": 0, "sample.every": 0, "checkpoint.every": 0, "data.rows": "windows",
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in knobs.items()]
    return _last_line(
        [
            sys.executable,
            "-m",
            "gpt4o_jax",
            "benchmark",
            "train",
            "--config=configs/base.py",
            f"--dispatches={dispatches}",
            *flags,
        ]
    )


def _torch(shape: str, mode: str) -> dict:
    *numbers, dispatches, K = SHAPES[shape]
    python = os.environ.get("PEERS_PYTHON", sys.executable)
    # With huge pages, like our own process (gpt4o_jax/__main__.py).
    command = ["env", "GLIBC_TUNABLES=glibc.malloc.hugetlb=1", python, "benchmarks/torch_gpt2.py"]
    return _last_line([*command, *map(str, numbers), str(dispatches * K), mode])


def _last_line(command: list[str]) -> dict:
    out = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout.decode()
    return json.loads(out.splitlines()[-1])
