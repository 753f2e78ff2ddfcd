"""Scores of models on the worlds (gpt4o_jax/tasks/worlds): trained on each world alone, and one model for all applications.

The seeds are trained side by side, one per core. Minutes are CPU time of the training processes (preparing the data, compiling,
training, and evaluating during training) divided by 2 cores. Scores are those of `evaluate`: 200 held-out items per slice,
greedy. With `measure.py --folder=DIR` runs are kept and finished seeds are not trained again. To train a single seed:
`python benchmarks/applications.py DIR WORLD SEED`; WORLD is "joint" for the one model, "without_text" for its ablation.
"""

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import task_curves
from commits import current_commit

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1)
CORES = 2  # minutes are CPU time divided by this

# world: (minutes, {score: target}); a score is "SLICE/METRIC", slice "*": the worst of all slices, "all": all items together
WORLD_TARGETS = {
    "numbers": (15, {"*/exact_match": 98}),
    "sentences": (15, {"*/bleu": 90}),
    "questions": (
        30, {"one_hop/squad_em": 90, "two_hop/squad_em": 75, "unseen_names/squad_em": 70, "all/unanswerable_f1": 85}
    ),
    "reports": (15, {"all/rouge_l": 90}),
    "memory": (15, {"*/exact_match": 90}),
    "tools": (15, {"all/json_right": 95}),
}  # fmt: skip
JOINT_MINUTES = 90


def measure_world(world: str, folder: Path) -> dict:
    """name -> (the worse of two seeds, details), for results.jsonl."""
    targets = {world: WORLD_TARGETS[world][1]}
    found = _worst(world, side_by_side(lambda seed: world_run(world, seed, folder)), WORLD_TARGETS[world][0], targets)
    found[f"{world}_minutes"][1]["curves"] = [task_curves.of_run(folder / world / str(seed), targets) for seed in SEEDS]
    return found


def world_run(world: str, seed: int, folder: Path) -> dict:
    """One seed of configs/finetune.py:WORLD: trained, or as kept in `folder`."""
    workdir = folder / world / str(seed)

    def run() -> dict:
        flags = [f"--config=configs/finetune.py:{world}", f"--workdir={workdir}", f"--config.seed={seed}"]
        minutes = command(seed, "train", *flags)
        command(seed, "evaluate", f"--workdir={workdir}", f"--tasks={world}")
        return {"minutes": minutes, "scores": scores(workdir)}

    return kept(workdir, run)


def measure_joint(folder: Path) -> dict:
    """configs/applications.py: pre-training and fine-tuning on all worlds at once."""
    runs = side_by_side(lambda seed: joint_run(seed, folder))
    without = without_text_run(SEEDS[0], folder)["text_bits_per_byte"]
    targets = {world: scores for world, (_, scores) in WORLD_TARGETS.items()}
    found = _worst("joint", runs, JOINT_MINUTES, targets)
    found["joint_minutes"][1]["curves"] = [task_curves.of_run(folder / f"tuned{seed}", targets) for seed in SEEDS]
    text = [r["text_bits_per_byte"] for r in runs]
    changes = [100 * (after / before - 1) for before, after in text]
    details = {"percent": changes, "without_text": 100 * (without / text[0][0] - 1)} | commits(runs)
    return found | {"joint_text_kept": (max(changes), details)}


def joint_run(seed: int, folder: Path) -> dict:
    """One seed of configs/applications.py: trained, or as kept in `folder`."""
    base, tuned = folder / f"base{seed}", folder / f"tuned{seed}"

    def run() -> dict:
        minutes = base_run(seed, folder)["minutes"]
        config = ["--config=configs/applications.py:tune", f"--workdir={tuned}", f"--config.seed={seed}"]
        minutes += command(seed, "train", *config, f"--config.init.from={base}")
        command(seed, "evaluate", f"--workdir={tuned}", "--tasks=qa,translation,summarisation,generation,chat")
        text = [last_eval(run)["python_docs/bits_per_byte"] for run in (base, tuned)]
        return {"minutes": minutes, "scores": scores(tuned), "text_bits_per_byte": text}

    return kept(tuned, run)


def without_text_run(seed: int, folder: Path) -> dict:
    """What the text in the mixture of `tune` contributes, from the same base; not part of the recipe."""
    workdir = folder / f"without_text{seed}"
    config = ["--config=configs/applications.py:without_text", f"--workdir={workdir}", f"--config.seed={seed}"]

    def run() -> dict:
        command(seed, "train", *config, f"--config.init.from={folder / f'base{seed}'}", "--config.eval.tasks=()")
        return {"text_bits_per_byte": last_eval(workdir)["python_docs/bits_per_byte"]}

    return kept(workdir, run)


