"""Gemma 3's text decoder from scratch, by size: 1b, 4b, 12b or 27b (gpt4o_jax/model/families.py).

Hardware: intended for, but not tested on: 8 GPUs of 80 GB for 1b, 32 for 4b, 64 for 12b, 128 for 27b.
Time: not measured yet.
Expected: not measured yet; Google trained on 2e12 to 14e12 tokens, by distillation (arXiv:2503.19786). The
    learning rates are starting points, not tuned.
Command: python -m gpt4o_jax train --config=configs/gemma3.py:1b --workdir=runs/gemma3
    --config.data.source=text --config.data.path=FOLDER
    A tokenizer with the published vocabulary size is trained on that text; it is not the published tokenizer.
    Sequence length 8,192, without context extension.
"""

from gpt4o_jax.model.families import GEMMA3, large_run

# size: (rows of a batch, training tokens at 20 a parameter, peak learning rate)
RECIPES = {
    "1b": (256, "20e9 tokens", 6e-4),
    "4b": (512, "78e9 tokens", 4e-4),
    "12b": (512, "235e9 tokens", 3e-4),
    "27b": (1024, "540e9 tokens", 2e-4),
}


def get_config(size="1b"):
    c = large_run("gemma3.py", GEMMA3, size)
    c.model.update(context_length=8192, rope_scaling="none", rope_factor=1.0)
    c.train.batch_size, c.train.length, c.optimizer.peak_lr = RECIPES[size]
    return c
