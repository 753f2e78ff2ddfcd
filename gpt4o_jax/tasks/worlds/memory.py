"""Conversations with several turns to remember: who is speaking, what they like, the value of a running total.

name: what was said at the beginning is asked for after small talk. total: numbers are added and subtracted turn by turn, with
the total from 0 to 99. both: the two in one conversation, one of them asked for at its end. Held out, by hash: a tenth of the
pairs of name and food, and a tenth of the pairs of consecutive changes. Target: exact match of at least 90 %.
"""

import itertools
import random

from gpt4o_jax.tasks.chat import Message, say
from gpt4o_jax.tasks.item import Item
from gpt4o_jax.tasks.worlds.words import CITIES, FOODS, NAMES
from gpt4o_jax.tasks.worlds.world import World, draw, generator, withheld

_SLICES = ("name", "total", "both")
_TALK = (
    ("How are you?", "I am fine, thank you."),
    ("Nice weather today.", "Yes, it is lovely."),
    ("Thank you.", "You are welcome."),
    ("Can you help me?", "Of course, I can."),
    ("Are you a robot?", "Yes, I am a program."),
    ("That is good to know.", "I am glad to hear it."),
)

_Turns = list[tuple[str, str]]  # (what the user says, what the assistant says)


def _item(seed: int, index: int, held_out: bool) -> Item:
    rng = generator("memory", seed, index, held_out)
    wanted = _SLICES[index % len(_SLICES)]
    told, asked = _introduction(rng, held_out)
    counted, total = _running_total(rng, held_out, rng.randint(2, 4) if wanted == "total" else 2)
    if wanted == "name":
        turns = [*told, *rng.sample(_TALK, rng.randint(1, 3)), rng.choice(asked)]
    elif wanted == "total":
        asked_behind = [rng.choice(_TALK), ("What is the total?", f"The total is {total}.")]
        turns = [*counted, *asked_behind] if rng.random() < 0.3 else counted
    else:
        turns = [told[0], *counted, rng.choice((asked[0], ("What is the total?", f"The total is {total}.")))]
    messages = tuple(message for turn in turns for message in _messages(turn))
    return Item(messages, (messages[-1].text,), wanted)


def _messages(turn: tuple[str, str]) -> tuple[Message, Message]:
    return say("user", turn[0]), say("assistant", turn[1])


def _introduction(rng: random.Random, held_out: bool) -> tuple[_Turns, _Turns]:
    """(turns that tell name, city and food; turns that ask for them)."""
    name, food = draw(held_out, lambda: (rng.choice(NAMES), rng.choice(FOODS)), lambda pair: ("memory", *pair))
    city = rng.choice(CITIES)
    told = [
        (rng.choice(("Hello, I am {}.", "Hi! My name is {}.")).format(name), f"Hello {name}, nice to meet you."),
        (f"I live in {city} and I like {food}.", f"{city} is a beautiful city."),
    ]
    asked = [
        (rng.choice(("What is my name?", "Who am I?")), f"You are {name}."),
        ("Where do I live?", f"You live in {city}."),
        ("What do I like?", f"You like {food}."),
    ]
    return told, asked


def _running_total(rng: random.Random, held_out: bool, steps: int) -> tuple[_Turns, int]:
    """(turns, the final total). Held out: some pair of consecutive changes is withheld."""
    start, changes = 0, []

    def fits() -> bool:
        totals = itertools.accumulate(changes, initial=start)
        pairs = itertools.pairwise(changes)
        return all(0 <= t < 100 for t in totals) and any(withheld("total", *pair) for pair in pairs) == held_out

    while not changes or not fits():
        start, changes = rng.randint(5, 60), [rng.choice((-1, 1)) * rng.randint(1, 9) for _ in range(steps)]
    total, turns = start, [(f"Start at {start}.", f"The total is {start}.")]
    for change in changes:
        total += change
        turns.append((f"Add {change}." if change > 0 else f"Take away {-change}.", f"The total is {total}."))
    return turns, total


MEMORY = World("memory", _item, _SLICES, ("exact_match",))
