"""A draft changes the speed of text, never its content: the same tokens if only the model draws, else its distribution.

B rows, k drafted tokens, j = k + 1 tokens per round, V vocabulary
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from gpt4o_jax import parallel
from gpt4o_jax.config import ModelConfig
from gpt4o_jax.data.tokenizer import BOS, EOS, RESERVED
from gpt4o_jax.errors import RunError
from gpt4o_jax.model import gpt
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.sampling import speculative
from gpt4o_jax.sampling.generate import generate
from gpt4o_jax.sampling.logits import Sampling, at_positions
from gpt4o_jax.sampling.speculative import NGRAM, PROPOSE, Draft, _Drafter, accept, look_up

LIMIT = 64
BASE = dict(vocab_size=RESERVED + 10, context_length=LIMIT, n_heads=2, output_init="scaled", init_std=0.5, logit_softcap=3.0)
CPU = Compute("cpu", "float32")
MODEL = gpt.GPT(ModelConfig(**BASE, n_layers=2, d_model=16), CPU)
WINDOWS = gpt.GPT(ModelConfig(**BASE, n_layers=2, d_model=16, layer_pattern=("local", "global"), window=5), CPU)
OTHER = gpt.GPT(ModelConfig(**BASE, n_layers=1, d_model=8), CPU)
PROMPTS = [[BOS, 40], [BOS, 33, 35, 41, 36, 32, 37], [BOS], [BOS, *[34] * 20]]


@pytest.fixture(scope="module")
def weights():
    """Each model's own random parameters."""
    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        yield {m: jax.jit(functools.partial(gpt.init, m))(jax.random.key(i)) for i, m in enumerate((MODEL, WINDOWS, OTHER))}


# ---------------------------------------------------------------- judging, on chains of four states

P = np.array([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0.0, 0.5, 0.5, 0.0]])
CHAINS = {
    "the same": P,
    "near": 0.8 * P + 0.05,
    "unrelated": np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7], [0.9, 0.1, 0.0, 0.0], [0.97, 0.01, 0.01, 0.01]]),
    "always one token": np.eye(4)[[3, 0, 1, 2]],
    "mostly what cannot be": np.array([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.5]]),
}


@jax.jit
def three_tokens(logp_VV, logq_VV, keys_B):
    """The first three tokens of many rows after token 0, from three rounds of three judged drafts; and the share accepted."""
    k, B = 3, len(keys_B)
    rows_B1, j = jnp.arange(B)[:, None], jnp.arange(k + 1)
    text, at_B, accepted = jnp.zeros((B, 16), jnp.int32), jnp.zeros(B, jnp.int32), 0
    for _ in range(3):
        tokens = [text[jnp.arange(B), at_B]]
        for i in range(k):
            keys = jax.vmap(jax.random.fold_in, (0, None))(at_positions(keys_B, at_B + i + 1), PROPOSE)
            tokens.append(jax.vmap(jax.random.categorical)(keys, logq_VV[tokens[-1]]))
        inputs_Bj = jnp.stack(tokens, axis=1)
        judges = jax.vmap(at_positions, (None, 1), 1)(keys_B, at_B[:, None] + 1 + j)
        out_Bj, n_B = accept(logp_VV[inputs_Bj], logq_VV[inputs_Bj[:, :k]], inputs_Bj[:, 1:], judges)
        places_Bj = jnp.where(j <= n_B[:, None], at_B[:, None] + 1 + j, 16)
        text = text.at[rows_B1, places_Bj].set(out_Bj, mode="drop")
        at_B, accepted = at_B + n_B + 1, accepted + jnp.mean(n_B) / 9
    return text[:, 1:4], accepted


@pytest.mark.parametrize("name", CHAINS)
def test_judged_drafts_follow_the_model(name):
    """Joint chi-square of three tokens over 100,000 rows; rounds end anywhere between them."""
    draws = 100_000
    with np.errstate(divide="ignore"):
        text, accepted = three_tokens(np.log(P), np.log(CHAINS[name]), jax.random.split(jax.random.key(3), draws))
    seen = np.bincount(np.ravel_multi_index(np.asarray(text).T, (4, 4, 4)), minlength=64)
    expected = (P[0][:, None, None] * P[:, :, None] * P[None]).ravel() * draws
    possible = expected > 0
    assert not seen[~possible].any()
    assert scipy.stats.chisquare(seen[possible], expected[possible]).pvalue > 1e-4
    assert (accepted > 0.999) == (name == "the same")


