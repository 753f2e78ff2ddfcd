"""OLMo 2's architecture from scratch, by size: 7b or 13b (gpt4o_jax/model/families.py).

Hardware: intended for, but not tested on: 64 GPUs of 80 GB for 7b, 128 for 13b.
Time: not measured yet.
Expected: not measured yet; AI2 trained on 4e12 and 5e12 tokens of OLMo-Mix-1124, which is public
    (arXiv:2501.00656).
Command: python -m gpt4o_jax train --config=configs/olmo2.py:7b --workdir=runs/olmo2
    --config.data.source=text --config.data.path=FOLDER
    A tokenizer with the published vocabulary size is trained on that text; it is not the published tokenizer.
"""

from gpt4o_jax.model.families import OLMO2, large_run

# size: (rows of a batch, peak learning rate) of arXiv:2501.00656
RECIPES = {"7b": (1024, 3e-4), "13b": (2048, 9e-4)}


def get_config(size="7b"):
    c = large_run("olmo2.py", OLMO2, size)
    c.train.batch_size, c.optimizer.peak_lr = RECIPES[size]
    c.train.length = "150e9 tokens"
    return c
