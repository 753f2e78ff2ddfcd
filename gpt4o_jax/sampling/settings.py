"""Sampling settings and their ranges. Does not import JAX, so that `generate --help` is fast."""

import dataclasses
import math

from gpt4o_jax.config import knob
from gpt4o_jax.errors import RunError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose the next token from the model's logits; for definitions and order see sampling/logits.py.

    The defaults draw from the model's own distribution. Raises RunError if a value is out of range.
    """

    temperature: float = knob(1.0, "sampling temperature; 0: greedy", low=0.0, high=100.0)
    top_k: int = knob(0, "keep the k most probable tokens; 0: all", low=0)
    top_p: float = knob(1.0, "nucleus sampling: keep the most probable tokens up to this total probability", low=0.0, high=1.0)
    min_p: float = knob(0.0, "keep tokens with at least this probability, relative to the most probable", low=0.0, high=1.0)
    repetition_penalty: float = knob(
        1.0, "divides positive and multiplies negative logits of tokens in prompt or output", low=0.01, high=100.0
    )
    presence_penalty: float = knob(0.0, "subtracted from the logits of tokens already generated", low=-2.0, high=2.0)
    frequency_penalty: float = knob(0.0, "subtracted from a token's logit once per time it was generated", low=-2.0, high=2.0)
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, number added to its logit, -100 to 100)
    stop_ids: tuple[int, ...] = ()  # tokens that end a row, as <eos> does
    top_logprobs: int = knob(0, "also return the log-probabilities of the n most probable tokens at each step", low=0, high=20)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            if f.metadata:
                _check(f.name, getattr(self, f.name), f.type, f.metadata["low"], f.metadata["high"])
        for token, bias in self.logit_bias:
            _check("logit_bias token", token, int, 0, None)
            _check(f"logit_bias of token {token}", bias, float, -100.0, 100.0)
        for token in self.stop_ids:
            _check("stop_ids token", token, int, 0, None)
        tokens = [token for token, _ in self.logit_bias]
        twice = next((t for t in tokens if tokens.count(t) > 1), None)
        if twice is not None:
            raise RunError(f"sampling: logit_bias names token {twice} twice; give each token one bias")

    @property
    def penalised(self) -> bool:
        """Whether logits depend on previous tokens."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


def _check(name: str, value, kind: type, low: float, high: float | None) -> None:
    legal = f"at least {low}" if high is None else f"from {low} to {high}"
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole or (kind is float and isinstance(value, float) and math.isfinite(value))):
        raise RunError(f"sampling: {name}={value!r}: expected {'an integer' if kind is int else 'a number'} {legal}")
    if value < low or (high is not None and value > high):
        raise RunError(f"sampling: {name}={value}: expected {'an integer' if kind is int else 'a number'} {legal}")
