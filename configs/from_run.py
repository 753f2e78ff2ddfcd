"""Continues training from the model, tokenizer and weights of another run, such as published weights after `convert import`.

Hardware: depends on the model; about 16 bytes per parameter for weights, gradients and AdamW's moments.
Time: not measured yet.
Expected: not measured yet. Learning rate and length are untuned starting points.
Command: python -m gpt4o_jax train --config=configs/from_run.py:runs/qwen --workdir=runs/mine
    --config.data.source=text --config.data.path=FOLDER
    The other run must stay in place until this one is done. Rows are as long as its context; if memory runs out:
    --config.model.context_length=1024
"""

from gpt4o_jax.config import base_config
from gpt4o_jax.errors import RunError


def get_config(folder=""):
    if not folder:
        raise RunError("--config=configs/from_run.py: expected the folder of a run after a colon, as in from_run.py:runs/qwen")
    c = base_config()
    c.init["from"] = folder
    c.init.model = True
    c.optimizer.peak_lr = 1e-4
    c.train.length = "1 epochs"
    return c
