"""Qwen 2's dense architecture from scratch, by size: 0.5b, 1.5b, 7b or 72b (gpt4o_jax/model/families.py).

Hardware: intended for, but not tested on: 8 GPUs of 80 GB for 0.5b and 1.5b, 64 for 7b, 1,024 for 72b.
Time: not measured yet.
Expected: not measured yet; Qwen trained on 7e12 to 12e12 tokens that are not public (arXiv:2407.10671). The learning
    rates are starting points, not tuned.
Command: python -m gpt4o_jax train --config=configs/qwen2.py:0.5b --workdir=runs/qwen2
    --config.data.source=text --config.data.path=FOLDER
    A tokenizer with the published vocabulary size is trained on that text; it is not the published tokenizer.
    Sequence length 4,096, as before the paper's last stage.
"""

from gpt4o_jax.model.families import QWEN2, large_run

# size: (rows of a batch, training tokens at 20 a parameter, peak learning rate)
RECIPES = {
    "0.5b": (256, "10e9 tokens", 8e-4),
    "1.5b": (512, "31e9 tokens", 6e-4),
    "7b": (1024, "152e9 tokens", 3e-4),
    "72b": (2048, "1.45e12 tokens", 1.5e-4),
}


def get_config(size="0.5b"):
    c = large_run("qwen2.py", QWEN2, size)
    c.model.context_length = 4096
    c.train.batch_size, c.train.length, c.optimizer.peak_lr = RECIPES[size]
    return c
