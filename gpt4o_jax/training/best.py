"""The best evaluation of a run so far, and early stopping.

Both follow from the records of metrics.jsonl and the checkpoints up to a step, so that a resumed run decides like an
uninterrupted one.
"""

import math
from collections.abc import Container, Iterable

from gpt4o_jax.errors import RunError, did_you_mean

LESS_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "wer", "cer")
STOPPED = "stopped_early"  # in the record of a run's last evaluation if it stopped early


class Best:
    """metric: name of an evaluation metric, "" for none; patience: evaluations without improvement before stopping, 0: never."""

    def __init__(
        self,
        metric: str,
        patience: int,
        records: Iterable[dict] = (),
        steps: Container[int] | None = None,
        since: int | None = None,
    ):
        """records: of a run, up to the step it resumes from. steps: those with a checkpoint; None: all.

        Only evaluations with a checkpoint can be the best: if `metric` was set later, better ones were not kept. since:
        evaluations without improvement, as stored in the checkpoint; None: counted from the records, which is too low if equal
        earlier ones have lost their checkpoints.
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
        """Adds an evaluation; returns whether none before was better. Raises RunError if it lacks the metric.

        Among equals the newest is kept (an exact-match metric may be 0 for long), but patience waits for a better one.
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
        """Entries for a checkpoint's manifest: the best step, to be kept (checkpoint/store.py), and evaluations since."""
        return {} if self.step is None else {"best": self.step, "metric": self.metric, "since": self._since}

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return 0 < self._patience <= self._since
