"""Mistral 7B's architecture from scratch (gpt4o_jax/model/families.py).

Hardware: intended for, but not tested on: 64 GPUs of 80 GB.
Time: not measured yet.
Expected: not measured yet; the training data is not public (arXiv:2310.06825). The learning rate is a
    starting point, not tuned.
Command: python -m gpt4o_jax train --config=configs/mistral.py:7b --workdir=runs/mistral
    --config.data.source=text --config.data.path=FOLDER
    A tokenizer with the published vocabulary size is trained on that text; it is not the published tokenizer.
    Sequence length 8,192, twice the attention window.
"""

from gpt4o_jax.model.families import MISTRAL, large_run


def get_config(size="7b"):
    c = large_run("mistral.py", MISTRAL, size)
    c.model.context_length = 8192
    c.train.batch_size, c.train.length, c.optimizer.peak_lr = 512, "145e9 tokens", 3e-4
    return c
