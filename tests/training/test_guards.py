"""A signal stops a run after the dispatch, whatever it interrupts."""

import signal

from gpt4o_jax.training.guards import StopSignal


def test_a_signal_that_interrupts_a_write_to_stderr_is_received_though_it_cannot_be_told():
    """Python then refuses a write within the write."""

    def interrupted(message):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    with StopSignal(interrupted) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == "SIGTERM"


def test_a_signal_is_told():
    told = []
    with StopSignal(told.append) as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # within half a second: by the launcher, to the group and to this process
    assert stop.received == "SIGINT" and len(told) == 1 and told[0].startswith("SIGINT: finishing the dispatch")
