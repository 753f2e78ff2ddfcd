"""Beam search equals exhaustive search if its beams hold everything, and its definition otherwise."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.config import ModelConfig
from gpt4o_jax.data.tokenizer import BOS, EOS, RESERVED
from gpt4o_jax.errors import RunError
from gpt4o_jax.model import gpt
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.sampling.beam import beam_search
from gpt4o_jax.sampling.generate import generate
from gpt4o_jax.sampling.logits import Sampling

TEXT = [RESERVED, RESERVED + 1, RESERVED + 2]
LIMIT, LONGEST = 12, 4
CONFIG = ModelConfig(
    vocab_size=RESERVED + 3, context_length=LIMIT, n_layers=2, d_model=16, n_heads=2, output_init="scaled",
    init_std=0.7, logit_softcap=3.0, layer_pattern=("local", "global"), window=3,
)  # fmt: skip
MODEL = gpt.GPT(CONFIG, Compute("cpu", "float32"))
PROMPTS = [[BOS, 33], [BOS, 34, 34, 32, 33, 32, 34, 33, 34]]  # there is room for three tokens after the second


@pytest.fixture(scope="module")
def params():
    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        yield jax.jit(functools.partial(gpt.init, MODEL))(jax.random.key(3))


@pytest.fixture(scope="module")
def steps(params):
    """For each prompt: (new tokens) -> {token: log-probability} of the next, by full passes over all texts."""

    @jax.jit
    def full(tokens):
        index = jnp.broadcast_to(jnp.arange(LIMIT), tokens.shape)
        hidden, _, _ = MODEL.apply({"params": params}, tokens, index, jnp.ones_like(tokens))
        return gpt.unembed(MODEL, params, hidden)

    def table(prompt):
        found = {}
        for n in range(LONGEST):
            texts = list(itertools.product(TEXT, repeat=n))
            rows = np.zeros((len(texts), LIMIT), np.int32)
            rows[:, : len(prompt)] = prompt
            rows[:, len(prompt) : len(prompt) + n] = np.array(texts)[:, : LIMIT - len(prompt)]
            for text, logits in zip(texts, np.asarray(full(rows), np.float64)[:, min(len(prompt) + n, LIMIT) - 1], strict=True):
                options = logits[[EOS, *TEXT]]
                found[text] = dict(zip([EOS, *TEXT], options - np.log(np.sum(np.exp(options))), strict=True))
        return found

    return [table(prompt) for prompt in PROMPTS]


def room(prompt):
    return min(LONGEST, LIMIT - len(prompt))


def reference(table, most, beams, n_best, penalty, ends=(EOS,)):
    """The definition, on lists. beams=None: all texts."""
    live, best = [(0.0, ())], []
    for _ in range(most):
        options = [(total + p, (*text, token)) for total, text in live for token, p in table[text].items()]
        options.sort(key=lambda option: -option[0])
        best += [option for option in options[:beams] if option[1][-1] in ends]
        live = [option for option in options if option[1][-1] not in ends][:beams]
    best += live
    best = [(total / len(text) ** penalty, total, text) for total, text in best]
    return sorted(best, key=lambda h: -h[0])[:n_best]


def check(found, wanted, ends=(EOS,)):
    assert len(found) == len(wanted)
    for h, (score, total, text) in zip(found, wanted, strict=True):
        ended = text[-1] in ends
        assert (h.ids, h.finished) == (list(text[: len(text) - ended]), {EOS: "eos"}.get(text[-1], "stop") if ended else "length")
        np.testing.assert_allclose([h.score, h.logprob], [score, total], rtol=1e-4)


PENALTIES = [0.0, 0.5, 1.0, 2.0, -1.0]


@pytest.mark.parametrize("n_best", [1, 12])
def test_wide_beams_equal_exhaustive_search(params, steps, n_best):
    endings = set()
    for penalty in PENALTIES:
        found = beam_search(MODEL, params, PROMPTS, LONGEST, 110, n_best, penalty)
        for hypotheses, prompt, table in zip(found, PROMPTS, steps, strict=True):
            check(hypotheses, reference(table, room(prompt), None, n_best, penalty))
            endings |= {(h.finished, len(h.ids)) for h in hypotheses}
    assert len(endings) > 2


@pytest.mark.parametrize(("beams", "n_best"), [(1, 1), (2, 1), (3, 3)])
def test_narrow_beams_equal_the_definition(params, steps, beams, n_best):
    for penalty in PENALTIES:
        found = beam_search(MODEL, params, PROMPTS, LONGEST, beams, n_best, penalty)
        for hypotheses, prompt, table in zip(found, PROMPTS, steps, strict=True):
            check(hypotheses, reference(table, room(prompt), beams, n_best, penalty))


def test_stop_ids_end_a_hypothesis(params, steps):
    stop, ends = TEXT[1], (EOS, TEXT[1])
    found = beam_search(MODEL, params, PROMPTS, LONGEST, 110, 5, 0.7, [stop])
    for hypotheses, prompt, table in zip(found, PROMPTS, steps, strict=True):
        check(hypotheses, reference(table, room(prompt), None, 5, 0.7, ends), ends)


def test_one_beam_that_cannot_end_is_greedy(params):
    greedy = generate(MODEL, params, PROMPTS, LONGEST, Sampling(0.0, logit_bias=((EOS, -100.0),)))
    found = beam_search(MODEL, params, PROMPTS, LONGEST, 1, 1, 10.0)  # the longest hypothesis wins
    for (h,), c in zip(found, greedy, strict=True):
        assert h.finished == "eos" or h.ids == c.ids


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(beams=2, n_best=3), "n_best=3: expected an integer from 1 to beams=2"),
        (dict(beams=0), "n_best=1: expected an integer from 1 to beams=0"),
        (dict(beams=2, length_penalty=11.0), "length_penalty=11.0: expected a number from -10 to 10"),
        (dict(beams=2, stop_ids=[99]), "stop_ids token 99 does not exist"),
    ],
)
def test_numbers_out_of_range_are_refused(params, settings, message):
    with pytest.raises(RunError, match=message) as e:
        beam_search(MODEL, params, PROMPTS, LONGEST, **settings)
    assert e.value.code == 2
