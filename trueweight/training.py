"""A controller's run with everything around it: progress, diary, signals, and what is said at the end."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from runtime.controller import Controller, Elastic, Ended, Event, Job
from runtime.groups import WorkerGroup
from runtime.plan import Plan
from runtime.segments import FINISHED, History, run_names
from storage.errors import TrueweightError
from storage.store import Store
from trueweight import wiring
from trueweight.console import print_json, say, tell_from_signal
from trueweight.interrupts import StopRequest
from trueweight.journal import Journal
from trueweight.locks import Lock, check_lock
from trueweight.progress import Progress

INTERRUPTED_EXIT = 130


@dataclass(frozen=True, kw_only=True)
class Training:
    """One job in one store with the observers of its controller; `keys` and `threads` are the workers'.

    `also` is told every event last.
    """

    console: Console
    store: Store
    job: Job
    keys: str
    threads: int
    elastic: Elastic | None = None
    also: Callable[[Event], None] = lambda _: None

    def run(self, group: WorkerGroup, plan: Plan, history: History | None = None) -> Ended:
        """How the run ended: finished, or stopped by a signal. `history` is the run to go on with."""
        unit = wiring.consumed(self.job.feed)
        progress = Progress(self.console, steps=self.job.feed.steps, items=unit.items, unit=unit.name)
        journal = self._journal(unit)

        def observe(event: Event) -> None:
            progress(event)
            journal(event)
            self.also(event)

        try:
            with StopRequest(tell_from_signal) as stop:
                return Controller(
                    store=self.store,
                    job=self.job,
                    group=group,
                    plan=plan,
                    history=history,
                    keys=self.keys,
                    threads=self.threads,
                    elastic=self.elastic,
                    observe=observe,
                    stop=stop,
                ).run()
        except TrueweightError as error:
            if self.job.name in run_names(self.store):
                error.add_note(
                    f"the last checkpoint of run {self.job.name} is as it was: `trueweight show {self.job.name}`"
                )
            raise
        finally:
            progress.close()

    def _journal(self, unit: wiring.Unit) -> Callable[[Event], None]:
        folder = wiring.run_folder(self.store, self.job.name)
        return Journal(folder, items=unit.items) if folder else lambda _: None


def report_end(
    console: Console, ended: Ended, job: Job, *, as_json: bool, store: str, lock: tuple[Path | None, Lock | None]
) -> int:
    """Say how the run ended; its exit code. A state that the lock has otherwise is a FailureError."""
    path, expected = lock
    if ended.status == FINISHED and path and expected:
        check_lock(expected, {**wiring.found_roots(job), "state": ended.state_root.hex()}, path)
    if as_json:
        state = ended.state_root.hex()
        known = {"run": job.name, "status": ended.status, "steps": ended.step, "state": state, "store": store}
        compared = bool(expected) and ended.status == FINISHED
        print_json({**known, **wiring.found_roots(job), "equals_lock": True if compared else None})
    where = "" if store == ".trueweight" else f" --store {store}"
    if ended.status != FINISHED:
        say(console, f"stopped before step {ended.step}; go on with: trueweight resume {job.name}{where}")
        return INTERRUPTED_EXIT
    say(console, f"run {job.name} finished after {ended.step} steps: final state {ended.state_root.hex()}")
    if expected:
        say(console, f"data, program and final state are equal to {path}: this machine produced the published bytes")
    say(console, f"audit it with: trueweight audit {job.name} --all{where}")
    return 0
