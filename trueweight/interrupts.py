"""Ctrl-C and `ray job stop`: the first asks the run to stop at a consistent point, the second ends it at once."""

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, catches SIGINT and SIGTERM. Called, it says whether one has come; the second raises."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._requested = False
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether the run is asked to stop."""
        return self._requested

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        self._tell("stopping after this step; once more to abort at once")
