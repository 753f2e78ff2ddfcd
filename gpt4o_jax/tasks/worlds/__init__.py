"""Small worlds whose answers are known exactly: made up, seeded, endless, held out by composition. Nothing is downloaded."""

from gpt4o_jax.tasks.worlds.numbers import NUMBERS
from gpt4o_jax.tasks.worlds.world import World

WORLDS: dict[str, World] = {w.name: w for w in (NUMBERS,)}

# What `evaluate --tasks` means by each of the four applications and by chat.
APPLICATIONS = {"translation": ("numbers",)}
