"""Gemma 2's architecture from scratch, by size: 2b, 9b or 27b (gpt4o_jax/model/families.py).

Hardware: intended for, but not tested on: 16 GPUs of 80 GB for 2b, 64 for 9b, 128 for 27b.
Time: not measured yet.
Expected: not measured yet; Google trained on 2e12 to 13e12 tokens, 2b and 9b by distillation (arXiv:2408.00118).
    The learning rates are starting points, not tuned.
Command: python -m gpt4o_jax train --config=configs/gemma2.py:2b --workdir=runs/gemma2
    --config.data.source=text --config.data.path=FOLDER
    A tokenizer with the published vocabulary size is trained on that text; it is not the published tokenizer.
"""

from gpt4o_jax.model.families import GEMMA2, large_run

# size: (rows of a batch, training tokens at 20 a parameter, peak learning rate)
RECIPES = {"2b": (256, "52e9 tokens", 5e-4), "9b": (512, "185e9 tokens", 3e-4), "27b": (1024, "545e9 tokens", 2e-4)}


def get_config(size="2b"):
    c = large_run("gemma2.py", GEMMA2, size)
    c.train.batch_size, c.train.length, c.optimizer.peak_lr = RECIPES[size]
    return c
