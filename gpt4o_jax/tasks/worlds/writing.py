"""Constrained writing: an English sentence of a given kind that contains given words.

The words are a person, a verb, an adjective and a thing; the kind is a statement, question, wish or denial. Every fitting
sentence of the grammar is right (there are dozens), and exact match compares with all of them. Held out as in sentences.py.
No target of its own.
"""

import itertools

from gpt4o_jax.tasks.item import Item, exchange
from gpt4o_jax.tasks.worlds.grammar import DETERMINERS, Clause, Phrase, english
from gpt4o_jax.tasks.worlds.lexicon import Word
from gpt4o_jax.tasks.worlds.sentences import clause
from gpt4o_jax.tasks.worlds.world import World, generator

_FORMS = {"statement": "plain", "question": "question", "wish": "wish", "denial": "negated"}


def _item(seed: int, index: int, held_out: bool) -> Item:
    rng = generator("writing", seed, index, held_out)
    wanted = list(_FORMS)[index % len(_FORMS)]
    model = clause(rng, held_out)
    fitting = sentences(_FORMS[wanted], model)
    words = [model.subject.noun.name, model.verb.forms["en"][1], model.object.adjective.name, model.object.noun.name]
    rng.shuffle(fitting)
    return exchange(f"Write a {wanted} with these words: {', '.join(words)}", tuple(fitting), wanted)


def sentences(form: str, model: Clause) -> list[str]:
    """All sentences of that form with the words of a clause, over all determiners and numbers."""
    subjects = _phrases(model.subject.noun, None)
    objects = [
        p for p in _phrases(model.object.noun, model.object.adjective) if form != "negated" or p.determiner in ("the", "my")
    ]
    return [english(Clause(form, s, model.verb, o, model.time)) for s, o in itertools.product(subjects, objects)]


def _phrases(noun: Word, adjective: Word | None) -> list[Phrase]:
    pairs = itertools.product(DETERMINERS, (False, True))
    return [Phrase(noun, d, plural, adjective) for d, plural in pairs if (d, plural) not in (("a", True), ("two", False))]


WRITING = World("writing", _item, tuple(_FORMS), ("exact_match",))
