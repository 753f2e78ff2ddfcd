"""How far the fast training step drifts from the plain one: the difference between the loss curves of bfloat16 matmuls with
blockwise attention and of float32 with plain attention, relative to that caused by permuting the rows (targets.py: at most 4).

`python benchmarks/measure.py fast_path`: configs/quickstart.py for 300 steps, four times with the same rows.
"""

import dataclasses

import jax
import numpy as np

from gpt4o_jax import parallel
from gpt4o_jax.commands import config_file
from gpt4o_jax.data import corpus as corpora
from gpt4o_jax.data.batches import dispatches
from gpt4o_jax.training.program import build

STEPS = 300
FAST = dict(compute_dtype="bfloat16", attention="blocks")
PLAIN = dict(compute_dtype="float32", attention="reference")


def measure_fast_path(steps: int = STEPS) -> dict:
    """name -> (value, details): root-mean-square difference between two loss curves, relative to that of the control."""
    config = config_file.read("configs/quickstart.py", {"train.length": f"{steps} steps", "train.steps_per_dispatch": "1"})
    corpus = corpora.prepare(config)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=corpus.tokenizer.vocab_size))
    plain, fast = _curve(config, corpus, PLAIN), _curve(config, corpus, FAST)
    permuted = [_curve(config, corpus, FAST, seed) for seed in (1, 2)]
    between = lambda a, b: float(np.sqrt(np.mean((a - b) ** 2)))
    control = max(between(fast, p) for p in permuted)
    details = {"nats": between(fast, plain), "control": control, "last_losses": [float(x[-1]) for x in (plain, fast, *permuted)]}
    return {"fast_path_drift": (between(fast, plain) / control, details)}


def _curve(config, corpus, changes: dict, seed: int | None = None) -> np.ndarray:
    """The loss of each step; with a seed, the rows of every batch are permuted."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    last, mesh, rows = int(config.train.length.split()[0]), parallel.make_mesh(), corpora.training_rows(config, corpus)
    program, losses = build(config, mesh), []
    B, random = config.train.batch_size, np.random.default_rng(seed)
    with jax.set_mesh(mesh):
        step = program.compile(last, np.ones(config.model.vocab_size, np.int32))
        state = program.fresh(jax.random.key(config.seed))
        for _, batch in dispatches(rows, 0, last, 1, B, 1, symbols=corpus.tokenizer.symbols):
            order = np.arange(B) if seed is None else random.permutation(B)
            batch = jax.tree.map(lambda x, order=order: x[:, order], batch)
            state, metrics = step(state, jax.device_put(batch, program.batch_sharding))
            losses.append(float(metrics["loss"][0]))
    return np.array(losses)
