"""A world: items with exact answers, each a pure function of (seed, index, held_out), with held-out compositions."""

import dataclasses
import hashlib
import random
import string
from collections.abc import Callable
from typing import TypeVar

from gpt4o_jax.tasks.item import Item

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class World:
    """item(seed, index, held_out): item `index`, of slice slices[index % len(slices)].

    Held-out items are built from compositions that no other item contains, whatever the seeds.
    metrics: names in tasks/metrics.py; the world's target is for the first. held_out: number of held-out items before they
    repeat; None: unlimited.
    """

    name: str
    item: Callable[[int, int, bool], Item]
    slices: tuple[str, ...]
    metrics: tuple[str, ...]
    held_out: int | None = None


def generator(world: str, seed: int, index: int, held_out: bool) -> random.Random:
    """The random generator of one item, equal in every process and version of Python."""
    return random.Random(f"{world}:{seed}:{index}:{held_out}")


def withheld(*composition, one_in: int = 10) -> bool:
    """Whether a composition is withheld from training: decided by a hash of its content, so that no list is needed."""
    digest = hashlib.blake2b(repr(composition).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % one_in == 0


def draw(held_out: bool, sample: Callable[[], T], composition: Callable[[T], tuple], one_in: int = 10) -> T:
    """The first sample whose composition is withheld (held_out=True) or not withheld (False)."""
    while withheld(*composition(drawn := sample()), one_in=one_in) != held_out:
        pass
    return drawn


def letters(rng: random.Random, held_out: bool, shortest: int = 4, longest: int = 5) -> str:
    """A meaningless name: random letters, the first a capital. Those of held-out items are never trained on."""

    def sample() -> str:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(shortest, longest))).capitalize()

    return draw(held_out, sample, lambda name: ("letters", name))
