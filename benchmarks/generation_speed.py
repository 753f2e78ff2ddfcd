"""Generation speed compared with transformers' on torch: each mode in its own process, interleaved, median over the rounds.

PEERS_PYTHON names the interpreter of an environment with requirements-peers.txt (default: this one).
"""

import os
import statistics
import sys

from training_speed import _last_line as last_line

LAYERS, HEADS, WIDTH, VOCABULARY, PROMPT, NEW, REPEATS = 12, 12, 768, 50257, 128, 128, 2  # GPT-2 124M
BATCHES = (1, 8)
OURS = ("float32", "bfloat16", "int8", "int4")
PEER_MODES = ("float32", "bfloat16", "float32-static", "bfloat16-static")
ROUNDS = 3


def measure(batch: int) -> dict:
    """name -> (value, details) for results.jsonl: ratio to torch's fastest mode, and the gain of quantised weights."""
    runs = {name: [] for name in (*(f"ours {w}" for w in OURS), *(f"torch {m}" for m in PEER_MODES))}
    for _ in range(ROUNDS):
        for name, results in runs.items():
            who, mode = name.split()
            results.append(_ours(batch, mode) if who == "ours" else _torch(batch, mode))
    rate = {name: statistics.median(r["tokens_per_second"] for r in results) for name, results in runs.items()}
    best = max((f"torch {m}" for m in PEER_MODES), key=rate.get)
    unquantised = max("ours float32", "ours bfloat16", key=rate.get)
    middle = lambda weights, key: statistics.median(r[key] for r in runs[f"ours {weights}"])
    reads = statistics.median(r["read_gigabytes_per_second"] for w in OURS for r in runs[f"ours {w}"])
    details = {
        "tokens_per_second": rate,
        "best_of_torch": best,
        "decode_tokens_per_second": {w: middle(w, "decode_tokens_per_second") for w in OURS},
        "weight_megabytes": {w: middle(w, "weight_bytes") / 1e6 for w in OURS},
        "read_gigabytes_per_second": reads,
    }
    values = {f"generate_b{batch}_over_torch": (rate[unquantised] / rate[best], details)}
    if batch == 1:
        bound = reads * 1e9 / middle("float32", "weight_bytes")
        values["generate_b1_of_bandwidth"] = (rate["ours float32"] / bound, {})
        values["generate_b1_int8_gain"] = (rate["ours int8"] / rate[unquantised], {})
    return values


def _ours(batch: int, weights: str) -> dict:
    knobs = {
        "model.n_layers": LAYERS, "model.n_heads": HEADS, "model.d_model": WIDTH, "model.context_length": 1024,
        "model.vocab_size": VOCABULARY, "model.positions": "learned", "model.norm": "layer", "model.norm_eps": 1e-5,
        "model.mlp": "gelu_tanh", "model.qk_norm": False, "model.bias": True, "model.tied": True, "model.output_init": "scaled",
        "model.compute_dtype": "float32" if weights == "float32" else "auto",
    }  # fmt: skip
    flags = {"config": "configs/base.py", "batch": batch, "prompt_tokens": PROMPT, "new_tokens": NEW, "repeats": REPEATS}
    flags |= {"weights": weights} | {f"config.{name}": value for name, value in knobs.items()}
    command = [sys.executable, "-m", "gpt4o_jax", "benchmark", "generate"]
    return last_line([*command, *(f"--{name}={value}" for name, value in flags.items())])


def _torch(batch: int, mode: str) -> dict:
    python = os.environ.get("PEERS_PYTHON", sys.executable)
    numbers = (LAYERS, HEADS, WIDTH, VOCABULARY, batch, PROMPT, NEW, REPEATS)
    return last_line([python, "benchmarks/torch_gpt2_generate.py", *map(str, numbers), mode])
