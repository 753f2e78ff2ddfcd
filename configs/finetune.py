"""Supervised fine-tuning on one task, from any run: --config.init.from=RUN takes its weights, model and tokenizer.

Worlds (synthetic tasks, gpt4o_jax/tasks/worlds), which small models also learn from scratch, without init.from:
    numbers, sentences, questions, reports, writing, memory, tools, copying, arithmetic; docstrings: real text
Your own chats, in JSONL: conversations
TFDS datasets, after `data prepare --tfds=NAME`, or records with the same fields in JSONL (--config.data.source=jsonl
    --config.data.path=FILE --config.data.holdout_path=FILE):
    squad, wmt14_translate/de-en, wmt16_translate/ro-en, cnn_dailymail, xsum, samsum, billsum

Hardware: worlds: 2 CPU cores; datasets: depends on the model, not tested yet.
Time: worlds: 3 to 8 minutes on 2 cores (target 15), questions 15 to 30 (target 30); datasets: not measured yet.
Expected: worlds: the target stated in each world's file; measured scores are in BENCHMARKS.md (benchmarks/measure.py world_NAME).
    Datasets: not measured yet; their learning rates are untuned starting points.
Command: python -m gpt4o_jax train --config=configs/finetune.py:numbers --workdir=runs/numbers
    python -m gpt4o_jax train --config=configs/finetune.py:conversations --workdir=runs/mine \
        --config.init.from=runs/qwen --config.data.path=chats.jsonl
    python -m gpt4o_jax train --config=configs/finetune.py:squad --workdir=runs/squad --config.init.from=runs/qwen
"""

from gpt4o_jax.config import base_config
from gpt4o_jax.data.sources import WORLD_NAMES, world
from gpt4o_jax.errors import RunError, did_you_mean
from gpt4o_jax.tasks.readers import METRICS

DATASETS = ("squad", "wmt14_translate/de-en", "wmt16_translate/ro-en", "cnn_dailymail", "xsum", "samsum", "billsum")
CHATS = "conversations"
STEPS = {"numbers": 1500, "questions": 3000}  # others: 600


def get_config(task="numbers"):
    known = (*WORLD_NAMES, CHATS, *DATASETS)
    if task not in known:
        raise RunError(f"configs/finetune.py:{task}: no such task{did_you_mean(task, known)}; tasks: {', '.join(known)}")
    c = base_config()
    c.init.model = True
    c.model.update(n_layers=4, scan_unroll=4, d_model=256, n_heads=4, context_length=256, value_embeddings=1, residual_mix=True)
    c.tokenizer.vocab_size = 1024
    c.data.rows = "first_fit"
    c.train.update(length=f"{STEPS.get(task, 600)} steps", batch_size=16)
    c.eval.update(every=200, tasks=("holdout",), task_items=50)
    c.checkpoint.every = 200
    if task in WORLD_NAMES:
        c.optimizer.update(name="muon", peak_lr=3e-3, schedule="wsd", decay_fraction=0.4, end_lr_fraction=0.0, warmup_steps=20)
        c.data.update(source="world", path=task, world_items=100_000)
        if task == "questions":  # answering needs copying, which is learned sooner from pure copying tasks
            c.data.update(source="mixture", path="", mixture=("world:questions=0.85", "world:copying=0.15"))
            c.optimizer.update(peak_lr=2e-3, muon_lr=0.006)  # tried with one seed: 0.02 is slower here
        c.eval.tasks, c.checkpoint.best = (task,), f"{task}/{world(task).metrics[0]}"
        return c
    if task == CHATS:
        c.data.source, c.checkpoint.best = CHATS, "bits_per_byte"
    else:
        reader, name = task.split("/")[-1], "squad/v1.1" if task == "squad" else task
        held = "test" if task == "billsum" else "validation"
        c.data.update(source="tfds", reader=reader, path=f"{name}:train", holdout_path=f"{name}:{held}")
        c.checkpoint.best = f"holdout/{METRICS[reader][0]}"
    c.optimizer.update(name="adamw", peak_lr=2e-5, schedule="cosine", end_lr_fraction=0.0, warmup_steps=100)
    c.train.update(length="2 epochs", patience=5)
    return c
