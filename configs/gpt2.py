"""GPT-2 from scratch, by size: 124m, 355m, 774m or 1558m (gpt4o_jax/model/families.py).

Hardware: intended for, but not tested on: one GPU of 80 GB for 124m and 355m, eight for the others.
Time: not measured yet.
Expected: not measured yet. llm.c and modded-nanogpt report a validation loss of 3.28 nats per token for 124m
    after 10e9 tokens of FineWeb with GPT-2's own tokenizer; with any other tokenizer, compare bits per byte only.
Command: python -m gpt4o_jax train --config=configs/gpt2.py:124m --workdir=runs/gpt2
    --config.data.source=text --config.data.path=FOLDER
    A tokenizer with the published vocabulary size is trained on that text; it is not the published tokenizer.
"""

from gpt4o_jax.config import base_config, to_dict
from gpt4o_jax.model.families import GPT2, pick

# size: (micro-batches of the 512 rows, peak learning rate: GPT-3's for that size, arXiv:2005.14165, table 2.1)
RECIPES = {"124m": (8, 6e-4), "355m": (16, 3e-4), "774m": (8, 2.5e-4), "1558m": (16, 2e-4)}


def get_config(size="124m"):
    c = base_config()
    c.model.update(to_dict(pick("gpt2.py", GPT2, size)))
    c.tokenizer.vocab_size = c.model.vocab_size
    c.train.batch_size = 512
    c.train.accumulate, c.optimizer.peak_lr = RECIPES[size]
    c.train.length = "10e9 tokens"
    c.optimizer.warmup_steps = 700
    c.eval.max_tokens = 500_000
    if size in ("774m", "1558m"):
        c.model.remat = "full"
        c.mesh.preset = "fsdp"
    return c
