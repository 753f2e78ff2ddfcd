"""The model of the article that this project started from, corrected: one layer of width 512, 8 heads, a vocabulary of
10,000 (README.md lists the corrections).

Hardware: 2 CPU cores.
Time: not measured yet.
Expected: not measured yet.
Command: python -m gpt4o_jax train --config=configs/article.py --workdir=runs/article
"""

from gpt4o_jax.config import base_config, to_dict
from gpt4o_jax.model.families import ARTICLE


def get_config():
    c = base_config()
    c.model.update(to_dict(ARTICLE))
    c.tokenizer.vocab_size = ARTICLE.vocab_size
    # Plain Adam at a constant learning rate: no warm-up, no weight decay, no clipping.
    c.optimizer.name = "adamw"
    c.optimizer.peak_lr = 1e-3
    c.optimizer.b2 = 0.999
    c.optimizer.weight_decay = 0.0
    c.optimizer.schedule = "constant"
    c.optimizer.warmup_steps = 0
    c.optimizer.clip_norm = 0.0
    c.train.batch_size = 32
    c.train.length = "500 steps"
    return c
