"""Every filter keeps exactly the tokens that its definition names, and draws follow the probabilities that are left.

B rows, V vocabulary
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from gpt4o_jax.sampling.logits import Sampling, choose, filter_logits

V = 11


def probabilities(logits, s: Sampling):
    """By the definition of each filter, on a list of tokens from the most probable one on, in float64."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / s.temperature)
    tokens = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: s.top_k or None]
    share = {i: weights[i] / sum(weights[j] for j in tokens) for i in tokens}
    nucleus = next(n for n in range(1, len(tokens) + 1) if sum(share[i] for i in tokens[:n]) >= s.top_p or n == len(tokens))
    if s.top_p < 1:
        tokens = tokens[:nucleus]
    tokens = [i for i in tokens if share[i] >= s.min_p * share[tokens[0]]]
    left = np.zeros(len(logits))
    left[tokens] = weights[tokens]
    return left / left.sum()


@functools.lru_cache
def rows():
    """Random logits, steep and flat ones, and some tokens excluded beforehand."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(12, V)) * np.array([0.3, 1, 3] * 4)[:, None]
    logits[-3:, ::3] = -np.inf
    return logits.astype(np.float32)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_filters_and_all_their_combinations_equal_their_definitions(temperature):
    for filters in itertools.product([0, 1, 4, 50], [1.0, 0.8, 0.3, 0.0], [0.0, 0.1, 1.0]):
        s = Sampling(temperature, *filters)
        got = np.asarray(jax.nn.softmax(filter_logits(jnp.asarray(rows()), s)))
        wanted = np.stack([probabilities(row, s) for row in rows()])
        np.testing.assert_array_equal(got > 0, wanted > 0, err_msg=str(s))
        np.testing.assert_allclose(got, wanted, atol=2e-6, err_msg=str(s))


def test_nothing_to_filter_leaves_every_token():
    np.testing.assert_array_equal(filter_logits(jnp.asarray(rows()), Sampling()), rows())


@pytest.mark.parametrize(
    "s", [Sampling(), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.7), Sampling(min_p=0.2), Sampling(0.9, 8, 0.9, 0.05)], ids=str
)
def test_draws_follow_the_distribution(s):
    """Chi-square over 100,000 draws; what a filter excludes is never drawn."""
    draws, row = 100_000, rows()[1]
    keys = jax.random.split(jax.random.key(7), draws)
    tokens = jax.jit(lambda k: choose(jnp.broadcast_to(jnp.asarray(row), (draws, V)), k, s))(keys)
    assert tokens.dtype == jnp.int32
    seen, expected = np.bincount(tokens, minlength=V), probabilities(row, s) * draws
    assert not seen[expected == 0].any()
    possible = expected > 0
    assert scipy.stats.chisquare(seen[possible], expected[possible] / expected.sum() * draws).pvalue > 1e-4


def test_greedy_takes_the_first_of_the_best_and_no_key_matters():
    logits = jnp.array([[0.0, 2.0, 2.0, 1.0], [-jnp.inf, -1.0, -3.0, -1.0], [5.0, 5.0, 5.0, 5.0]])
    for seed in range(3):
        keys = jax.random.split(jax.random.key(seed), 3)
        assert choose(logits, keys, Sampling(temperature=0.0)).tolist() == [1, 1, 0]


def test_ties_go_to_the_lower_id():
    logits = jnp.array([[1.0, 3.0, 1.0, 3.0, 1.0]])
    kept = lambda s: np.flatnonzero(np.isfinite(filter_logits(logits, s)[0])).tolist()
    assert kept(Sampling(top_k=1)) == [1]
    assert kept(Sampling(top_k=2)) == [1, 3]
    assert kept(Sampling(top_k=3)) == [0, 1, 3]
    assert kept(Sampling(top_p=0.2)) == [1]
    assert kept(Sampling(min_p=1.0)) == [1, 3]


def test_rows_are_independent_and_follow_their_own_keys():
    logits = jnp.zeros((4, V))
    keys = jax.random.split(jax.random.key(0), 4)
    together = choose(logits, keys, Sampling())
    alone = [choose(logits[i : i + 1], keys[i : i + 1], Sampling())[0] for i in range(4)]
    assert together.tolist() == [int(t) for t in alone]
    assert len({tuple(choose(logits, jax.random.split(jax.random.key(s), 4), Sampling()).tolist()) for s in range(8)}) > 1
