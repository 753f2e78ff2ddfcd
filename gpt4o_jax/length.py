"""How much a run reads: the rows of each step, the rows and tokens before it, the total number of steps.

The batch may grow (`train.batch_warmup_steps`): step s computes n(s) of its A = train.accumulate micro-batches of b rows, n
rising linearly from train.batch_warmup_start to A. Rows are numbered through the run without gaps, so that no text is skipped
while the batch is small.
"""

import math

from gpt4o_jax.config import RunConfig, TrainConfig
from gpt4o_jax.config_rules import parse_length, validate_steps


def micro_batches(t: TrainConfig, step):
    """Number of micro-batches in 0-based `step`, an int or an int32 array."""
    return t.accumulate - sum((step < joins) * 1 for joins in _joins(t))


def rows_before(t: TrainConfig, step: int) -> int:
    """Number of rows that steps 0 to step - 1 read."""
    return t.batch_size // t.accumulate * (t.accumulate * step - sum(min(step, joins) for joins in _joins(t)))


def tokens_before(config: RunConfig, step: int) -> int:
    """Number of tokens that steps 0 to step - 1 read."""
    return rows_before(config.train, step) * config.model.context_length


def row_numbers(t: TrainConfig, step: int) -> list[int | None]:
    """For each of a step's batch_size places, the number of its row in the run; None: empty.

    Place p belongs to micro-batch p % accumulate (training/step.py).
    """
    A, n, first = t.accumulate, micro_batches(t, step), rows_before(t, step)
    return [first + p // A * n + p % A if p % A < n else None for p in range(t.batch_size)]


def in_epochs(config: RunConfig) -> bool:
    """Whether train.length depends on the amount of text."""
    return parse_length(config.train.length)[1] == "epochs"


def total_steps(config: RunConfig, tokens_per_epoch: int) -> int:
    """Optimizer steps of the whole run: train.length, rounded up to whole dispatches. Raises RunError beyond int32."""
    number, unit = parse_length(config.train.length)
    if unit == "steps":
        steps = number
    else:
        tokens = number * (tokens_per_epoch if unit == "epochs" else 1)
        validate_steps(config.train.length, tokens / config.model.context_length / config.train.batch_size)
        rows = math.ceil(tokens / config.model.context_length)
        # From step `whole` on, every step reads batch_size rows; before it, search.
        whole = max(_joins(config.train), default=0)
        left = rows - rows_before(config.train, whole)
        steps = whole + math.ceil(left / config.train.batch_size)
        if left < 0:
            steps = next(s for s in range(whole + 1) if rows_before(config.train, s) >= rows)
    k = config.train.steps_per_dispatch
    steps = math.ceil(steps / k) * k
    validate_steps(config.train.length, steps)
    return steps


def _joins(t: TrainConfig) -> list[int]:
    """For each micro-batch that does not take part from the start, the first step in which it does."""
    if not t.batch_warmup_steps:
        return []
    later = t.accumulate - t.batch_warmup_start
    return [-(-t.batch_warmup_steps * j // later) for j in range(1, later + 1)]
