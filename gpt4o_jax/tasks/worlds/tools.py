"""Tool calls: a request becomes JSON with the right tool and arguments, a tool's result becomes a sentence.

The system turn lists three of six tools, in random order. call: the answer is {"name": ..., "arguments": {...}}, to be valid
and right. answer: the conversation continues with the tool's result, and the answer is a sentence. Held out: a tenth of the
pairs of arguments of each tool, by hash. Target: JSON valid and right in at least 95 % of calls.
"""

import dataclasses
import json
import random
from collections.abc import Callable
from typing import Any

from gpt4o_jax.tasks.chat import say
from gpt4o_jax.tasks.item import Item
from gpt4o_jax.tasks.worlds.words import ANIMALS, CITIES, DAYS, FOODS, NAMES
from gpt4o_jax.tasks.worlds.world import World, draw, generator

_SLICES = ("call", "answer")


@dataclasses.dataclass(frozen=True)
class Tool:
    """arguments, result: name -> how its value is drawn. requests: templates over arguments; reply: template over both."""

    arguments: dict[str, Callable[[random.Random], Any]]
    requests: tuple[str, ...]
    result: dict[str, Callable[[random.Random], Any]]
    reply: str


def _one_of(values) -> Callable[[random.Random], Any]:
    return lambda rng: rng.choice(values)


TOOLS = {
    "weather": Tool(
        {"city": _one_of(CITIES), "day": _one_of(DAYS)},
        ("How will the weather be in {city} on {day}?", "On {day} I am in {city}. What weather can I expect?"),
        {"sky": _one_of(("sunny", "cloudy", "rainy", "snowy")), "degrees": _one_of(range(30))},
        "It will be {sky} in {city} on {day}, {degrees} degrees.",
    ),
    "pay": Tool(
        {"to": _one_of(NAMES), "amount": _one_of(range(2, 100))},
        ("Send {amount} euros to {to}.", "Please pay {to} {amount} euros."),
        {"left": _one_of(range(100, 1000))},
        "I sent {amount} euros to {to}. You have {left} euros left.",
    ),
    "remind": Tool(
        {"day": _one_of(DAYS), "text": lambda rng: f"{rng.choice(('buy', 'cook', 'order'))} {rng.choice(FOODS)}"},
        ("Remind me on {day} to {text}.", "I have to {text} on {day}. Do not let me forget it."),
        {"ok": _one_of((True,))},
        "I will remind you on {day} to {text}.",
    ),
    "distance": Tool(
        {"start": _one_of(CITIES), "end": _one_of(CITIES)},
        ("How far is it from {start} to {end}?", "I travel from {start} to {end}. How many kilometres is that?"),
        {"km": _one_of(range(100, 3000))},
        "It is {km} kilometres from {start} to {end}.",
    ),
    "adopt": Tool(
        {"animal": _one_of(ANIMALS), "name": _one_of(NAMES)},
        ("I want to adopt a {animal} and call it {name}.", "Find me a {animal}. Its name shall be {name}."),
        {"age": _one_of(range(2, 15))},
        "Your {animal} {name} is {age} years old.",
    ),
    "call": Tool(
        {"name": _one_of(NAMES), "hour": _one_of(range(1, 24))},
        ("Call {name} at {hour} o'clock.", "At {hour} o'clock I must talk to {name}."),
        {"minutes": _one_of(range(2, 60))},
        "I will call {name} at {hour} o'clock, in {minutes} minutes.",
    ),
}


def _item(seed: int, index: int, held_out: bool) -> Item:
    rng = generator("tools", seed, index, held_out)
    wanted = _SLICES[index % len(_SLICES)]
    offered = rng.sample(list(TOOLS), 3)
    name = rng.choice(offered)
    tool = TOOLS[name]

    def sample() -> dict[str, Any]:
        while True:
            found = {key: value(rng) for key, value in tool.arguments.items()}
            if len(set(found.values())) == len(found):  # nobody asks how far it is from Paris to Paris
                return found

    arguments = draw(held_out, sample, lambda found: (name, *found.values()))
    call = {"name": name, "arguments": arguments}
    messages = (
        say("system", "Tools: " + "; ".join(f"{t}({', '.join(TOOLS[t].arguments)})" for t in offered)),
        say("user", rng.choice(tool.requests).format(**arguments)),
        say("assistant", json.dumps(call)),
    )
    if wanted == "call":
        return Item(messages, (messages[-1].text,), wanted, {"json": call})
    result = {key: value(rng) for key, value in tool.result.items()}
    reply = tool.reply.format(**arguments, **result)
    return Item((*messages, say("tool", json.dumps(result)), say("assistant", reply)), (reply,), wanted)


CALLS = World("tools", _item, _SLICES, ("json_right", "json_valid", "exact_match"))
