"""Number words are those of num2words, except for its two known mistakes before tausend and mil."""

import random
import re

import pytest
from num2words import num2words

from gpt4o_jax.tasks.worlds.numbers import WORDS

DRAWN = random.Random(0)
NUMBERS = [
    *range(1100),
    *range(1000, 10**6, 7000),
    *(1000 * k for k in range(1, 130)),
    *(DRAWN.randrange(10**6) for _ in range(1000)),
    999_999,
]


def reference(n, language):
    words = num2words(n, lang=language)
    if language == "de":  # num2words 0.5.14: einhunderteinstausend, though 1000 is eintausend
        return words.replace("einstausend", "eintausend")
    if language == "es":  # uno loses its o before a noun or mil; compare num2words' own mil uno and un millón
        return re.sub(r"\buno mil\b", "un mil", words.replace("veintiuno mil", "veintiún mil"))
    return words


@pytest.mark.parametrize("language", WORDS)
def test_words_are_those_of_num2words(language):
    assert [(n, WORDS[language](n)) for n in NUMBERS] == [(n, reference(n, language)) for n in NUMBERS]


@pytest.mark.parametrize("language", WORDS)
def test_every_number_has_words_of_its_own(language):
    assert len({WORDS[language](n) for n in range(100_000)}) == 100_000
