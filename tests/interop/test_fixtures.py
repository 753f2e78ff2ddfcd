"""Models of transformers, read from committed files, give the logits and greedy tokens that transformers computed."""

import jax
import numpy as np
import pytest

from gpt4o_jax import parallel
from gpt4o_jax.data.tokenizer import Symbols
from gpt4o_jax.sampling.generate import generate
from gpt4o_jax.sampling.logits import Sampling
from tests.interop.cases import CASES
from tests.interop.conftest import FIXTURES, load, logits

SHORT, PROMPT = 300, 8  # as in make_fixtures.py
KEPT = slice(15, None, 16)
ANY = Symbols(eos=(), control=frozenset())  # tokens of random models mean nothing: none ends a row, none is excluded


def same_as_theirs(folder, expected) -> None:
    """Logits agree within 1e-4 on rows of 512 and 300 tokens; generation through the cache gives the same greedy tokens, with the
    probabilities of one full pass."""
    model, params, _ = load(folder)
    length = len(expected["greedy"])
    greedy = np.pad(expected["greedy"], (0, 512 - length))
    tokens_BT = np.concatenate([expected["tokens"], greedy[None]])
    ours = logits(model, params, tokens_BT, [512, SHORT, length])
    kept = ours[:2, KEPT]
    places = np.arange(512)[KEPT]
    np.testing.assert_allclose(kept[0], expected["logits"][0], atol=1e-4, rtol=0)
    np.testing.assert_allclose(kept[1, places < SHORT], expected["logits"][1, places < SHORT], atol=1e-4, rtol=0)
    prompt, written = np.split(expected["greedy"], [PROMPT])
    with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
        (c,) = generate(model, params, [prompt.tolist()], len(written), Sampling(0.0), symbols=ANY)
    assert c.ids == written.tolist()
    full = jax.nn.log_softmax(ours[2, PROMPT - 1 : length - 1])[np.arange(len(written)), written]
    np.testing.assert_allclose(c.logprobs, full, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_a_model_of_transformers_computes_the_same_here(name):
    assert np.abs(np.load(FIXTURES / name / "expected.npz")["logits"]).max() > 1  # the comparison is not trivial
    same_as_theirs(FIXTURES / name, np.load(FIXTURES / name / "expected.npz"))
