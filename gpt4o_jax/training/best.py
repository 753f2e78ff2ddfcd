"""The best evaluation of a run so far, and when to give up waiting for a better one.

All of it follows from the records of metrics.jsonl up to a step, so that a run that goes on decides as one never stopped.
"""

import math
from collections.abc import Container, Iterable

from gpt4o_jax.errors import RunError, did_you_mean

LESS_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "wer", "cer")
STOPPED = "stopped_early"  # stands in the record of the last evaluation of a run that gave up


class Best:
    """metric: name of a number of evaluations, "" for none; patience: evaluations without a better one, 0 for no end."""

    def __init__(
        self,
        metric: str,
        patience: int,
        records: Iterable[dict] = (),
        steps: Container[int] | None = None,
        since: int | None = None,
    ):
        """records: of a run up to the step where it goes on. steps: of the checkpoints that it has; None: of all of them.

        Only what has a checkpoint can be the best: where `metric` is asked for late, better ones were not kept. since: how many
        evaluations were no better, as the checkpoint says; None: counted in the records, where of equal ones whose checkpoints
        are gone only the last is seen.
        """
        self.metric, self._patience = metric, patience
        self.step: int | None = None
        self.value: float | None = None
        self._since, self.stopped = 0, False
        for r in records:
            if r["kind"] == "eval" and metric in r:
                if steps is None or r["step"] in steps:
                    self.take(r["step"], r)
                elif self.step is not None:
                    self._since += 1
                self.stopped |= STOPPED in r
        if since is not None and self.step is not None:
            self._since = since

    def take(self, step: int, values: dict) -> bool:
        """Takes an evaluation in; whether none before was better. Raises RunError where it has no such number.

        Of equal ones the newest stays (what counts whole answers may be 0 for long), but patience waits for a better one.
        """
        if not self.metric:
            return False
        if self.metric not in values:
            raise RunError(
                f"config.checkpoint.best={self.metric}: no such number in an evaluation{did_you_mean(self.metric, values)};"
                f" there are {', '.join(values)}"
            )
        value = values[self.metric]
        less = self.metric.rpartition("/")[2] in LESS_IS_BETTER
        better = math.isfinite(value) and (self.value is None or (value < self.value if less else value > self.value))
        self._since = 0 if better else self._since + 1
        as_good = better or value == self.value
        if as_good:
            self.step, self.value = step, value
        return as_good

    @property
    def kept(self) -> dict:
        """What a checkpoint says of it: which one stays (checkpoint/store.py), and since how many evaluations."""
        return {} if self.step is None else {"best": self.step, "since": self._since}

    @property
    def exhausted(self) -> bool:
        """Whether it is time to give up."""
        return 0 < self._patience <= self._since
