"""Qwen 3's architecture from scratch, by size: 0.6b, 1.7b, 4b, 8b, 14b or 32b; with experts 30b-a3b or 235b-a22b
    (gpt4o_jax/model/families.py).

Hardware: intended for, but not tested on: 8 GPUs of 80 GB for 0.6b and 1.7b, 16 for 4b, 64 for 8b and 14b, 128 for 32b and
    30b-a3b, 1,024 for 235b-a22b. mesh.expert=8 shards the experts over devices.
Time: not measured yet.
Expected: not measured yet; Qwen trained on 36e12 tokens that are not public (arXiv:2505.09388). The learning
    rates are starting points, not tuned.
Command: python -m gpt4o_jax train --config=configs/qwen3.py:0.6b --workdir=runs/qwen3
    --config.data.source=text --config.data.path=FOLDER
    A tokenizer with the published vocabulary size is trained on that text; it is not the published tokenizer.
    Sequence length 4,096, as in the paper's first stage.
"""

from gpt4o_jax.model.families import QWEN3, large_run

# size: (rows of a batch, training tokens at 20 a parameter, peak learning rate)
RECIPES = {
    "0.6b": (256, "12e9 tokens", 8e-4),
    "1.7b": (512, "34e9 tokens", 6e-4),
    "4b": (512, "80e9 tokens", 4e-4),
    "8b": (1024, "164e9 tokens", 3e-4),
    "14b": (1024, "295e9 tokens", 2e-4),
    "32b": (2048, "655e9 tokens", 1.5e-4),
    "30b-a3b": (1024, "67e9 tokens", 3e-4),  # 20 an active parameter
    "235b-a22b": (2048, "443e9 tokens", 1.5e-4),
}


def get_config(size="0.6b"):
    c = large_run("qwen3.py", QWEN3, size)
    c.model.context_length = 4096
    c.train.batch_size, c.train.length, c.optimizer.peak_lr = RECIPES[size]
    return c
