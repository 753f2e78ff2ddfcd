"""Copying random words: the skill that questions about names never seen before require.

repeat: write the same words again. lookup: which word belongs to this one? (In training, up to five such questions in a row.)
Held out: every word of an item, by hash. No target of its own: it is meant to be mixed into the training of worlds that
require copying.
"""

from gpt4o_jax.tasks.item import Item, conversation, exchange
from gpt4o_jax.tasks.worlds.world import World, generator, letters

_SLICES = ("repeat", "lookup")


def _item(seed: int, index: int, held_out: bool) -> Item:
    rng = generator("copying", seed, index, held_out)
    wanted = _SLICES[index % len(_SLICES)]
    if wanted == "repeat":
        words = " ".join(letters(rng, held_out) for _ in range(rng.randint(1, 5)))
        return exchange(f"Repeat: {words}", (words,), wanted)
    pairs: dict[str, str] = {}
    for _ in range(rng.randint(2, 5)):
        pairs[letters(rng, held_out)] = letters(rng, held_out)
    passage = " ".join(f"{a} has {b}." for a, b in pairs.items())
    asked = rng.sample(list(pairs), 1 if held_out else rng.randint(1, len(pairs)))
    return conversation(passage, {f"What does {a} have?": pairs[a] for a in asked}, wanted)


COPYING = World("copying", _item, _SLICES, ("exact_match",))
