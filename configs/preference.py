"""DPO: trains a fine-tuned run on pairs of preferred and rejected answers, from a world or a JSONL file.

Hardware: 2 CPU cores, for models of configs/finetune.py.
Time: half a CPU minute on two cores for 4,000 pairs of numbers (one epoch).
Expected: 95 to 97 % of held-out pairs of numbers preferred rightly, and no better answers: 4 and 5 points fewer right of a run
    that knew them already (98 %). See BENCHMARKS.md for what was tried.
Command: python -m gpt4o_jax train --config=configs/preference.py:runs/numbers --workdir=runs/preferred
    With pairs of your own, one JSON object per line, {"messages": [turns up to the question], "chosen": text, "rejected": text}:
    --config.data.source=conversations --config.data.path=pairs.jsonl --config.data.holdout_path=held_out_pairs.jsonl
    (without holdout_path, a share of the questions is held out). --config.lora.rank=16 trains adapters.
    The other run must stay in place. Pairs of a world reject the right answer with one wrong word in it.
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
    c.train.mtp_weight = 0.0  # multi-token prediction heads, if the model has any, are not trained
    c.optimizer.update(peak_lr=1e-4, warmup_steps=20, weight_decay=0.0)
    c.train.update(length="1 epochs", batch_size=16)
    c.eval.every = c.sample.every = c.checkpoint.every = 100
    c.checkpoint.best = "preference_accuracy"
    return c
