"""GRPO: trains a run that already answers a world's questions, though often wrongly, on exact scores of its own samples.

Hardware: 2 CPU cores, for models of configs/finetune.py.
Time: 11 minutes on 2 cores with context_length=20 (python benchmarks/measure.py rewards).
Expected: correct held-out answers rise from 13.0 to 35.8 % and from 19.5 to 47.8 % (two seeds), starting from arithmetic runs
    stopped at step 120. Measured at 703578a.
Command: python -m gpt4o_jax train --config=configs/reinforced.py:runs/half --workdir=runs/rewarded
    --config.model.context_length=20 if question and answer fit into it: a row holds one answer, padded to the context length
    --config.data.path=NAME for a world other than arithmetic; set objective.answer_tokens for its answers and end-of-turn token
    --config.lora.rank=16 trains LoRA adapters
    The other run must stay in place: it is the reference of the KL divergence.

Each step samples 8 answers to each of 64 questions and makes one update. Reward noise limits the learning rate: at three times
this rate, answers get worse from the first steps on.
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
    c.train.mtp_weight = 0.0  # multi-token prediction heads, if the model has any, are not trained
    c.optimizer.update(peak_lr=1e-4, b2=0.95, schedule="cosine", end_lr_fraction=0.1, warmup_steps=10, weight_decay=0.0)
    c.train.update(length="300 steps", batch_size=512, steps_per_dispatch=1)
    c.log.every = 5
    c.eval.every = c.sample.every = c.checkpoint.every = 50
    c.checkpoint.best = "reward"
    return c
