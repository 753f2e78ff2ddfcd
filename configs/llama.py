"""Llama 3's architecture from scratch, by size: 1b, 3b, 8b, 70b or 405b; Llama 2's: 2-7b, 2-13b or 2-70b (model/families.py).

Hardware: intended for, but not tested on: 8 GPUs of 80 GB for 1b, 16 for 3b, 64 for 8b and 2-7b, 128 for 2-13b, 1,024 for
    70b and 2-70b, 2,048 for 405b.
Time: not measured yet.
Expected: not measured yet; Meta trained Llama 3 on 15e12 tokens that are not public (arXiv:2407.21783), and
    Llama 2 on 2e12 (arXiv:2307.09288).
Command: python -m gpt4o_jax train --config=configs/llama.py:1b --workdir=runs/llama
    --config.data.source=text --config.data.path=FOLDER
    A tokenizer with the published vocabulary size is trained on that text; it is not the published tokenizer.
    Sequence length 8,192, as before context extension; 4,096 for Llama 2.
"""

from gpt4o_jax.model.families import LLAMA, large_run

# size: (rows of a batch, training tokens at 20 a parameter, peak learning rate: from 8b on those of arXiv:2407.21783, table 3,
#     and arXiv:2307.09288, section 2.2)
RECIPES = {
    "1b": (128, "25e9 tokens", 6e-4),
    "3b": (256, "64e9 tokens", 4e-4),
    "8b": (512, "160e9 tokens", 3e-4),
    "70b": (1024, "1.4e12 tokens", 1.5e-4),
    "405b": (2048, "8.1e12 tokens", 8e-5),
    "2-7b": (1024, "135e9 tokens", 3e-4),
    "2-13b": (1024, "260e9 tokens", 3e-4),
    "2-70b": (1024, "1.4e12 tokens", 1.5e-4),
}


def get_config(size="1b"):
    c = large_run("llama.py", LLAMA, size)
    if not size.startswith("2-"):
        c.model.update(context_length=8192, rope_scaling="none", rope_factor=1.0, rope_original_context=None)
    c.train.batch_size, c.train.length, c.optimizer.peak_lr = RECIPES[size]
    return c
