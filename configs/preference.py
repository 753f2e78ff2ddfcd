"""DPO: trains a fine-tuned run on pairs of chosen and rejected answers, from a world or a JSONL file.

Hardware: 2 CPU cores, for models of configs/finetune.py.
Time: about a minute on 2 cores for 4,000 pairs of numbers (three epochs).
Expected: from a numbers run trained on correct and corrupted answers alike (benchmarks/finetuning.py makes it), all 200 held-out
    pairs are ranked correctly, and accuracy rises from 47 and 46 % to 87 and 86 % when sampling at temperature 1, from 89 and
    90 % to 92 and 92 % greedily; two seeds at 006eb25. runs/numbers answers 99.5 % correctly from the start, which leaves little
    to gain. The learning rate suits a few million parameters; larger models use about 1e-6 (arXiv:2305.18290).
Command: python -m gpt4o_jax train --config=configs/preference.py:runs/numbers --workdir=runs/preferred
    With pairs of your own, one JSON object per line, {"messages": [turns up to the question], "chosen": text, "rejected": text}:
    --config.data.source=conversations --config.data.path=pairs.jsonl --config.data.holdout_path=held_out_pairs.jsonl
    (without holdout_path, a share of the questions is held out). --config.lora.rank=16 trains LoRA adapters.
    The other run must stay in place. In pairs from a world, the rejected answer is the correct one with one word replaced.
"""

from gpt4o_jax.config import base_config
from gpt4o_jax.errors import RunError


def get_config(folder=""):
    if not folder:
        raise RunError("--config=configs/preference.py: expected the folder of a run after a colon: preference.py:runs/numbers")
    c = base_config()
    c.init.update({"from": folder, "model": True})
    c.objective.update(method="dpo", beta=0.1, nll=1.0)  # without nll both answers of such pairs grow unlikely
    c.data.update(source="world", path="numbers", world_items=4000)
    c.train.mtp_weight = 0.0  # multi-token prediction heads, if the model has any, are not trained
    c.optimizer.update(peak_lr=1e-3, warmup_steps=20, weight_decay=0.0)
    c.train.update(length="3 epochs", batch_size=16)
    c.eval.every = c.sample.every = c.checkpoint.every = 50
    c.checkpoint.best = "preference_accuracy"
    return c
