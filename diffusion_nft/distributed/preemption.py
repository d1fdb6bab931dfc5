"""Stopping on request: SIGTERM by a cluster's scheduler, or Ctrl-C.

The handler only records the signal.  The loops over micro-batches check it, and the ranks agree to
stop in collectives that they need anyway, as a signal may reach only some ranks, or at different
times.  A recorded signal is not cleared before the end of the run, so that a rank that stopped
early always tells the others.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
REASON = "a stop was asked for"

_received: list[int] = []


class Preempted(Exception):
    """The run was asked to stop.  Raised on all ranks at the same point of the program."""

    def __init__(self, reason: str = REASON):
        super().__init__(reason)


def requested() -> bool:
    """True if this process has received a signal within ``stop_on_signals``."""
    return bool(_received)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Within the block, SIGTERM and the first SIGINT request a stop; a second SIGINT kills.

    Main thread only.  The former handlers are restored at the end.
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
        # The default handler kills even while the interpreter waits inside a library.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