@pytest.mark.parametrize("wrong", range(4))
def test_a_draft_that_is_wrong_at_one_place_is_kept_up_to_there(wrong):
    """Three drafts from the chain, one replaced by an impossible token (3: none is wrong); then follows a draw of the chain."""
    k, draws, never = 3, 20_000, 4
    chain = np.pad(P, ((0, 1), (0, 1)))
    chain[never] = chain[0]
    with np.errstate(divide="ignore"):
        logp_VV, only_V = jnp.log(chain), jnp.log(np.eye(5)[never])

    @jax.jit
    def judged(keys_B):
        tokens, logq = [jnp.zeros(draws, jnp.int32)], []
        for i in range(k):
            logq.append(jnp.broadcast_to(only_V, (draws, 5)) if i == wrong else logp_VV[tokens[-1]])
            keys = jax.vmap(jax.random.fold_in, (0, None))(at_positions(keys_B, jnp.full(draws, i + 1)), PROPOSE)
            tokens.append(jax.vmap(jax.random.categorical)(keys, logq[-1]))
        inputs_Bj = jnp.stack(tokens, axis=1)
        judges = jax.vmap(at_positions, (None, 1), 1)(keys_B, jnp.broadcast_to(1 + jnp.arange(k + 1), (draws, k + 1)))
        return inputs_Bj, *accept(logp_VV[inputs_Bj], jnp.stack(logq, axis=1), inputs_Bj[:, 1:], judges)

    inputs_Bj, out_Bj, accepted_B = map(np.asarray, judged(jax.random.split(jax.random.key(5), draws)))
    assert (accepted_B == wrong).all()
    np.testing.assert_array_equal(out_Bj[:, :wrong], inputs_Bj[:, 1 : wrong + 1])
    seen = np.zeros((4, 4))
    np.add.at(seen, (inputs_Bj[:, wrong], out_Bj[:, wrong]), 1)
    expected = seen.sum(1, keepdims=True) * P
    assert not seen[expected == 0].any()
    counted = expected > 0
    assert scipy.stats.chisquare(seen[counted], expected[counted]).pvalue > 1e-4


# ---------------------------------------------------------------- looking up


def test_look_up_takes_the_latest_of_the_longest_matches():
    random, k, S = np.random.default_rng(0), 5, 24
    text, last = random.integers(0, 3, (200, S)), random.integers(0, S, 200)
    got = np.asarray(jax.jit(look_up, static_argnums=2)(text, last, k))
    for row, n, drafts in zip(text.tolist(), last, got.tolist(), strict=True):
        matches = [
            (m, e) for m in range(1, NGRAM + 1) for e in range(m - 1, n) if row[e - m + 1 : e + 1] == row[n - m + 1 : n + 1]
        ]
        if n + 1 < NGRAM or not matches:
            continue
        end = max(matches)[1]
        wanted = row[end + 1 : n + 1]
        assert drafts == (wanted * k)[:k]


# ---------------------------------------------------------------- whole texts

DRAFTS = {"look-up": (4, None), "the model itself": (4, MODEL), "another model": (3, OTHER)}
PENALISED = dict(repetition_penalty=1.3, frequency_penalty=0.4, logit_bias=((36, 0.5),), top_logprobs=2)


def draft(weights, name):
    tokens, model = DRAFTS[name]
    return Draft(tokens, model, weights.get(model))


