"""What models learn of the worlds (gpt4o_jax/tasks/worlds): each world alone, and one model for all applications.

Every seed is trained on a core of its own, side by side; minutes are CPU time over two cores, those of the whole process:
preparing the data, compiling, training and evaluating. Scores are of `evaluate`: 200 held-out items of each slice, greedily.
"""

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1)
CORES = 2  # that minutes are told of

# world: (minutes, {slice/metric: bar}); slice "*": the worst of all slices, "all": of all items together
BARS = {
    "numbers": (15, {"*/exact_match": 98}),
    "sentences": (15, {"all/bleu": 90}),
    "questions": (
        30, {"one_hop/squad_em": 90, "two_hop/squad_em": 75, "unseen_names/squad_em": 70, "all/unanswerable_f1": 85}
    ),
    "reports": (15, {"all/rouge_l": 90}),
    "memory": (15, {"*/exact_match": 90}),
    "tools": (15, {"all/json_right": 95}),
}  # fmt: skip
JOINT_MINUTES = 90


def measure_world(world: str, folder: Path) -> dict:
    """Name -> (the worse of two seeds, details), for results.jsonl."""

    def run(seed: int) -> dict:
        workdir = folder / str(seed)
        flags = [f"--config=configs/finetune.py:{world}", f"--workdir={workdir}", f"--config.seed={seed}"]
        minutes = _command(seed, "train", *flags)
        _command(seed, "evaluate", f"--workdir={workdir}", f"--tasks={world}")
        return {"minutes": minutes, "scores": _scores(workdir)}

    return _worst(world, _side_by_side(run), BARS[world][0], {world: BARS[world][1]})


def measure_joint(folder: Path) -> dict:
    """configs/applications.py: pre-training and fine-tuning, on all worlds at once."""

    def run(seed: int) -> dict:
        base, tuned = folder / f"base{seed}", folder / f"tuned{seed}"
        config = ["--config=configs/applications.py:pretrain", f"--workdir={base}", f"--config.seed={seed}"]
        minutes = _command(seed, "train", *config)
        config = ["--config=configs/applications.py:tune", f"--workdir={tuned}", f"--config.seed={seed}"]
        minutes += _command(seed, "train", *config, f"--config.init.from={base}")
        alone = folder / f"without_text{seed}"  # what the text in the mixture is good for; not part of the recipe
        config = ["--config=configs/applications.py:without_text", f"--workdir={alone}", f"--config.seed={seed}"]
        if seed == SEEDS[0]:
            _command(seed, "train", *config, f"--config.init.from={base}", "--config.eval.tasks=()")
        _command(seed, "evaluate", f"--workdir={tuned}", "--tasks=qa,translation,summarisation,generation,chat")
        text = [_text_bits(workdir) for workdir in (base, tuned, *([alone] if seed == SEEDS[0] else []))]
        return {"minutes": minutes, "scores": _scores(tuned), "text_bits_per_byte": text}

    runs = _side_by_side(run)
    found = _worst("joint", runs, JOINT_MINUTES, {world: bars for world, (_, bars) in BARS.items()})
    text = [r["text_bits_per_byte"] for r in runs]
    changes = [100 * (after / before - 1) for before, after, *_ in text]
    before, _, without = text[0]
    return found | {"joint_text_kept": (max(changes), {"percent": changes, "without_text": 100 * (without / before - 1)})}


def name(prefix: str, world: str, bar: str) -> str:
    """Of a bar in targets.py: numbers_exact_match, joint_questions_one_hop_squad_em, ..."""
    row, _, metric = bar.partition("/")
    parts = ([prefix] if prefix == "joint" else []) + [world] + ([] if row in ("*", "all") else [row]) + [metric]
    return "_".join(parts)


def _worst(prefix: str, runs: list[dict], minutes: float, bars: dict) -> dict:
    found = {}
    for world, wanted in bars.items():
        for bar in wanted:
            row, _, metric = bar.partition("/")
            each = [_value(r["scores"][world], row, metric) for r in runs]
            found[name(prefix, world, bar)] = (min(each), {"seeds": each})
    most = [r["minutes"] for r in runs]
    found[f"{prefix}_minutes"] = (max(most), {"limit": minutes, "seeds": most, "scores": [r["scores"] for r in runs]})
    return found


def _value(scores: dict, row: str, metric: str) -> float:
    rows = [r for r in scores if r not in ("all", "baseline")] if row == "*" else [row]
    return min(scores[r][metric]["value"] for r in rows)


def _side_by_side(run) -> list[dict]:
    with concurrent.futures.ThreadPoolExecutor(len(SEEDS)) as pool:
        return list(pool.map(run, SEEDS))


def _command(seed: int, *args: str) -> float:
    """Runs a command of the project on one core. Returns its CPU minutes, of CORES cores."""
    core = ["taskset", "-c", str(seed % os.cpu_count())] if shutil.which("taskset") else []
    process = subprocess.Popen([*core, sys.executable, "-m", "gpt4o_jax", *args], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(args)}: exit status {os.waitstatus_to_exitcode(status)}")
    return (used.ru_utime + used.ru_stime) / 60 / CORES


def _scores(workdir: Path) -> dict:
    """task -> slice -> metric -> {"value": ..., "low": ..., "high": ..., "items": ...} of the newest evaluation."""
    newest = max((workdir / "evaluations").iterdir(), key=lambda p: int(p.name))
    return json.loads((newest / "scores.json").read_text())


def _text_bits(workdir: Path) -> float:
    """Bits per byte of held-out text, of the last evaluation."""
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [r for r in records if r["kind"] == "eval"][-1]["python_docs/bits_per_byte"]
