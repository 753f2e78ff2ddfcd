"""Fine-tuning of models that were trained on worlds: LoRA compared with full fine-tuning, DPO, GRPO.

Two seeds of each, side by side, one per core; scores are those of `evaluate`: 200 held-out items per slice, greedy unless stated.
"""

import json
from pathlib import Path

import jax
import numpy as np
from applications import base_run, command, commits, kept, newest_evaluation, scores, side_by_side, told

from gpt4o_jax import parallel
from gpt4o_jax.finetuning import pairs
from gpt4o_jax.run import open_run
from gpt4o_jax.tasks.worlds import WORLDS, arithmetic
from gpt4o_jax.training import program

ADAPTERS = ("--config.lora.rank=16", "--config.lora.targets=('*/query','*/key','*/value')", "--config.optimizer.peak_lr=3e-3")
TUNED = {"full": (), "lora": (*ADAPTERS, "--config.optimizer.name=adamw")}
LORA_WORLD, LORA_STEPS = "numbers", 400
# Preferences and rewards start from runs that do not answer well yet: one has learned from answers of which half have a wrong
# word (a run that knows the world has nothing to learn from pairs), the other was stopped early.
DPO_WORLD, DPO_PAIRS, DPO_START = "numbers", 20_000, ("--config.train.length=400 steps", "--config.eval.every=400")
GRPO_START = ("--config.train.length=120 steps", "--config.eval.every=120")


def measure_lora(folder: Path) -> dict:
    """Both ways from the pre-trained model of configs/applications.py, for the same number of steps on one world."""

    def run(seed: int) -> dict:
        base_run(seed, folder)
        found = {}
        for kind, flags in TUNED.items():
            workdir = folder / f"{kind}{seed}"
            config = [f"--config=configs/finetune.py:{LORA_WORLD}", f"--config.init.from={folder / f'base{seed}'}", *flags]
            common = [f"--config.seed={seed}", f"--config.train.length={LORA_STEPS} steps", f"--workdir={workdir}"]
            minutes = kept(workdir, lambda config=config, common=common: {"minutes": command(seed, "train", *config, *common)})
            found[kind] = minutes | size(workdir) | {"scores": evaluated(seed, workdir, LORA_WORLD)}
        return found

    runs = side_by_side(run)
    points = [mean(r["full"]["scores"]) - mean(r["lora"]["scores"]) for r in runs]
    share = lambda what: 100 * max(r["lora"][what] / r["full"][what] for r in runs)
    commit = commits([r[kind] for r in runs for kind in TUNED])
    return {
        "lora_points_behind": (max(points), {"seeds": points, "runs": runs} | commit),
        "lora_parameters": (share("trained"), dict(commit)),
        "lora_memory": (share("bytes"), dict(commit)),
    }


def measure_preferences(folder: Path) -> dict:
    """DPO on pairs of one world, from a run that has learned right and wrong answers alike."""
    data = [f"--config.data.path={mixed_answers(folder)}", "--config.data.source=conversations"]
    data.append(
        "--config.data.shingle_bytes=0"
    )  # questions resemble each other, and the held-out ones of the world differ anyway

    def run(seed: int) -> dict:
        start, workdir = start_run(seed, DPO_WORLD, (*DPO_START, *data), folder), folder / f"preferred{seed}"
        flags = [f"--config=configs/preference.py:{start}", f"--config.seed={seed}", f"--workdir={workdir}"]
        minutes = kept(workdir, lambda: {"minutes": command(seed, "train", *flags)})
        accuracy = told(seed, "evaluate", f"--workdir={workdir}")["preference_accuracy"]  # pairs that select no checkpoint
        found = minutes | {"accuracy": 100 * accuracy}
        for temperature in (0, 1):
            of_runs = [evaluated(seed, run, DPO_WORLD, temperature) for run in (start, workdir)]
            found[f"temperature_{temperature}"] = dict(zip(("before", "after"), of_runs, strict=True))
        return found

    runs = side_by_side(run)
    accuracy = [r["accuracy"] for r in runs]
    found = {"dpo_accuracy": (min(accuracy), {"seeds": accuracy, "runs": runs} | commits(runs))}
    for name, temperature in (("dpo_exact_match_gain", 0), ("dpo_samples_gain", 1)):
        scored = [r[f"temperature_{temperature}"] for r in runs]
        exact = [{when: mean(scores) for when, scores in each.items()} for each in scored]
        gains = [each["after"] - each["before"] for each in exact]
        found[name] = (min(gains), {"seeds": gains, "exact_match": exact} | commits(runs))
    return found