@pytest.mark.parametrize(
    ("target", "s"),
    [(MODEL, Sampling(0.0, **PENALISED)), (WINDOWS, Sampling(0.0, logit_bias=((EOS, -100.0),)))],
    ids=["penalties", "windows"],
)
@pytest.mark.parametrize("name", DRAFTS)
def test_greedy_is_the_very_text(weights, target, s, name):
    """Rows accept different numbers of drafts and end at different places, some at the end of the context."""
    plain = generate(target, weights[target], PROMPTS, LIMIT, s)
    fast = generate(target, weights[target], PROMPTS, LIMIT, s, draft=draft(weights, name))
    assert [(c.ids, c.finished) for c in fast] == [(c.ids, c.finished) for c in plain]
    for c, wanted in zip(fast, plain, strict=True):
        np.testing.assert_allclose(c.logprobs, wanted.logprobs, rtol=1e-4, atol=1e-5)
        assert [[i for i, _ in top] for top in c.top] == [[i for i, _ in top] for top in wanted.top]
        assert wanted.passes == len(wanted.ids) + (wanted.finished == "eos") and c.passes <= wanted.passes
    if DRAFTS[name][1] == target:  # every draft is accepted: five tokens per pass after the first
        assert [c.passes for c in fast] == [1 + -(-(c.passes - 1) // 5) for c in plain]


def test_drawn_text_with_looked_up_drafts_is_the_very_text(weights):
    s = Sampling(0.7, top_k=6, top_p=0.95, **PENALISED)
    plain = generate(MODEL, weights[MODEL], PROMPTS, 40, s, 1, num_samples=5)
    fast = generate(MODEL, weights[MODEL], PROMPTS, 40, s, 1, num_samples=5, draft=Draft(4))
    assert [(c.ids, c.finished) for c in fast] == [(c.ids, c.finished) for c in plain]
    assert sum(c.passes for c in fast) < sum(c.passes for c in plain)


@pytest.mark.parametrize("target", [MODEL, WINDOWS], ids=["global", "windows"])
@pytest.mark.parametrize("s", [Sampling(0.0, **PENALISED), Sampling(0.8, top_k=8)], ids=["greedy", "drawn"])
def test_the_text_is_the_same_at_every_number_of_accepted_drafts(weights, monkeypatch, target, s):
    """Row i is drafted its own text except at place i of every round, so it keeps i of four drafts; the last row keeps all."""
    k = 4
    s = dataclasses.replace(s, logit_bias=((EOS, -100.0),))
    plain = generate(target, weights[target], PROMPTS[1:2], 50, s, 2, num_samples=k + 1)
    assert all(c.finished == "length" for c in plain)
    text = np.array([PROMPTS[1] + c.ids + [RESERVED] * k for c in plain])
    other = (text - RESERVED + 1) % 10 + RESERVED

    def propose(weights, memory, state, done_B):
        places_Bk = state.positions_B[:, None] + 1 + jnp.arange(k)
        take = lambda ids: jnp.take_along_axis(jnp.asarray(ids), places_Bk, axis=1)
        return memory, jnp.where(jnp.arange(k) == jnp.arange(k + 1)[:, None], take(other), take(text)), None

    scripted = _Drafter(lambda *_: (), propose, lambda memory, *_: memory)
    monkeypatch.setattr(speculative, "_look_up", lambda slots, k: scripted)
    speculative._functions.cache_clear()
    try:
        fast = generate(target, weights[target], PROMPTS[1:2], 50, s, 2, num_samples=k + 1, draft=Draft(k))
    finally:
        speculative._functions.cache_clear()  # drops what was compiled with the script
    assert [c.ids for c in fast] == [c.ids for c in plain]
    assert [c.passes for c in fast] == [1 + -(-49 // (accepted + 1)) for accepted in range(k + 1)]


def test_a_row_with_a_draft_depends_on_prompt_row_and_seed_only(weights):
    draw = lambda prompts, n: generate(MODEL, weights[MODEL], prompts, n, Sampling(), 5, draft=draft(weights, "another model"))
    first = draw(PROMPTS, 30)
    other = draw([PROMPTS[0], [BOS, 43 - 2], PROMPTS[2], [BOS, *[33] * 20]], 30)
    assert [c.ids for c in first[::2]] == [c.ids for c in other[::2]]
    assert [c.ids for c in draw(PROMPTS, 7)] == [c.ids[:7] for c in first]


@pytest.mark.parametrize("name", ["the model itself", "another model"])
def test_drawn_text_follows_the_models_distribution(weights, name):
    """Joint chi-square of the first three tokens, with filters and penalties, against full passes."""
    s, prompt, rows = Sampling(0.9, top_k=3, repetition_penalty=1.5, presence_penalty=0.4), PROMPTS[1], 6000

    @jax.jit
    def last(tokens):
        index = jnp.arange(tokens.shape[1])[None]
        hidden, _, _ = MODEL.apply({"params": weights[MODEL]}, tokens, index, jnp.ones_like(tokens))
        return gpt.unembed(MODEL, weights[MODEL], hidden)[0, -1]

    def after(new):
        """By the definitions, in float64."""
        logits = np.asarray(last(np.array([prompt + new])), np.float64)
        logits[[i for i in range(RESERVED) if i != EOS]] = -np.inf
        for i in set(prompt + new):
            logits[i] = logits[i] / 1.5 if logits[i] > 0 else logits[i] * 1.5
        for i in set(new):
            logits[i] -= 0.4
        best = np.argsort(-logits, kind="stable")[:3]
        share = np.exp(logits[best] / 0.9)
        return dict(zip(best.tolist(), share / share.sum(), strict=True))

    expected = {}
    for a, p in after([]).items():
        for b, q in after([a]).items() if a != EOS else [(None, 1.0)]:
            for c, r in after([a, b]).items() if b not in (EOS, None) else [(None, 1.0)]:
                text = tuple(i for i in (a, b, c) if i not in (EOS, None))
                expected[text] = expected.get(text, 0) + p * q * r * rows
    got = generate(MODEL, weights[MODEL], [prompt], 3, s, 11, num_samples=rows, draft=draft(weights, name))
    seen = {text: 0 for text in expected}
    for c in got:
        seen[tuple(c.ids)] += 1
    assert scipy.stats.chisquare(list(seen.values()), list(expected.values())).pvalue > 1e-4


def test_drafts_that_do_not_fit_are_refused(weights):
    short = gpt.GPT(ModelConfig(**BASE | dict(context_length=16), n_layers=1, d_model=8), CPU)
    wide = gpt.GPT(ModelConfig(**BASE | dict(vocab_size=50), n_layers=1, d_model=8), CPU)
    for model, message in [
        (short, "draft: its context_length is 16, but rows may grow to 41 tokens; nearest: 25 new tokens fewer"),
        (wide, "draft: it has 50 tokens, the model 42; expected the same tokenizer"),
    ]:
        with pytest.raises(RunError, match=re.escape(message)) as e:
            generate(MODEL, weights[MODEL], PROMPTS, 20, draft=Draft(4, model, None))
        assert e.value.code == 2
    for tokens in (0, 17):
        with pytest.raises(RunError, match=f"draft: tokens={tokens}: expected an integer from 1 to 16"):
            Draft(tokens)
