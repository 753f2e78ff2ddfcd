"""GRPO: a run that answers a world's questions, if often wrongly, learns from the exact score of its own answers.

Hardware: 2 CPU cores for the models of configs/finetune.py.
Time: 5 CPU minutes of two cores (python benchmarks/measure.py rewards).
Expected: to be mended: two seeds that began at 93.5 and 79 % of held-out items right ended at 88.8 and 72.5 %.
Command: python -m gpt4o_jax train --config=configs/reinforced.py:runs/arithmetic --workdir=runs/rewarded
    --config.data.path=NAME for another world than arithmetic; --config.lora.rank=16 trains adapters
    --config.model.context_length=64 where question and answer fit in it: a row holds one answer and is as long as the context
    The other run must stay where it is: it is what the KL divergence is taken to.

A dispatch samples 4 batches of 8 questions with 8 answers each, then learns from them in 4 steps.
"""

from gpt4o_jax.config import base_config
from gpt4o_jax.errors import RunError


def get_config(folder=""):
    if not folder:
        raise RunError(
            "--config=configs/reinforced.py: expected the folder of a run after a colon: reinforced.py:runs/arithmetic"
        )
    c = base_config()
    c.init.update({"from": folder, "model": True})
    c.objective.update(method="grpo", beta=0.02, group=8, answer_tokens=8)
    c.data.update(source="world", path="arithmetic")
    c.train.mtp_weight = 0.0  # heads of multi-token prediction, where the model has some, stay as they are
    c.optimizer.update(peak_lr=5e-5, b2=0.99, schedule="constant", warmup_steps=10, weight_decay=0.0)
    c.train.update(length="400 steps", batch_size=64, steps_per_dispatch=4)
    c.log.every = 4
    c.eval.every = c.sample.every = c.checkpoint.every = 40
    c.checkpoint.best = "reward"
    return c
