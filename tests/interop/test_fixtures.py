"""Models of transformers, read from committed files: the same logits and the same greedy tokens as transformers computed."""

import numpy as np
import pytest

from tests.interop.cases import CASES
from tests.interop.conftest import FIXTURES, load, logits

SHORT, PROMPT = 300, 8  # as make_fixtures.py has them
KEPT = slice(15, None, 16)


def same_as_theirs(folder, expected) -> None:
    """Logits within 1e-4 on rows of 512 and 300 tokens; after each greedy token the next one is the most probable."""
    model, params, _ = load(folder)
    greedy = np.pad(expected["greedy"], (0, 512 - len(expected["greedy"])))
    tokens_BT = np.concatenate([expected["tokens"], greedy[None]])
    ours = logits(model, params, tokens_BT, [512, SHORT, len(expected["greedy"])])
    kept = ours[:2, KEPT]
    places = np.arange(512)[KEPT]
    np.testing.assert_allclose(kept[0], expected["logits"][0], atol=1e-4, rtol=0)
    np.testing.assert_allclose(kept[1, places < SHORT], expected["logits"][1, places < SHORT], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(ours[2, PROMPT - 1 : len(expected["greedy"]) - 1].argmax(-1), expected["greedy"][PROMPT:])


@pytest.mark.parametrize("name", CASES)
def test_a_model_of_transformers_computes_the_same_here(name):
    assert np.abs(np.load(FIXTURES / name / "expected.npz")["logits"]).max() > 1  # the comparison is of something
    same_as_theirs(FIXTURES / name, np.load(FIXTURES / name / "expected.npz"))
