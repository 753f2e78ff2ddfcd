"""Sentences translated between English and German, French or Spanish: gender, case, agreement, word order.

Subject, verb, object, in seven forms: plain, after a time adverb, negated, wish, perfect, question, "I know that". Held out: a
tenth of all triples of verb, adjective and object, by hash: these three never occur together in training. Target: BLEU of at
least 90 in each of the six directions.
"""

import random

from gpt4o_jax.tasks.item import Item, ask_to_translate, exchange
from gpt4o_jax.tasks.worlds import lexicon
from gpt4o_jax.tasks.worlds.grammar import DETERMINERS, FORMS, SAY, Clause, Phrase
from gpt4o_jax.tasks.worlds.lexicon import Word
from gpt4o_jax.tasks.worlds.world import World, draw, generator

_SLICES = ("en-de", "de-en", "en-fr", "fr-en", "en-es", "es-en")


def _item(seed: int, index: int, held_out: bool) -> Item:
    rng = generator("sentences", seed, index, held_out)
    direction = _SLICES[index % len(_SLICES)]
    source, target = direction.split("-")
    said = clause(rng, held_out)
    return exchange(ask_to_translate(SAY[source](said), target), (SAY[target](said),), direction)


def clause(rng: random.Random, held_out: bool) -> Clause:
    """A clause whose triple of verb, adjective and object is withheld from training (held_out) or not."""
    verb, adjective, thing = draw(
        held_out,
        lambda: (rng.choice(lexicon.VERBS), rng.choice(lexicon.OF_THINGS), rng.choice(lexicon.THINGS)),
        lambda words: ("sentences", *(w.name for w in words)),
    )
    form = rng.choice(FORMS)
    described = rng.choice(lexicon.OF_PERSONS) if rng.random() < 0.5 else None
    subject = phrase(rng, rng.choice(lexicon.PERSONS), described)
    object = phrase(rng, thing, adjective, ("the", "my") if form == "negated" else DETERMINERS)
    return Clause(form, subject, verb, object, rng.choice(lexicon.TIMES))


def phrase(rng: random.Random, noun: Word, adjective: Word | None, determiners: tuple[str, ...] = DETERMINERS) -> Phrase:
    determiner = rng.choice(determiners)
    plural = determiner == "two" or (determiner != "a" and rng.random() < 0.5)
    return Phrase(noun, determiner, plural, adjective)


SENTENCES = World("sentences", _item, _SLICES, ("bleu", "exact_match", "chrf"))
