"""Messages and progress for people, all on stderr: stdout is for results."""

import sys
import time

_START = time.monotonic()
_quiet = False


def quiet() -> None:
    """Silences this process, when another one says the same."""
    global _quiet
    _quiet = True


def say(message: str) -> None:
    """One line on stderr, with the seconds since the start; above the progress bar if there is one."""
    if _quiet:
        return
    from tqdm import tqdm

    tqdm.write(f"[{time.monotonic() - _START:7.1f}s] {message}", file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """A bar with rate and ETA on a terminal; elsewhere nothing (the log lines say the same)."""

    def __init__(self, total: int, done: int):
        """Both in tokens."""
        from tqdm import tqdm

        self._bar = tqdm(
            total=total,
            initial=done,
            unit="tok",
            unit_scale=True,
            file=sys.stderr,
            disable=_quiet or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self.on_terminal = not self._bar.disable

    def update(self, tokens: int, note: str) -> None:
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(tokens - self._bar.n)

    def close(self) -> None:
        self._bar.close()
