"""Writing to order: an English sentence of a given kind that holds given words, whichever way.

The words are a person, a verb, an adjective and a thing, the kind a statement, a question, a wish, a denial. Every sentence of
the grammar that fits is right (dozens), so that exact match is over all of them and a program can tell. Held out as
sentences.py does. No bar of its own.
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
    """All of that form over the words of a clause, whatever the determiners and numbers."""
    subjects = _phrases(model.subject.noun, None)
    objects = [
        p for p in _phrases(model.object.noun, model.object.adjective) if form != "negated" or p.determiner in ("the", "my")
    ]
    return [english(Clause(form, s, model.verb, o, model.time)) for s, o in itertools.product(subjects, objects)]


def _phrases(noun: Word, adjective: Word | None) -> list[Phrase]:
    pairs = itertools.product(DETERMINERS, (False, True))
    return [Phrase(noun, d, plural, adjective) for d, plural in pairs if (d, plural) not in (("a", True), ("two", False))]


WRITING = World("writing", _item, tuple(_FORMS), ("exact_match",))
