"""Time, for whoever waits: the machine's, or a simulation's."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol


class Clock(Protocol):
    """What a run knows of time. None of it can change a bit."""

    def now(self) -> float:
        """Seconds since some moment."""

    def sleep(self, seconds: float) -> None:
        """Let so much time pass."""

    def beside(self, act: Callable[[], None]) -> "Future[None]":
        """`act` done beside whatever follows: done when it is."""


class WallClock:
    """The machine's own time; what is done beside is done in a thread that no process waits for at its end."""

    def now(self) -> float:
        """See Clock."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """See Clock."""
        time.sleep(seconds)

    def beside(self, act: Callable[[], None]) -> "Future[None]":
        """See Clock."""
        made: Future[None] = Future()

        def run() -> None:
            try:
                act()
            except BaseException as error:  # noqa: BLE001 - it is whoever asks for the result that it is raised for
                made.set_exception(error)
            else:
                made.set_result(None)

        threading.Thread(target=run, name="beside", daemon=True).start()
        return made
