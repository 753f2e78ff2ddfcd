"""Numbers in words, 0 to 999,999, translated between English and German, French or Spanish.

The number of digits is drawn uniformly, so that short numbers are as frequent as long ones. Held out: a tenth of the numbers
from 100 on, by hash, in every direction; held-out items have three to six digits. Target: exact match of at least 98 % in
each of the six directions.
"""

from gpt4o_jax.tasks.item import Item, ask_to_translate, exchange
from gpt4o_jax.tasks.worlds.world import World, generator, withheld

_SLICES = ("en-de", "de-en", "en-fr", "fr-en", "en-es", "es-en")


def _item(seed: int, index: int, held_out: bool) -> Item:
    rng = generator("numbers", seed, index, held_out)
    direction = _SLICES[index % len(_SLICES)]
    digits = rng.randint(3 if held_out else 1, 6)
    while _kept_from_training(number := rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)) != held_out:
        pass
    source, target = direction.split("-")
    return exchange(ask_to_translate(WORDS[source](number), target), (WORDS[target](number),), direction)


def _kept_from_training(number: int) -> bool:
    return number >= 100 and withheld("numbers", number)  # training must include every number word


# ---------------------------------------------------------------- the words

_EN = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
    " nineteen"
).split()
_EN_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_DE = (
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn achtzehn"
    " neunzehn"
).split()
_DE_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
_FR = (
    "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept dix-huit dix-neuf"
).split()
_FR_TENS = "vingt trente quarante cinquante soixante soixante quatre-vingt quatre-vingt".split()
_ES = (
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis diecisiete dieciocho"
    " diecinueve veinte veintiuno veintidós veintitrés veinticuatro veinticinco veintiséis veintisiete veintiocho veintinueve"
).split()
_ES_TENS = "treinta cuarenta cincuenta sesenta setenta ochenta noventa".split()
_ES_HUNDREDS = ("ciento doscientos trescientos cuatrocientos quinientos seiscientos setecientos ochocientos novecientos").split()


def english(n: int) -> str:
    if n < 20:
        return _EN[n]
    if n < 100:
        return _EN_TENS[n // 10 - 2] + (f"-{_EN[n % 10]}" if n % 10 else "")
    if n < 1000:
        return f"{_EN[n // 100]} hundred" + (f" and {english(n % 100)}" if n % 100 else "")
    rest = n % 1000
    return f"{english(n // 1000)} thousand" + ((" and " if rest < 100 else ", ") + english(rest) if rest else "")


def german(n: int) -> str:
    if n < 20:
        return _DE[n]
    if n < 100:
        return (f"{_de_stem(n % 10)}und" if n % 10 else "") + _DE_TENS[n // 10 - 2]
    unit, name = (1000, "tausend") if n >= 1000 else (100, "hundert")
    return _de_stem(n // unit) + name + (german(n % unit) if n % unit else "")


def _de_stem(n: int) -> str:
    """The form before another word: ein, not eins."""
    return german(n).removesuffix("s") if n % 100 == 1 else german(n)


def french(n: int) -> str:
    if n < 20:
        return _FR[n]
    if n < 100:
        tens = n // 10 - (n // 10 in (7, 9))  # 70 to 79 and 90 to 99 count on from 60 and 80
        rest = n - 10 * tens
        joint = " et " if rest in (1, 11) and tens != 8 else "-"
        return _FR_TENS[tens - 2] + (f"{joint}{_FR[rest]}" if rest else "s" if tens == 8 else "")
    if n < 1000:
        hundreds, rest = divmod(n, 100)
        several = f"{_FR[hundreds]} " if hundreds > 1 else ""
        return f"{several}cent" + (f" {french(rest)}" if rest else "s" if hundreds > 1 else "")
    thousands, rest = divmod(n, 1000)
    several = french(thousands)
    if several.endswith(("cents", "quatre-vingts")):  # no plural before mille
        several = several[:-1]
    return (f"{several} mille" if thousands > 1 else "mille") + (f" {french(rest)}" if rest else "")


def spanish(n: int) -> str:
    if n < 30:
        return _ES[n]
    if n < 100:
        return _ES_TENS[n // 10 - 3] + (f" y {_ES[n % 10]}" if n % 10 else "")
    if n == 100:
        return "cien"
    if n < 1000:
        return _ES_HUNDREDS[n // 100 - 1] + (f" {spanish(n % 100)}" if n % 100 else "")
    thousands, rest = divmod(n, 1000)
    several = spanish(thousands)
    if thousands % 100 == 21:
        several = several.removesuffix("uno") + "ún"
    elif thousands % 10 == 1 and thousands % 100 != 11:
        several = several.removesuffix("o")
    return (f"{several} mil" if thousands > 1 else "mil") + (f" {spanish(rest)}" if rest else "")


WORDS = {"en": english, "de": german, "fr": french, "es": spanish}
NUMBERS = World("numbers", _item, _SLICES, ("exact_match", "chrf"))
