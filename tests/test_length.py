"""A growing batch skips no row, counts its tokens, and changes results only through its size."""

import dataclasses

import numpy as np
import pytest

from gpt4o_jax.config import ModelConfig, RunConfig, TrainConfig
from gpt4o_jax.data.batches import dispatches
from gpt4o_jax.length import micro_batches, row_numbers, rows_before, tokens_before, total_steps

GROWING = TrainConfig(batch_size=12, accumulate=6, batch_warmup_steps=20, batch_warmup_start=2)
WARMUPS = [
    GROWING,
    dataclasses.replace(GROWING, batch_warmup_start=5),
    dataclasses.replace(GROWING, batch_warmup_steps=1, batch_warmup_start=1),
    dataclasses.replace(GROWING, batch_warmup_steps=3, batch_warmup_start=1),  # more than one is added in a step
    TrainConfig(batch_size=12, accumulate=6),
]


@pytest.mark.parametrize("train", WARMUPS)
def test_the_batch_grows_in_a_line_from_its_first_to_its_full_size(train):
    got = [micro_batches(train, s) for s in range(40)]
    first, A, W = train.batch_warmup_start, train.accumulate, train.batch_warmup_steps
    assert got == [first + (A - first) * s // W if s < W else A for s in range(40)]


@pytest.mark.parametrize("train", WARMUPS)
def test_rows_are_read_without_gaps_and_counted(train):
    seen, n = [], train.accumulate
    for s in range(40):
        assert rows_before(train, s) == len(seen)
        places = row_numbers(train, s)
        assert len(places) == train.batch_size
        assert all((number is None) == (p % n >= micro_batches(train, s)) for p, number in enumerate(places))
        seen += [number for number in places if number is not None]
    assert seen == list(range(len(seen)))
    assert row_numbers(train, 10**9) == list(range(rows_before(train, 10**9), rows_before(train, 10**9) + 12))


@pytest.mark.parametrize("train", WARMUPS)
@pytest.mark.parametrize("steps", [1, 2, 7, 19, 20, 21, 39])
def test_a_length_in_tokens_is_the_first_step_that_reaches_it(train, steps):
    def config(length):
        return RunConfig(
            model=ModelConfig(context_length=8), train=dataclasses.replace(train, length=length, steps_per_dispatch=1)
        )

    tokens = tokens_before(config("1 steps"), steps)
    assert tokens == 8 * rows_before(train, steps)
    assert total_steps(config(f"{tokens} tokens"), 0) == steps
    assert total_steps(config(f"{tokens + 1} tokens"), 0) == steps + 1
    assert total_steps(config(f"{tokens - 7} tokens"), 0) == steps
    assert total_steps(config("2 epochs"), tokens / 2) == steps
    assert total_steps(config("33 steps"), 0) == 33


class Rows:
    T = 4

    def __getitem__(self, n):
        return np.full(5, n + 10, np.int32), np.ones(5, np.int32)


def test_places_of_absent_micro_batches_are_empty():
    stream = dispatches(Rows(), 0, 40, 2, 12, 3, lambda s: row_numbers(GROWING, s))
    for step, batch in stream:
        for s, tokens, weights, segments in zip(range(step - 2, step), batch.tokens, batch.weights, batch.segments, strict=True):
            for number, row, weight, segment in zip(row_numbers(GROWING, s), tokens, weights, segments, strict=True):
                assert (row == (0 if number is None else number + 10)).all()
                assert (weight == (number is not None)).all() and (segment == (number is not None)).all()
    resumed = next(dispatches(Rows(), 14, 40, 2, 12, 1, lambda s: row_numbers(GROWING, s)))[1]
    assert sorted(set(resumed.tokens[0, :, 0]) - {0})[0] == 10 + rows_before(GROWING, 14)
