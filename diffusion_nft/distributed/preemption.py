"""Stopping on request: the SIGTERM of a cluster that wants its machines back, or Ctrl-C.

The handler only makes a note.  The loops over micro-batches look at it, and the ranks agree to stop
in exchanges that they make anyway: a signal may reach some of them only, or each at another moment.
A note is never taken back, so a rank that broke off its share always tells the others.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# What a rank tells the others instead of its results.
REASON = "a stop was asked for"

_received: list[int] = []


class Preempted(Exception):
    """The run was asked to stop.  Raised on every rank at the same point of the program."""

    def __init__(self, reason: str = REASON):
        super().__init__(reason)


def requested() -> bool:
    """Whether this process was asked to stop since ``stop_on_signals`` began."""
    return bool(_received)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Within the block SIGTERM and the first SIGINT ask the run to stop; a second SIGINT kills.

    Main thread only.  The former handlers come back at the end.
    """
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def _note(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    if number == signal.SIGINT:
        # The default kills even while the interpreter waits inside a library.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
