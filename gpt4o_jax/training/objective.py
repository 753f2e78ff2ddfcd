"""The training objective: the loss, and the batches it is computed on. By default next-token prediction on a corpus."""

import dataclasses
from collections.abc import Callable

from gpt4o_jax.training.step import next_token


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss and its batches.

    loss(model, params, batch, config.train, key) -> (total to minimise, dict of its parts, including "loss"), all summed over
        the batch's weights. key: enables dropout, or None.
    beside: names of the additional arrays in Batch.beside.
    batches(program, state, start, last_step): yields (step after the dispatch, Batch [K, B, T]); state() returns the newest
        TrainState. None: rows of the corpus.
    """

    loss: Callable = next_token
    beside: tuple[str, ...] = ()
    batches: Callable | None = None
