"""Sentences say the same in four languages: by hand for each grammar rule, and one to one over random clauses."""

import random

import pytest

from gpt4o_jax.tasks.worlds import lexicon, sentences
from gpt4o_jax.tasks.worlds.grammar import SAY, Clause, Phrase


def word(name):
    known = (*lexicon.PERSONS, *lexicon.THINGS, *lexicon.VERBS, *lexicon.OF_PERSONS, *lexicon.OF_THINGS, *lexicon.TIMES)
    return next(w for w in known if w.name == name) if name else None


def phrase(text):
    """ "two old man" -> its phrase; "*" after the determiner: plural."""
    determiner, *adjective, noun = text.split()
    plural = determiner == "two" or determiner.endswith("*")
    return Phrase(word(noun), determiner.rstrip("*"), plural, word("".join(adjective)))


BY_HAND = [
    ("plain", "the old man", "buys", "a red apple", "today",
     "The old man buys a red apple.", "Der alte Mann kauft einen roten Apfel.",
     "Le vieil homme achète une pomme rouge.", "El hombre viejo compra una manzana roja."),
    ("plain", "a old child", "finds", "the* new house", "today",
     "An old child finds the new houses.", "Ein altes Kind findet die neuen Häuser.",
     "Un vieil enfant trouve les nouvelles maisons.", "Un niño viejo encuentra las casas nuevas."),
    ("time", "my actress", "picks up", "two beautiful picture", "today",
     "Today my actress picks up two beautiful pictures.", "Heute hebt meine Schauspielerin zwei schöne Bilder auf.",
     "Aujourd'hui, mon actrice ramasse deux beaux tableaux.", "Hoy mi actriz recoge dos cuadros hermosos."),
    ("time", "the* happy girl", "draws", "my old hat", "in summer",
     "In summer the happy girls draw my old hat.", "Im Sommer zeichnen die glücklichen Mädchen meinen alten Hut.",
     "En été, les filles heureuses dessinent mon vieux chapeau.", "En verano las chicas felices dibujan mi sombrero viejo."),
    ("negated", "two young doctor", "loves", "the heavy table", "now",
     "Two young doctors do not love the heavy table.", "Zwei junge Ärzte lieben den schweren Tisch nicht.",
     "Deux jeunes médecins n'aiment pas la table lourde.", "Dos médicos jóvenes no aman la mesa pesada."),
    ("negated", "the uncle", "picks up", "my white flower", "now",
     "The uncle does not pick up my white flower.", "Der Onkel hebt meine weiße Blume nicht auf.",
     "L'oncle ne ramasse pas ma fleur blanche.", "El tío no recoge mi flor blanca."),
    ("wish", "my* tired queen", "picks up", "a blue book", "now",
     "My tired queens want to pick up a blue book.", "Meine müden Königinnen wollen ein blaues Buch aufheben.",
     "Mes reines fatiguées veulent ramasser un livre bleu.", "Mis reinas cansadas quieren recoger un libro azul."),
    ("perfect", "a small baker", "hides", "the* expensive watch", "now",
     "A small baker has hidden the expensive watches.", "Ein kleiner Bäcker hat die teuren Uhren versteckt.",
     "Un petit boulanger a caché les montres chères.", "Un panadero pequeño ha escondido los relojes caros."),
    ("question", "the king", "sees", "my* green key", "now",
     "Does the king see my green keys?", "Sieht der König meine grünen Schlüssel?",
     "Est-ce que le roi voit mes clés vertes ?", "¿Ve el rey mis llaves verdes?"),
    ("question", "a aunt", "picks up", "the big bag", "now",
     "Does an aunt pick up the big bag?", "Hebt eine Tante die große Tasche auf?",
     "Est-ce qu'une tante ramasse le grand sac ?", "¿Recoge una tía el bolso grande?"),
    ("known", "my* beautiful woman", "picks up", "a black window", "now",
     "I know that my beautiful women pick up a black window.",
     "Ich weiß, dass meine schönen Frauen ein schwarzes Fenster aufheben.",
     "Je sais que mes belles femmes ramassent une fenêtre noire.", "Sé que mis mujeres hermosas recogen una ventana negra."),
    ("known", "a happy teacher", "paints", "two blue door", "now",
     "I know that a happy teacher paints two blue doors.", "Ich weiß, dass ein glücklicher Lehrer zwei blaue Türen malt.",
     "Je sais qu'un professeur heureux peint deux portes bleues.", "Sé que un profesor feliz pinta dos puertas azules."),
]  # fmt: skip


@pytest.mark.parametrize(("form", "subject", "verb", "object", "time", "en", "de", "fr", "es"), BY_HAND)
def test_sentences_are_those_written_by_hand(form, subject, verb, object, time, en, de, fr, es):
    clause = Clause(form, phrase(subject), word(verb), phrase(object), word(time))
    assert {language: say(clause) for language, say in SAY.items()} == {"en": en, "de": de, "fr": fr, "es": es}


@pytest.mark.parametrize("language", ["de", "fr", "es"])
def test_a_sentence_has_one_translation_each_way(language):
    rng, there, back = random.Random(0), {}, {}
    for _ in range(20_000):
        clause = sentences.clause(rng, False)
        english, other = SAY["en"](clause), SAY[language](clause)
        assert there.setdefault(english, other) == other and back.setdefault(other, english) == english