def mixed_answers(folder: Path) -> Path:
    """A file of conversations: both answers of each preference pair of the world."""
    path = folder / "mixed_answers.jsonl"
    if not path.exists():
        lines = []
        for pair in pairs.of_world(WORLDS[DPO_WORLD], DPO_PAIRS, held_out=False):
            question = [{"role": m.role, "content": m.text} for m in pair.prompt]
            for answer in (pair.chosen, pair.rejected):
                lines.append(json.dumps({"messages": [*question, {"role": "assistant", "content": answer}]}) + "\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines))
    return path


def measure_rewards(folder: Path) -> dict:
    """GRPO by exact match, from a run of arithmetic that was stopped early; scored by the world's second verifier."""

    def run(seed: int) -> dict:
        start, workdir = start_run(seed, "arithmetic", GRPO_START, folder), folder / f"rewarded{seed}"
        flags = [f"--config=configs/reinforced.py:{start}", f"--config.seed={seed}", f"--workdir={workdir}"]
        flags.append("--config.model.context_length=20")  # the length of rows
        found = kept(workdir, lambda: {"minutes": command(seed, "train", *flags)})
        for name, run in (("before", start), ("after", workdir)):
            found[f"{name}_exact_match"] = mean(evaluated(seed, run, "arithmetic"))
            found[f"{name}_verified"] = verified(run)
        return found

    runs = side_by_side(run)
    gains = [r["after_verified"] - r["before_verified"] for r in runs]
    return {"grpo_gain": (min(gains), {"seeds": gains, "runs": runs} | commits(runs))}


def start_run(seed: int, world: str, flags: tuple[str, ...], folder: Path) -> Path:
    workdir = folder / f"{world}_start{seed}"
    common = [f"--config=configs/finetune.py:{world}", f"--config.seed={seed}", f"--workdir={workdir}"]
    kept(workdir, lambda: {"minutes": command(seed, "train", *common, *flags)})
    return workdir


def evaluated(seed: int, workdir: Path, world: str, temperature: float = 0) -> dict:
    """slice -> metric -> score; evaluated once, the answers are kept in the run folder."""
    if not newest_evaluation(workdir, temperature):
        command(seed, "evaluate", f"--workdir={workdir}", f"--tasks={world}", f"--temperature={temperature:g}")
    return scores(workdir, temperature)[world]


def mean(scored: dict) -> float:
    """Exact match over all items."""
    return scored["all"]["exact_match"]["value"]


def verified(workdir: Path) -> float:
    """Percentage of the newest evaluation's answers that arithmetic.verify accepts, which never sees the references."""
    lines = [json.loads(line) for line in (newest_evaluation(workdir) / "arithmetic.jsonl").read_text().splitlines()]
    return 100 * float(np.mean([arithmetic.verify(line["prompt"][-1]["content"], line["answer"]) for line in lines]))


def size(workdir: Path) -> dict:
    """Trainable parameters, and bytes of parameters, optimizer state and gradients, counted from the arrays."""
    shapes = program.build(open_run(workdir).config, parallel.make_mesh(devices=jax.devices()[:1])).shapes
    bytes_of = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    trained = sum(x.size for x in jax.tree.leaves(shapes.params))
    return {"trained": trained, "bytes": bytes_of((shapes.base, shapes.params, shapes.opt_state)) + bytes_of(shapes.params)}
