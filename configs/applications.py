"""One model for four applications and chat: `pretrain` on the built-in corpus and all worlds, then `tune` on the worlds' answers.

Hardware: 2 CPU cores.
Time: 70 minutes on 2 cores for both stages; three times as long without AVX-512 (3.0 s a step instead of 1.0).
Expected: the targets of all worlds, in the worse of two seeds: numbers 100 %, sentences BLEU 95, questions over one hop and over
    two 97.5 %, tool calls 100 %. Text: 1.435 bits per byte before tune, 1.415 after. Measured at 1a76c20, see BENCHMARKS.md.
Command: bash launch/applications.sh, or
    python -m gpt4o_jax train --config=configs/applications.py:pretrain --workdir=runs/base
    python -m gpt4o_jax train --config=configs/applications.py:tune --workdir=runs/tuned --config.init.from=runs/base
    python -m gpt4o_jax evaluate --workdir=runs/tuned --tasks=qa,translation,summarisation,generation,chat

In pretrain the loss is on every token, including questions and passages: the model must learn to copy before it can answer. In
tune it is on answers only, and some text remains, to prevent forgetting: without_text, a shorter tune with almost none, ends at
1.98 bits per byte.
"""

from gpt4o_jax.config import base_config
from gpt4o_jax.data.sources import WORLD_NAMES
from gpt4o_jax.errors import RunError, did_you_mean
from gpt4o_jax.tasks.worlds import APPLICATIONS

# stage: (share of rows that are text, tokens in the loss, length, peak learning rates of AdamW and Muon, part of it in decay)
STAGES = {
    "pretrain": (0.3, "all", "3000 steps", 3e-3, 0.02, 0.5),
    "tune": (0.1, "answers", "5000 steps", 2e-3, 0.006, 0.8),
    "without_text": (0.001, "answers", "1000 steps", 2e-3, 0.006, 0.8),
}

# relative weights of the worlds, 1 if not listed: questions and numbers need the most steps when trained alone
WEIGHTS = {"questions": 12, "numbers": 3, "sentences": 1.5, "tools": 1.5, "writing": 0.5, "arithmetic": 0.5}


def get_config(stage="pretrain"):
    if stage not in STAGES:
        raise RunError(
            f"configs/applications.py:{stage}: no such stage{did_you_mean(stage, STAGES)}; stages: {', '.join(STAGES)}"
        )
    text, loss_on, length, peak_lr, muon_lr, decay = STAGES[stage]
    c = base_config()
    c.model.update(n_layers=4, scan_unroll=4, d_model=256, n_heads=4, context_length=256, value_embeddings=1, residual_mix=True)
    c.init.model = True
    c.tokenizer.vocab_size = 1024
    weights = {name: WEIGHTS.get(name, 1) for name in WORLD_NAMES}
    worlds = tuple(f"world:{name}={(1 - text) * weight / sum(weights.values()):g}" for name, weight in weights.items())
    c.data.update(
        source="mixture", mixture=(f"python_docs={text}", *worlds), rows="first_fit", loss_on=loss_on, world_items=40_000
    )
    c.optimizer.update(name="muon", peak_lr=peak_lr, muon_lr=muon_lr, schedule="wsd", decay_fraction=decay)
    c.optimizer.update(end_lr_fraction=0.0, warmup_steps=50)
    c.train.update(length=length, batch_size=16)
    c.eval.update(every=1000, batch_size=32)
    c.sample.update(every=1000, prompts=("", "Return a "))
    c.checkpoint.every = 1000
    if stage != "pretrain":
        c.eval.tasks = tuple(APPLICATIONS)
        c.eval.task_items = 20
    return c
