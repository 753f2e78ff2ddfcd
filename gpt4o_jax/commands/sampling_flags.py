"""Sampling flags, shared by all commands that generate text."""

import dataclasses

from gpt4o_jax.commands.flags import Flag
from gpt4o_jax.errors import RunError
from gpt4o_jax.sampling.settings import Sampling

_DEFAULTS = {"temperature": 0.8}  # a small model's own distribution reads badly

FLAGS = (
    *(
        Flag(f.name, f.type, _DEFAULTS.get(f.name, f.default), f.metadata["doc"], low=f.metadata["low"], high=f.metadata["high"])
        for f in dataclasses.fields(Sampling)
        if f.metadata
    ),
    Flag("logit_bias", list, None, "ID:BIAS, added to a token's logit, -100 to 100; may be given several times"),
    Flag("stop_ids", list, None, "end at this token id, as at <eos>; may be given several times"),
)


def sampling(command: str, flags: dict) -> Sampling:
    """Sampling from parsed flags. Raises RunError for an invalid value."""
    values = {f.name: flags[f.name] for f in FLAGS}
    values["logit_bias"] = tuple(_bias(command, text) for text in flags["logit_bias"])
    values["stop_ids"] = tuple(_id(command, text) for text in flags["stop_ids"])
    return Sampling(**values)


def _bias(command: str, text: str) -> tuple[int, float]:
    token, _, bias = text.partition(":")
    try:
        return int(token), float(bias)
    except ValueError:
        raise RunError(f"{command}: --logit_bias={text}: expected ID:BIAS, such as 262:-5") from None


def _id(command: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise RunError(f"{command}: --stop_ids={text}: expected a token id (`tokenizer inspect` shows them)") from None
