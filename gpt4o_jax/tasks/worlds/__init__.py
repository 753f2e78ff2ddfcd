"""Worlds: small synthetic tasks with exact answers, generated from a seed, held out by composition. Nothing is downloaded."""

from gpt4o_jax.tasks.worlds.arithmetic import ARITHMETIC
from gpt4o_jax.tasks.worlds.copying import COPYING
from gpt4o_jax.tasks.worlds.memory import MEMORY
from gpt4o_jax.tasks.worlds.numbers import NUMBERS
from gpt4o_jax.tasks.worlds.questions import QUESTIONS
from gpt4o_jax.tasks.worlds.reports import REPORTS
from gpt4o_jax.tasks.worlds.sentences import SENTENCES
from gpt4o_jax.tasks.worlds.tools import CALLS
from gpt4o_jax.tasks.worlds.world import World
from gpt4o_jax.tasks.worlds.writing import WRITING

_ALL = (NUMBERS, SENTENCES, QUESTIONS, REPORTS, WRITING, MEMORY, CALLS, COPYING, ARITHMETIC)
WORLDS: dict[str, World] = {world.name: world for world in _ALL}

# The worlds that `evaluate --tasks` asks for each of the four applications and for chat.
APPLICATIONS = {
    "qa": ("questions",),
    "translation": ("numbers", "sentences"),
    "summarisation": ("reports", "docstrings"),
    "generation": ("writing",),
    "chat": ("memory", "tools"),
}
