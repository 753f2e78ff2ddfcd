"""DPO: a run that answers learns which of two answers is preferred. Pairs of a world, or of a JSONL file.

Hardware: 2 CPU cores for the models of configs/finetune.py.
Time: not measured yet.
Expected: not measured yet. Learning rate and beta are starting points.
Command: python -m gpt4o_jax train --config=configs/preference.py:runs/numbers --workdir=runs/preferred
    with pairs of your own, a line each {"messages": [turns up to the question], "chosen": text, "rejected": text}:
    --config.data.source=conversations --config.data.path=pairs.jsonl --config.data.holdout_path=held_out_pairs.jsonl
    (without the last a share of them is held out, by question)
    --config.lora.rank=16 trains adapters
    The other run must stay where it is. Of a world, the right answer with one wrong word in it is rejected.
"""

from gpt4o_jax.config import base_config
from gpt4o_jax.errors import RunError


def get_config(folder=""):
    if not folder:
        raise RunError("--config=configs/preference.py: expected the folder of a run after a colon: preference.py:runs/numbers")
    c = base_config()
    c.init.update({"from": folder, "model": True})
    c.objective.update(method="dpo", beta=0.1)
    c.data.update(source="world", path="numbers", world_items=4000)
    c.train.mtp_weight = 0.0  # heads of multi-token prediction, where the model has some, stay as they are
    c.optimizer.update(peak_lr=1e-4, warmup_steps=20, weight_decay=0.0)
    c.train.update(length="1 epochs", batch_size=16)
    c.eval.every = c.sample.every = c.checkpoint.every = 100
    c.checkpoint.best = "preference_accuracy"
    return c
