"""Learning-rate schedules: nanoGPT's cosine, warm-up-stable-decay, inverse root, constant; they end as configured."""

import math

import numpy as np
import pytest

from gpt4o_jax.config import OptimizerConfig
from gpt4o_jax.training.schedules import schedule_factor

TOTAL = 50


def curve(total=TOTAL, **knobs):
    return np.asarray(schedule_factor(OptimizerConfig(**knobs), total, np.arange(total + 1)))


def nanogpt(it, warmup_iters, lr_decay_iters, min_lr, learning_rate=1.0):
    """get_lr of nanoGPT's train.py."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * decay_ratio)) * (learning_rate - min_lr)


@pytest.mark.parametrize("warmup", [0, 1, 10, 49])
@pytest.mark.parametrize("end", [0.0, 0.1, 1.0])
def test_cosine_is_nanogpts(warmup, end):
    wanted = [nanogpt(s, warmup, TOTAL, end) for s in range(TOTAL + 1)]
    np.testing.assert_allclose(curve(schedule="cosine", warmup_steps=warmup, end_lr_fraction=end), wanted, atol=1e-6)


@pytest.mark.parametrize("end", [0.0, 0.25])
def test_wsd_is_flat_then_falls_on_a_line(end):
    got = curve(schedule="wsd", warmup_steps=5, decay_fraction=0.4, end_lr_fraction=end)
    np.testing.assert_allclose(got[:5], np.arange(1, 6) / 6, rtol=1e-6)
    np.testing.assert_array_equal(got[5:31], 1.0)
    np.testing.assert_allclose(got[30:], np.linspace(1, end, 21), atol=1e-6)


def test_a_decay_that_begins_in_the_warm_up_meets_it():
    got = curve(schedule="wsd", warmup_steps=40, decay_fraction=0.9, end_lr_fraction=0.0)
    assert np.max(np.abs(np.diff(got))) < 0.03 and 0.5 < got.max() < 0.6 and got[-1] == 0


def test_constant_stays():
    np.testing.assert_allclose(curve(schedule="constant", warmup_steps=3), [0.25, 0.5, 0.75] + [1.0] * 48, rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 1, 10, 49, 100])
def test_inverse_sqrt_is_the_transformers(warmup):
    """min(step^-0.5, step * warmup^-1.5) of arXiv:1706.03762, 5.3, as a share of its peak; steps count from 1 there."""
    W = warmup + 1
    wanted = [min(s**-0.5, s * W**-1.5) / W**-0.5 for s in range(1, TOTAL + 2)]
    np.testing.assert_allclose(curve(schedule="inverse_sqrt", warmup_steps=warmup), wanted, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "inverse_sqrt", "constant"])
@pytest.mark.parametrize("total, warmup", [(1, 0), (1, 1), (1, 100), (20, 100), (20, 20)])
def test_short_runs_stay_within_zero_and_the_peak(schedule, total, warmup):
    """Even if the warm-up is longer than the run."""
    got = curve(total, schedule=schedule, warmup_steps=warmup, end_lr_fraction=0.0)
    assert np.all(np.isfinite(got)) and np.all(got >= 0) and np.all(got <= 1)
    decay = round(0.2 * total) if schedule == "wsd" else 0  # may begin within the warm-up
    assert got[0] > 0 and np.all(np.diff(got[: min(warmup, total - decay)]) > 0)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_end_fraction_is_reached_one_step_after_the_last(schedule):
    np.testing.assert_allclose(curve(schedule=schedule, warmup_steps=10, end_lr_fraction=0.1)[-1], 0.1, rtol=1e-5)
