"""Sums and differences of numbers below 100, as a task whose reward a program can check.

Held out: a tenth of the pairs of numbers, by hash. No target of its own: it is the task for reinforcement learning (GRPO),
whose reward is exact match with the item's answer. `verify` does not see that answer: it reads the question and computes
digit by digit, as on paper.
"""

import re

from gpt4o_jax.tasks.item import Item, exchange
from gpt4o_jax.tasks.worlds.world import World, draw, generator

_SLICES = ("sum", "difference")


def _item(seed: int, index: int, held_out: bool) -> Item:
    rng = generator("arithmetic", seed, index, held_out)
    wanted = _SLICES[index % len(_SLICES)]

    def sample() -> tuple[int, int]:
        a, b = rng.randrange(100), rng.randrange(100)
        return (a, b) if wanted == "sum" else (max(a, b), min(a, b))

    a, b = draw(held_out, sample, lambda pair: ("arithmetic", *sorted(pair)))
    question = f"What is {a} + {b}?" if wanted == "sum" else f"What is {a} - {b}?"
    return exchange(question, (str(a + b if wanted == "sum" else a - b),), wanted)


def verify(question: str, prediction: str) -> bool:
    """Whether `prediction` answers "What is A + B?" or "What is A - B?": column by column, with carries."""
    asked = re.fullmatch(r"What is (\d+) ([+-]) (\d+)\?", question)
    given = prediction.strip()
    if not asked or not re.fullmatch(r"0|[1-9][0-9]*", given):
        return False
    a, sign, b = asked.groups()
    one, other, total = (given, b, a) if sign == "-" else (a, b, given)  # a - b = given means given + b = a
    width = max(map(len, (one, other, total))) + 1
    carry, columns = 0, zip(*(reversed(n.zfill(width)) for n in (one, other, total)), strict=True)
    for x, y, expected in columns:
        carry, digit = divmod(int(x) + int(y) + carry, 10)
        if digit != int(expected):
            return False
    return carry == 0


ARITHMETIC = World("arithmetic", _item, _SLICES, ("exact_match",))
