"""This project's own decoder, by size: nano, moe_nano, tiny, small, medium, large, xl or xxl (gpt4o_jax/model/families.py).

Hardware: nano: 2 CPU cores. Intended for, but not tested on: a CPU or any GPU for moe_nano and tiny, one GPU of 80 GB for small
    and medium, 8 for large, 64 for xl, 512 for xxl. From large on, weights are sharded over all devices (mesh.preset); with
    fewer devices, raise train.accumulate.
Time: not measured yet.
Expected: not measured yet at full length; nano reaches 1.78 bits per byte after 400 steps of 8 rows on the built-in corpus
    (notebooks/01_train_and_sample.ipynb). The learning rates are untuned starting points.
Command: python -m gpt4o_jax train --config=configs/gpt4o.py:small --workdir=runs/small
    --config.data.source=text --config.data.path=FOLDER
    Without data.source it trains on the built-in corpus of 2 MB: enough to try a size out, not to train it.

Length: 20 tokens per parameter (Chinchilla, arXiv:2203.15556).
"""

from gpt4o_jax.config import base_config, to_dict
from gpt4o_jax.model.families import GPT4O, pick

# size: (rows of a batch, micro-batches, steps in one dispatch, training tokens, peak learning rate of AdamW)
RECIPES = {
    "nano": (32, 1, 10, "84e6 tokens", 3e-3),
    "moe_nano": (32, 1, 10, "84e6 tokens", 3e-3),
    "tiny": (64, 1, 10, "545e6 tokens", 3e-3),
    "small": (256, 8, 10, "2.7e9 tokens", 2e-3),
    "medium": (256, 16, 1, "7.4e9 tokens", 1e-3),
    "large": (256, 4, 1, "26.5e9 tokens", 6e-4),
    "xl": (512, 1, 1, "162e9 tokens", 3e-4),
    "xxl": (1024, 1, 1, "1.36e12 tokens", 1.5e-4),
}


def get_config(size="nano"):
    c = base_config()
    c.model.update(to_dict(pick("gpt4o.py", GPT4O, size)))
    c.tokenizer.vocab_size = c.model.vocab_size
    rows, micro_batches, dispatch, length, peak_lr = RECIPES[size]
    c.train.batch_size = rows
    c.train.accumulate = micro_batches
    c.train.steps_per_dispatch = dispatch
    c.train.length = length
    c.optimizer.name = "muon"
    c.optimizer.peak_lr = peak_lr
    c.optimizer.schedule = "wsd"
    c.optimizer.end_lr_fraction = 0.0
    c.eval.max_tokens = 500_000
    if c.model.router_bias:  # balances the load by itself
        c.train.balance_loss = 0.0
    if size in ("large", "xl", "xxl"):
        c.mesh.preset = "fsdp"
    return c
