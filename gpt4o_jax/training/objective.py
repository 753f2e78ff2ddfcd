"""What a run minimises, and on which batches. Ordinary training: the next token of the rows of a corpus."""

import dataclasses
from collections.abc import Callable

from gpt4o_jax.training.step import next_token


@dataclasses.dataclass(frozen=True)
class Objective:
    """loss(model, params, batch, config.train, key) -> (what is minimised, its parts by name, "loss" among them), all of them
    sums over the batch's weights; key: enables dropout, or None.

    beside: names of the arrays in Batch.beside. batches(program, state, start, last_step): yields (step after the dispatch,
    Batch [K, B, T]), where state() is the newest TrainState; None: rows of the corpus.
    """

    loss: Callable = next_token
    beside: tuple[str, ...] = ()
    batches: Callable | None = None
