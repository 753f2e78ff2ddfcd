"""Structured reports, summarised to one sentence whose content is known exactly.

Four kinds of report, with their lines in random order, two of them irrelevant. Part of the sentence has to be inferred: who
won, whether sales rose. Held out: a tenth of the compositions, by hash: (city, day, sky), (team, team, city), (product,
city), (sender, receiver). Target: ROUGE-L of at least 90; key_content is the share of required content that is present.
"""

import random

from gpt4o_jax.tasks.item import Item, ask_to_summarise, exchange
from gpt4o_jax.tasks.worlds.words import CITIES, DAYS, NAMES
from gpt4o_jax.tasks.worlds.world import World, draw, generator

_SKIES = "sunny cloudy rainy snowy foggy stormy".split()
_WINDS = "no weak strong".split()
_TEAMS = "Lions Bears Eagles Wolves Sharks Tigers Hawks Foxes Bulls Falcons Owls Rams".split()
_PRODUCTS = "lamps chairs books bikes shoes watches phones tables coats toys hats bags".split()

_Report = tuple[dict[str, str], str, tuple[str, ...]]  # lines, the sentence, the strings it must contain


def _item(seed: int, index: int, held_out: bool) -> Item:
    rng = generator("reports", seed, index, held_out)
    kind = list(_KINDS)[index % len(_KINDS)]
    lines, sentence, key = _KINDS[kind](rng, held_out)
    written = [f"{name}: {value}" for name, value in lines.items()]
    rng.shuffle(written)
    return exchange(ask_to_summarise("\n".join(written)), (sentence,), kind, {"key": key})


def _weather(rng: random.Random, held_out: bool) -> _Report:
    sample = lambda: (rng.choice(CITIES), rng.choice(DAYS), rng.choice(_SKIES))
    city, day, sky = draw(held_out, sample, lambda c: ("weather", *c))
    low = rng.randrange(25)
    high, wind = low + rng.randint(1, 12), rng.choice(_WINDS)
    lines = {
        "city": city, "day": day, "sky": sky, "low": str(low), "high": str(high), "wind": wind,
        "station": str(rng.randrange(1000, 10000)), "pressure": str(rng.randrange(980, 1040)),
    }  # fmt: skip
    sentence = f"On {day} it was {sky} in {city}, with {low} to {high} degrees and {wind} wind."
    return lines, sentence, (day, sky, city, f"{low} to {high}", f"{wind} wind")


def _match(rng: random.Random, held_out: bool) -> _Report:
    sample = lambda: (*rng.sample(_TEAMS, 2), rng.choice(CITIES))
    home, guest, city = draw(held_out, sample, lambda c: ("match", *sorted(c[:2]), c[2]))
    goals, against = rng.randrange(6), rng.randrange(6)
    lines = {
        "home": home, "guest": guest, "home goals": str(goals), "guest goals": str(against), "city": city,
        "referee": rng.choice(NAMES), "spectators": str(rng.randrange(1000, 60000)),
    }  # fmt: skip
    if goals == against:
        result = f"The {home} and the {guest} drew {goals} to {goals}"
        return lines, f"{result} in {city}.", (home, guest, "drew", f"{goals} to {goals}", city)
    won, lost = (home, guest) if goals > against else (guest, home)
    result = f"{max(goals, against)} to {min(goals, against)}"
    return lines, f"The {won} beat the {lost} {result} in {city}.", (f"The {won} beat the {lost}", result, city)


def _sales(rng: random.Random, held_out: bool) -> _Report:
    product, city = draw(held_out, lambda: (rng.choice(_PRODUCTS), rng.choice(CITIES)), lambda c: ("sales", *c))
    before = rng.randrange(100, 1000)
    now = before if rng.random() < 0.15 else rng.randrange(100, 1000)
    lines = {
        "product": product, "city": city, "last month": str(before), "this month": str(now),
        "manager": rng.choice(NAMES), "shop": str(rng.randrange(100)),
    }  # fmt: skip
    if now == before:
        return lines, f"Sales of {product} in {city} stayed at {now}.", (product, city, f"stayed at {now}")
    change = f"{'rose' if now > before else 'fell'} from {before} to {now}"
    return lines, f"Sales of {product} in {city} {change}.", (product, city, change)


def _parcel(rng: random.Random, held_out: bool) -> _Report:
    sender, receiver = draw(held_out, lambda: tuple(rng.sample(NAMES, 2)), lambda c: ("parcel", *c))
    city, day, late = rng.choice(CITIES), rng.choice(DAYS), rng.choice((0, 0, 1, 2, 3))
    lines = {
        "from": sender, "to": receiver, "city": city, "arrived": day, "days late": str(late),
        "number": str(rng.randrange(10000, 100000)), "weight": f"{rng.randint(1, 20)} kg",
    }  # fmt: skip
    delay = "on time" if not late else "one day late" if late == 1 else f"{('two', 'three')[late - 2]} days late"
    sentence = f"The parcel from {sender} to {receiver} arrived in {city} on {day}, {delay}."
    return lines, sentence, (f"from {sender}", f"to {receiver}", city, day, delay)


_KINDS = {"weather": _weather, "match": _match, "sales": _sales, "parcel": _parcel}
REPORTS = World("reports", _item, tuple(_KINDS), ("rouge_l", "key_content", "exact_match"))
