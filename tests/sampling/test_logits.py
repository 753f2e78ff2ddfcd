"""Every filter keeps exactly the tokens of its definition, and draws follow the remaining probabilities.

B rows, V vocabulary
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from gpt4o_jax.errors import RunError
from gpt4o_jax.sampling.logits import (
    Sampling,
    also_seen,
    choose,
    filter_logits,
    log_distribution,
    penalise,
    seen_in_prompt,
    told,
)  # fmt: skip

V = 11


def probabilities(logits, s: Sampling):
    """By the definition of each filter, on a list of tokens from most to least probable, in float64."""
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
    """Random logits, steep and flat, with some tokens excluded beforehand."""
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


PROMPT = np.array([2, 5, 5, 9])
TEXT = np.array([5, 0, 0, 0, 7])
PENALTIES = dict(repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=-0.3, logit_bias=((3, 1.5), (0, -0.7)))


def penalised(logits, s: Sampling):
    """Token by token, by OpenAI's and CTRL's formulas, in float64."""
    bias = dict(s.logit_bias)
    out = np.array([x + bias.get(i, 0) for i, x in enumerate(logits.astype(np.float64))])
    for i in range(len(out)):
        count = TEXT.tolist().count(i)
        if count or i in PROMPT:
            out[i] = out[i] / s.repetition_penalty if out[i] > 0 else out[i] * s.repetition_penalty
        out[i] -= count * s.frequency_penalty + (count > 0) * s.presence_penalty
    return out


def seen(n):
    """The tokens seen by n rows of PROMPT and TEXT; the prompt is padded with a token that does not count."""
    tokens, valid = np.append(PROMPT, [1, 1]), np.arange(6) < 4
    state = seen_in_prompt(jnp.tile(tokens, (n, 1)), jnp.tile(valid, (n, 1)), V)
    for token in TEXT:
        state = also_seen(state, jnp.full(n, token))
    return state


def test_penalties_and_biases_equal_their_formulas():
    """Each alone and all together. Repetition counts prompt and text, the others only the text."""
    state = seen(12)
    np.testing.assert_array_equal(state.prompt_BV[3], np.isin(np.arange(V), PROMPT))
    np.testing.assert_array_equal(state.generated_BV[7], np.bincount(TEXT, minlength=V))
    for settings in [*({name: value} for name, value in PENALTIES.items()), PENALTIES, dict(repetition_penalty=0.5)]:
        s = Sampling(**settings)
        wanted = np.stack([penalised(row, s) for row in rows()])
        np.testing.assert_allclose(penalise(jnp.asarray(rows()), s, state), wanted, rtol=1e-5, atol=1e-6, err_msg=str(s))
        greedy = choose(
            jnp.asarray(rows()), jax.random.split(jax.random.key(0), 12), dataclasses.replace(s, temperature=0.0), state
        )
        assert greedy.tolist() == np.argmax(wanted, axis=-1).tolist()


DRAWN = [
    Sampling(), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.7), Sampling(min_p=0.2), Sampling(0.9, 8, 0.9, 0.05),
    *(Sampling(**{name: value}) for name, value in PENALTIES.items()), Sampling(**PENALTIES),
    Sampling(0.8, 7, 0.9, 0.1, **PENALTIES),
]  # fmt: skip


@pytest.mark.parametrize("s", DRAWN, ids=range(len(DRAWN)))
def test_draws_follow_the_distribution(s):
    """Chi-square over 100,000 draws; what a filter excludes is never drawn."""
    draws, row = 100_000, rows()[1]
    keys = jax.random.split(jax.random.key(7), draws)
    same = lambda x: jnp.broadcast_to(x, (draws, V))
    tokens = jax.jit(lambda k, one: choose(same(jnp.asarray(row)), k, s, jax.tree.map(same, one)))(keys, seen(1))
    assert tokens.dtype == jnp.int32
    wanted = probabilities(penalised(row, s), s)
    np.testing.assert_allclose(np.exp(log_distribution(jnp.asarray(row[None]), s, seen(1))[0]), wanted, atol=2e-6)
    counted, expected = np.bincount(tokens, minlength=V), wanted * draws
    assert not counted[expected == 0].any()
    possible = expected > 0
    assert scipy.stats.chisquare(counted[possible], expected[possible] / expected.sum() * draws).pvalue > 1e-4


def test_told_log_probabilities_are_the_models_own():
    """Whatever the penalties; top tokens are sorted best first, for any number of leading axes."""
    logits = jnp.asarray(rows()[:8]).reshape(2, 4, V)
    tokens = jnp.arange(8).reshape(2, 4)
    out = told(logits, tokens, Sampling(0.3, **PENALTIES, top_logprobs=3))
    exact = scipy.special.log_softmax(rows()[:8].astype(np.float64), axis=-1)
    np.testing.assert_allclose(out.logprob_B.reshape(8), exact[np.arange(8), np.arange(8)], rtol=1e-5)
    order = np.argsort(-exact, axis=-1)[:, :3]
    np.testing.assert_array_equal(out.top_BN.reshape(8, 3), order)
    np.testing.assert_allclose(out.top_logprob_BN.reshape(8, 3), np.take_along_axis(exact, order, -1), rtol=1e-5)


BAD = [
    (dict(temperature=-0.1), "temperature=-0.1: expected a number from 0.0 to 100.0"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(temperature=True), "temperature=True: expected a number"),
    (dict(top_k=-1), "top_k=-1: expected an integer at least 0"),
    (dict(top_k=2.5), "top_k=2.5: expected an integer"),
    (dict(top_p=1.5), "top_p=1.5: expected a number from 0.0 to 1.0"),
    (dict(min_p=-1), "min_p=-1"),
    (dict(repetition_penalty=0.0), "repetition_penalty=0.0: expected a number from 0.01 to 100.0"),
    (dict(presence_penalty=2.1), "presence_penalty=2.1: expected a number from -2.0 to 2.0"),
    (dict(frequency_penalty=-3.0), "frequency_penalty=-3.0"),
    (dict(top_logprobs=21), "top_logprobs=21: expected an integer from 0 to 20"),
    (dict(logit_bias=((4, 101.0),)), "logit_bias of token 4=101.0: expected a number from -100.0 to 100.0"),
    (dict(logit_bias=((4, 1.0), (4, 2.0))), "logit_bias names token 4 twice"),
    (dict(stop_ids=(-1,)), "stop_ids token=-1: expected an integer at least 0"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_values_out_of_range_are_named(settings, message):
    with pytest.raises(RunError, match=re.escape(f"sampling: {message}")) as e:
        Sampling(**settings)
    assert e.value.code == 2


def test_greedy_takes_the_first_of_the_best_and_no_key_matters():
    logits = jnp.array([[0.0, 2.0, 2.0, 1.0], [-jnp.inf, -1.0, -3.0, -1.0], [5.0, 5.0, 5.0, 5.0]])
    for seed in range(3):
        keys = jax.random.split(jax.random.key(seed), 3)
        assert choose(logits, keys, Sampling(temperature=0.0)).tolist() == [1, 1, 0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 5e-324])
@pytest.mark.parametrize("filters", [{}, {"top_k": 4, "top_p": 0.9, "min_p": 0.1}])
def test_a_temperature_near_0_draws_the_best(temperature, filters):
    """If several are best, it draws among them."""
    s = Sampling(temperature, **filters)
    logits = jnp.asarray([[-30.0, 700.0, 650.0, -jnp.inf], [-30.0, -700.0, -30.0, -jnp.inf]])
    np.testing.assert_allclose(np.exp(log_distribution(logits, s)), [[0, 1, 0, 0], [0.5, 0, 0.5, 0]])
    drawn = {tuple(choose(logits, jax.random.split(jax.random.key(seed), 2), s).tolist()) for seed in range(20)}
    assert drawn == {(1, 0), (1, 2)}


def test_more_than_all_tokens_may_be_kept():
    """Of any size: this one does not fit into int32."""
    got, wanted = (filter_logits(jnp.asarray(rows()), Sampling(top_k=k)) for k in (10**12, V))
    np.testing.assert_array_equal(got, wanted)


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
