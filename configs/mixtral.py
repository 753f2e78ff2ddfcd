"""Mixtral's architecture from scratch, by size: 8x7b or 8x22b (gpt4o_jax/model/families.py).

Hardware: intended for, but not tested on: 128 GPUs of 80 GB for 8x7b, 512 for 8x22b.
    mesh.expert=8 shards the experts over devices.
Time: not measured yet.
Expected: not measured yet; the training data is not public (arXiv:2401.04088). The learning rates
    are starting points, not tuned.
Command: python -m gpt4o_jax train --config=configs/mixtral.py:8x7b --workdir=runs/mixtral
    --config.data.source=text --config.data.path=FOLDER
    A tokenizer with the published vocabulary size is trained on that text; it is not the published tokenizer.
    Sequence length 4,096.
"""

from gpt4o_jax.model.families import MIXTRAL, large_run

# size: (rows of a batch, training tokens at 20 an active parameter, peak learning rate)
RECIPES = {"8x7b": (1024, "258e9 tokens", 3e-4), "8x22b": (2048, "784e9 tokens", 2e-4)}


def get_config(size="8x7b"):
    c = large_run("mixtral.py", MIXTRAL, size)
    c.model.context_length = 4096
    c.train.batch_size, c.train.length, c.optimizer.peak_lr = RECIPES[size]
    return c
