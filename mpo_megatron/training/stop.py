"""SIGTERM ends a run after its step, with its state saved: what a scheduler sends before the time is up."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """Whether the run is to end after the step.

    Ranks get the signal at different moments of different steps. So a rank's own request travels with the step's
    metrics, and what all ranks then know is `agreed`.

    Attributes:
        requested: this rank has got the signal.
        agreed: some rank had, at the last step's metrics; the same on all ranks.
    """

    def __init__(self) -> None:
        self.requested = False
        self.agreed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A block in which SIGTERM is a request; a second one ends the process, as it does outside."""
        # Python takes signals in the main thread alone.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGTERM)

        def request(number: int, frame: Any) -> None:
            self.requested = True
            signal.signal(signal.SIGTERM, before)

        signal.signal(signal.SIGTERM, request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
