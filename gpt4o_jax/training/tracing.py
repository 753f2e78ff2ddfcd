"""A trace of some steps for TensorBoard and XProf, as requested by `train --profile=FIRST:LAST`."""

import tempfile
from pathlib import Path

import jax
from etils import epath

from gpt4o_jax.console import say
from gpt4o_jax.errors import storage_error
from gpt4o_jax.paths import is_local, upload


class Trace:
    """Traces whole dispatches, from the one with step span[0] + 1 to the one with step span[1]; None: no trace.

    If it cannot be written, such as to a lost bucket, a message says so and the run continues.
    """

    def __init__(self, span: tuple[int, int] | None, folder: epath.Path):
        self._span, self._folder, self._first = span, folder, None
        self._here: tempfile.TemporaryDirectory | None = None  # for gs://, where jaxlib has another login than epath

    def before(self, first: int, last: int) -> None:
        """Call it before the dispatch of these steps."""
        if self._span and self._first is None and last > self._span[0]:
            self._here = None if is_local(self._folder) else tempfile.TemporaryDirectory(prefix="profile")
            jax.profiler.start_trace(self._here.name if self._here else str(self._folder))
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
            if self._here is not None:
                upload(Path(self._here.name), self._folder)
        except Exception as e:
            told = e if isinstance(e, jax.errors.JaxRuntimeError) else storage_error(e)
            if told is None:
                raise
            say(f"the profile of steps {first} to {last} cannot be written to {self._folder}: {str(told).splitlines()[0]}")
        else:
            say(f"profile of steps {first} to {last} in {self._folder}")
        finally:
            if self._here is not None:
                self._here.cleanup()
