"""Progress for people: one live line on a terminal, a plain line every few seconds in a log."""

from collections.abc import Callable
from time import monotonic

from rich.console import Console
from rich.live import Live
from rich.text import Text

from runtime.controller import Assembled, Changed, Committed, Ended, Event, Ready, Stepped
from storage.records import StepRecord
from trueweight.journal import mean_loss, validation_accuracy, validation_loss

LOG_SECONDS = 5.0


class Progress:
    """Observer of a controller. Each of `steps` steps consumes `items` of `unit`: tokens or images."""

    def __init__(
        self, console: Console, *, steps: int, items: int, unit: str, clock: Callable[[], float] = monotonic
    ) -> None:
        self._console = console
        self._steps, self._items, self._unit = steps, items, unit
        self._clock = clock
        self._workers = 0
        self._first = 0
        self._since = self._shown = clock()
        self._validation = ""
        self._live: Live | None = None

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case Assembled(workers=workers):
                self._workers = len(workers)
                self._say(f"{counted(len(workers), 'worker')}: {' '.join(workers)}")
            case Changed(what=what, workers=workers):
                self._workers = len(workers)
                self._say(f"{what}; {counted(len(workers), 'worker')} now")
            case Ready(step=step, state_root=root):
                self._first, self._since, self._shown = step, self._clock(), float("-inf")
                self._say(f"state before step {step}: {root.hex()}")
            case Stepped(record=record):
                self._step(record)
            case Committed(segment=segment):
                last = segment.first_step + segment.steps
                self._say(f"segment {segment.index} committed: {last} steps done, state {segment.poststate.hex()[:16]}")
            case Ended():
                self.close()

    def close(self) -> None:
        """End the live line, if there is one."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _step(self, record: StepRecord) -> None:
        loss, accuracy = validation_loss(record), validation_accuracy(record)
        if loss is not None:
            self._validation = f"  validation {loss:.4f}" + (f" ({accuracy:.1%})" if accuracy is not None else "")
        line = self._line(record)
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False, transient=False)
                self._live.start()
            self._live.update(Text(line), refresh=True)
        elif self._clock() - self._shown >= LOG_SECONDS or record.validation or record.step + 1 == self._steps:
            self._shown = self._clock()
            self._say(line)

    def _line(self, record: StepRecord) -> str:
        done = record.step + 1
        each = max(self._clock() - self._since, 1e-9) / (done - self._first)
        left = duration((self._steps - done) * each)
        return (
            f"step {done}/{self._steps}  loss {mean_loss(record):.4f}{self._validation}  "
            f"{self._items / each:,.0f} {self._unit}/s  {counted(self._workers, 'worker')}  {left} left"
        )

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def counted(number: int, what: str) -> str:
    """`1 worker`, `2 workers`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def duration(seconds: float) -> str:
    """`1 h 05 min`, `3 min 20 s` or `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