def base_run(seed: int, folder: Path) -> dict:
    """The pre-training of configs/applications.py, in `folder`/baseSEED."""
    workdir = folder / f"base{seed}"
    config = ["--config=configs/applications.py:pretrain", f"--workdir={workdir}", f"--config.seed={seed}"]
    return kept(workdir, lambda: {"minutes": command(seed, "train", *config)})


def kept(workdir: Path, run: Callable[[], dict]) -> dict:
    """What run() returns, kept beside `workdir`, so that an interruption does not cost the hours of runs that are finished."""
    file = workdir.with_name(f"{workdir.name}.json")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        commit = current_commit()
        file.write_text(json.dumps({"commit": commit} | run()) + "\n")
    return json.loads(file.read_text())


def commits(runs: list[dict]) -> dict:
    """The commits that the runs were trained at, for their records: they may have been kept from earlier."""
    return {"commit": ", ".join(dict.fromkeys(r["commit"] for r in runs))}


def name(prefix: str, world: str, score: str) -> str:
    """The name in targets.py: numbers_exact_match, joint_questions_one_hop_squad_em, ..."""
    row, _, metric = score.partition("/")
    parts = ([prefix] if prefix == "joint" else []) + [world] + ([] if row in ("*", "all") else [row]) + [metric]
    return "_".join(parts)


def _worst(prefix: str, runs: list[dict], minutes: float, targets: dict) -> dict:
    found, commit = {}, commits(runs)
    for world, of_world in targets.items():
        for score in of_world:
            row, _, metric = score.partition("/")
            each = [_value(r["scores"][world], row, metric) for r in runs]
            found[name(prefix, world, score)] = (min(each), {"seeds": each} | commit)
    most = [r["minutes"] for r in runs]
    found[f"{prefix}_minutes"] = (max(most), {"limit": minutes, "seeds": most, "scores": [r["scores"] for r in runs]} | commit)
    return found


def _value(scores: dict, row: str, metric: str) -> float:
    rows = [r for r in scores if r not in ("all", "baseline")] if row == "*" else [row]
    return min(scores[r][metric]["value"] for r in rows)


def side_by_side(run) -> list[dict]:
    with concurrent.futures.ThreadPoolExecutor(len(SEEDS)) as pool:
        return list(pool.map(run, SEEDS))


def command(seed: int, *args: str) -> float:
    """Runs a command of the project on one core. Returns its CPU time in minutes, divided by CORES."""
    process = subprocess.Popen(_program(seed, args), cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(args)}: exit status {os.waitstatus_to_exitcode(status)}")
    return (used.ru_utime + used.ru_stime) / 60 / CORES


def told(seed: int, *args: str) -> dict:
    """The JSON that a command of the project prints last."""
    out = subprocess.run(_program(seed, args), cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    return json.loads(out.splitlines()[-1])


def _program(seed: int, args: tuple[str, ...]) -> list[str]:
    core = ["taskset", "-c", str(seed % os.cpu_count())] if shutil.which("taskset") else []
    return [*core, sys.executable, "-m", "gpt4o_jax", *args]


def scores(workdir: Path, temperature: float = 0) -> dict:
    """task -> slice -> metric -> {"value": ..., "low": ..., "high": ..., "items": ...} of the newest evaluation."""
    return json.loads((newest_evaluation(workdir, temperature) / "scores.json").read_text())


def newest_evaluation(workdir: Path, temperature: float = 0) -> Path | None:
    """The folder of the newest `evaluate --tasks` at a temperature; None where there is none."""
    behind = f"_temperature_{temperature:g}" if temperature else ""
    found = [p for p in workdir.glob(f"evaluations/*{behind}") if p.name.removesuffix(behind).isdigit()]
    return max(found, key=lambda p: int(p.name.removesuffix(behind)), default=None)


def last_eval(workdir: Path) -> dict:
    """The record of the last evaluation during training, which is on the whole hold-out."""
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [r for r in records if r["kind"] == "eval"][-1]


if __name__ == "__main__":
    into, what, which = sys.argv[1:]
    into = Path(into).resolve()
    whole = {"joint": joint_run, "without_text": without_text_run}
    print(json.dumps(whole[what](int(which), into) if what in whole else world_run(what, int(which), into)))
