"""Does the best learning rate of a narrow model carry over to a wide one, under muP and under the standard parametrisation?

`python benchmarks/mup_transfer.py` prints the final training loss of every width and learning rate on the embedded
corpus, in bytes; `python benchmarks/measure.py mup_transfer` records how far the optimum moves.
"""

import dataclasses
import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np

from gpt4o_jax import parallel
from gpt4o_jax.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TokenizerConfig
from gpt4o_jax.data import corpus as corpora
from gpt4o_jax.data.batches import Batch, dispatches
from gpt4o_jax.model import gpt
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.training.optimizer import make_optimizer
from gpt4o_jax.training.schedules import schedule_factor
from gpt4o_jax.training.step import loss_sum

BASE, WIDE = 64, 256
RATES = [2.0**-k for k in range(11, 3, -1)]  # Adam's, in factors of 2
STEPS, B, T = 100, 8, 64
LAST = 20  # steps whose mean loss is the final loss
CONFIG = RunConfig(
    # Bytes as tokens; heads of width 32, of which the wider model has more.
    model=ModelConfig(vocab_size=288, context_length=T, n_layers=2, head_dim=32, output_init="scaled", init_std=0.05),
    tokenizer=TokenizerConfig(kind="byte"),
    data=DataConfig(),
    optimizer=OptimizerConfig(name="adamw", peak_lr=1.0, weight_decay=0.0, warmup_steps=10, end_lr_fraction=0.0),
)


@functools.cache
def batches() -> Batch:
    """[STEPS, B, T], the same for every run."""
    rows = corpora.training_rows(CONFIG, corpora.prepare(CONFIG))
    [(_, batch)] = dispatches(rows, 0, STEPS, STEPS, B, 1)
    return batch


def final_losses(width: int, base: int) -> list[float]:
    """The mean loss of the last steps for each rate of RATES, in nats per byte; inf if it diverged. Compiles once."""
    config = dataclasses.replace(CONFIG.model, d_model=width, n_heads=width // 32, mup_base_width=base)
    model = gpt.GPT(config, Compute("cpu", "float32"))
    optimizer = make_optimizer(CONFIG.optimizer, gpt.logical_axes(model), jnp.float32, config.width_ratio)

    def step(carry, batch):
        params, state, rate, at = carry
        (total, _), grads = jax.value_and_grad(lambda p: loss_sum(model, p, batch, T), has_aux=True)(params)
        weight = jnp.sum(batch.weights)
        factor = rate * schedule_factor(CONFIG.optimizer, STEPS, at)
        updates, state = optimizer.update(jax.tree.map(lambda g: g / weight, grads), state, params, lr_factor=factor)
        return (jax.tree.map(jnp.add, params, updates), state, rate, at + 1), total / weight

    @jax.jit
    def run(rate):
        params = gpt.init(model, jax.random.key(0))
        _, losses = jax.lax.scan(step, (params, optimizer.init(params), rate, 0), batches())
        return jnp.mean(losses[-LAST:])

    found = []
    for rate in RATES:
        found.append(float(run(jnp.float32(rate))))
        print(f"width {width}, base {base or 'none'}, rate {rate:.2g}: {found[-1]:.3f}", file=sys.stderr, flush=True)
    return [loss if math.isfinite(loss) else math.inf for loss in found]


def table() -> dict[str, list[float]]:
    """Final losses by rate: of the base model, which both parametrisations share, and of the wide one under each."""
    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        return {
            f"{BASE}": final_losses(BASE, 0),
            f"{WIDE}, muP": final_losses(WIDE, BASE),
            f"{WIDE}, standard": final_losses(WIDE, 0),
        }


def shifts(losses: dict[str, list[float]]) -> dict[str, int]:
    """By how many factors of 2 the best rate of each wide model is below that of the base model."""
    best = {name: int(np.argmin(row)) for name, row in losses.items()}
    return {name: best[f"{BASE}"] - at for name, at in best.items() if name != f"{BASE}"}


def markdown(losses: dict[str, list[float]]) -> str:
    lines = ["| learning rate | " + " | ".join(f"width {name}" for name in losses) + " |", "|---" * (len(losses) + 1) + "|"]
    best = {name: min(row) for name, row in losses.items()}
    for i, rate in enumerate(RATES):
        cells = [f"**{row[i]:.3f}**" if row[i] == best[name] else f"{row[i]:.3f}" for name, row in losses.items()]
        lines.append(f"| 2^{int(math.log2(rate))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    measured = table()
    print(markdown(measured))
    print("factors of 2 by which the best rate falls:", shifts(measured))
