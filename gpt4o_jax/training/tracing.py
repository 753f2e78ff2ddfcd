"""A trace of some steps for TensorBoard and XProf, as requested by `train --profile=FIRST:LAST`."""

import jax
from etils import epath

from gpt4o_jax.console import say


class Trace:
    """Traces whole dispatches, from the one with step span[0] + 1 to the one with step span[1]; None: no trace.

    If it cannot be written, such as to a lost bucket, a message says so and the run continues.
    """

    def __init__(self, span: tuple[int, int] | None, folder: epath.Path):
        self._span, self._folder, self._first = span, folder, None

    def before(self, first: int, last: int) -> None:
        """Call it before the dispatch of these steps."""
        if self._span and self._first is None and last > self._span[0]:
            jax.profiler.start_trace(str(self._folder))
            self._first = first

    def after(self, last: int, state) -> None:
        """Call it after the dispatch that ends with this step, with the state it returned."""
        if self._first is not None and last >= self._span[1]:
            jax.block_until_ready(state)
            self.end(last)

    def end(self, last: int) -> None:
        """Writes what was traced up to this step, if anything."""
        if self._first is None:
            return
        first, self._first, self._span = self._first, None, None
        try:
            jax.profiler.stop_trace()
        except jax.errors.JaxRuntimeError as e:
            say(f"the profile of steps {first} to {last} cannot be written to {self._folder}: {str(e).splitlines()[0]}")
        else:
            say(f"profile of steps {first} to {last} in {self._folder}")
