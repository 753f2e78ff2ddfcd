"""GRPO: a run that answers a world's questions, if often wrongly, learns from the exact score of its own answers.

Hardware: 2 CPU cores for the models of configs/finetune.py.
Time: 11 CPU minutes of two cores with context_length=20 (python benchmarks/measure.py rewards).
Expected: runs of arithmetic that were stopped at step 120: held-out items right from 56.5 to 86.5 and from 36.5 to 71.3 %,
    two seeds.
Command: python -m gpt4o_jax train --config=configs/reinforced.py:runs/half --workdir=runs/rewarded
    --config.model.context_length=20 where question and answer fit in it: a row holds one answer and is as long as the context
    --config.data.path=NAME for another world than arithmetic (objective.answer_tokens: what its answers need, and their end)
    --config.lora.rank=16 trains adapters
    The other run must stay where it is: it is what the KL divergence is taken to.

Each step samples 8 answers to each of 64 questions and learns from them once. What limits it is the noise of the rewards:
at three times this rate the answers get worse from the first steps on.
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
    c.objective.update(method="grpo", beta=0.02, group=8, answer_tokens=5)
    c.data.update(source="world", path="arithmetic")
    c.train.mtp_weight = 0.0  # heads of multi-token prediction, where the model has some, stay as they are
    c.optimizer.update(peak_lr=1e-4, b2=0.95, schedule="cosine", end_lr_fraction=0.1, warmup_steps=10, weight_decay=0.0)
    c.train.update(length="300 steps", batch_size=512, steps_per_dispatch=1)
    c.log.every = 5
    c.eval.every = c.sample.every = c.checkpoint.every = 50
    c.checkpoint.best = "reward"
    return c
