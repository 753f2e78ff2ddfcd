"""A clause rendered in four languages: gender, case, agreement, elision, and the word order of each."""

import dataclasses

from gpt4o_jax.tasks.worlds.lexicon import Word

DETERMINERS = ("the", "a", "my", "two")
FORMS = ("plain", "time", "negated", "wish", "perfect", "question", "known")


@dataclasses.dataclass(frozen=True)
class Phrase:
    """A noun with its determiner; always plural with "two", never with "a"."""

    noun: Word
    determiner: str
    plural: bool
    adjective: Word | None = None


@dataclasses.dataclass(frozen=True)
class Clause:
    """form: one of FORMS. time: the adverb that begins form "time". A negated clause has no indefinite object."""

    form: str
    subject: Phrase
    verb: Word
    object: Phrase
    time: Word


# ---------------------------------------------------------------- English


def english(c: Clause) -> str:
    singular, plural, participle = c.verb.forms["en"]
    several = c.subject.plural
    subject, verb, thing = _english_phrase(c.subject), plural if several else singular, _english_phrase(c.object)
    do, have, want = ("do", "have", "want") if several else ("does", "has", "wants")
    return _sentence({
        "plain": f"{subject} {verb} {thing}.",
        "time": f"{c.time.forms['en'][0]} {subject} {verb} {thing}.",
        "negated": f"{subject} {do} not {plural} {thing}.",
        "wish": f"{subject} {want} to {plural} {thing}.",
        "perfect": f"{subject} {have} {participle} {thing}.",
        "question": f"{do} {subject} {plural} {thing}?",
        "known": f"I know that {subject} {verb} {thing}.",
    }[c.form])  # fmt: skip


def _english_phrase(p: Phrase) -> str:
    words = [*(p.adjective.forms["en"] if p.adjective else []), p.noun.forms["en"][p.plural]]
    determiner = "an" if p.determiner == "a" and words[0][0] in "aeiou" else p.determiner
    return " ".join([determiner, *words])


# ---------------------------------------------------------------- German

# columns: der, die, das, plural; first as subject, then as object
_DE_DETERMINERS = {
    "the": ("der die das die", "den die das die"),
    "a": ("ein eine ein -", "einen eine ein -"),
    "my": ("mein meine mein meine", "meinen meine mein meine"),
    "two": ("- - - zwei", "- - - zwei"),
}
_DE_ENDINGS = {
    "the": ("e e e en", "en e e en"),
    "a": ("er e es -", "en e es -"),
    "my": ("er e es en", "en e es en"),
    "two": ("- - - e", "- - - e"),
}


def german(c: Clause) -> str:
    singular, plural, participle, *particle = c.verb.forms["de"]
    several = c.subject.plural
    subject, thing = _german_phrase(c.subject, False), _german_phrase(c.object, True)
    verb, end = plural if several else singular, "".join(f" {p}" for p in particle)
    will, have = ("wollen", "haben") if several else ("will", "hat")
    return _sentence({
        "plain": f"{subject} {verb} {thing}{end}.",
        "time": f"{c.time.forms['de'][0]} {verb} {subject} {thing}{end}.",
        "negated": f"{subject} {verb} {thing} nicht{end}.",
        "wish": f"{subject} {will} {thing} {''.join(particle)}{plural}.",
        "perfect": f"{subject} {have} {thing} {participle}.",
        "question": f"{verb} {subject} {thing}{end}?",
        "known": f"ich weiß, dass {subject} {thing} {''.join(particle)}{verb}.",
    }[c.form])  # fmt: skip


def _german_phrase(p: Phrase, is_object: bool) -> str:
    article, *numbers = p.noun.forms["de"]
    column = 3 if p.plural else ("der", "die", "das").index(article)
    determiner, ending = (t[p.determiner][is_object].split()[column] for t in (_DE_DETERMINERS, _DE_ENDINGS))
    adjective = [p.adjective.forms["de"][0] + ending] if p.adjective else []
    return " ".join([determiner, *adjective, numbers[p.plural]])


# ---------------------------------------------------------------- French and Spanish

# columns: masculine, feminine, and the plurals of both
_FR_DETERMINERS = {"the": "le la les les", "a": "un une - -", "my": "mon ma mes mes", "two": "- - deux deux"}
_ES_DETERMINERS = {"the": "el la los las", "a": "un una - -", "my": "mi mi mis mis", "two": "- - dos dos"}
_VOWELS = tuple("aeiouhéêâ")  # every h of these words is silent


def french(c: Clause) -> str:
    singular, plural, participle, infinitive = c.verb.forms["fr"]
    several = c.subject.plural
    subject, verb, thing = _french_phrase(c.subject), plural if several else singular, _french_phrase(c.object)
    want, have = ("veulent", "ont") if several else ("veut", "a")
    return _sentence(_elided({
        "plain": f"{subject} {verb} {thing}.",
        "time": f"{c.time.forms['fr'][0]}, {subject} {verb} {thing}.",
        "negated": f"{subject} ne {verb} pas {thing}.",
        "wish": f"{subject} {want} {infinitive} {thing}.",
        "perfect": f"{subject} {have} {participle} {thing}.",
        "question": f"est-ce que {subject} {verb} {thing} ?",
        "known": f"je sais que {subject} {verb} {thing}.",
    }[c.form]))  # fmt: skip


def _french_phrase(p: Phrase) -> str:
    gender, *numbers = p.noun.forms["fr"]
    column = 2 * p.plural + (gender == "f")
    words = [numbers[p.plural]]
    if p.adjective:
        forms, _, special = (part.split() for part in " ".join(p.adjective.forms["fr"]).partition("<"))
        if "<" in p.adjective.forms["fr"]:
            words.insert(0, special[0] if special and column == 0 and words[0].startswith(_VOWELS) else forms[column])
        else:
            words.append(forms[column])
    determiner = _FR_DETERMINERS[p.determiner].split()[column]
    return " ".join(["mon" if determiner == "ma" and words[0].startswith(_VOWELS) else determiner, *words])


def _elided(text: str) -> str:
    """le, la, ne and que lose their vowel before another."""
    words = text.split(" ")
    for i in range(len(words) - 1):
        if words[i] in ("le", "la", "ne", "que") and words[i + 1].startswith(_VOWELS):
            words[i] = words[i][:-1] + "'"
    return " ".join(words).replace("' ", "'")


def spanish(c: Clause) -> str:
    singular, plural, participle, infinitive = c.verb.forms["es"]
    several = c.subject.plural
    subject, verb, thing = _spanish_phrase(c.subject), plural if several else singular, _spanish_phrase(c.object)
    want, have = ("quieren", "han") if several else ("quiere", "ha")
    return _sentence({
        "plain": f"{subject} {verb} {thing}.",
        "time": f"{c.time.forms['es'][0]} {subject} {verb} {thing}.",
        "negated": f"{subject} no {verb} {thing}.",
        "wish": f"{subject} {want} {infinitive} {thing}.",
        "perfect": f"{subject} {have} {participle} {thing}.",
        "question": f"¿{verb.capitalize()} {subject} {thing}?",
        "known": f"sé que {subject} {verb} {thing}.",
    }[c.form])  # fmt: skip


def _spanish_phrase(p: Phrase) -> str:
    gender, *numbers = p.noun.forms["es"]
    column = 2 * p.plural + (gender == "f")
    adjective = [p.adjective.forms["es"][column]] if p.adjective else []
    return " ".join([_ES_DETERMINERS[p.determiner].split()[column], numbers[p.plural], *adjective])


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


SAY = {"en": english, "de": german, "fr": french, "es": spanish}
