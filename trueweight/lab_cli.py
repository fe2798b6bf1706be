"""`trueweight diff` and `trueweight selfcheck`: for those who trust everybody and look for what computes otherwise."""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from runtime import executors
from runtime.memory import available
from runtime.plan import Plan
from runtime.segments import History
from runtime.worker import worker_builder
from storage import merkle
from storage.errors import FailureError, TrueweightError, UsageError
from storage.files import file_failure
from storage.store import Store
from trueweight import reports, wiring
from trueweight.console import console_for, print_json, say, tell_from_signal, teller
from trueweight.interrupts import StopRequest
from trueweight.investigation import injected, investigate
from trueweight.pinpoint_cli import finding_report, print_finding
from trueweight.progress import counted, duration
from verification.compare import Comparison, Differ, Equal, Incomparable, Place, UnitDifference, compare, judge
from verification.replay import Replay
from verification.selfcheck import (
    PATTERNS,
    Mismatch,
    ProcessCore,
    RunPrograms,
    Soaked,
    Vectors,
    Workload,
    host_cores,
    soak,
)

OUTCOMES: dict[type, tuple[str, int]] = {Equal: ("equal", 0), Differ: ("differ", 1), Incomparable: ("incomparable", 2)}
"""Each outcome's name and exit code."""
LOG_SECONDS = 10.0

ExecutorName = Annotated[str, typer.Option("--executor", help="compiled or reference: the same bytes.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object; progress goes to stderr.")]


# --------------------------------------------------------------------------------------------------------------- diff


def diff_command(
    a: Annotated[str, typer.Argument(metavar="RUN_A", help="A run's name; `trueweight runs` lists them.")],
    b: Annotated[str, typer.Argument(metavar="RUN_B", help="Another run of the same recipe.")],
    store: Annotated[str, typer.Option("--store", metavar="DIR", help="The store: a folder or a URL.")] = ".trueweight",
    other_store: Annotated[
        str | None, typer.Option(metavar="DIR", help="The store of RUN_B, a folder or a URL, if it is another.")
    ] = None,
    operators: Annotated[
        bool, typer.Option("--operators", help="Replay the step here, and say which run is right, and the operator.")
    ] = False,
    keys: Annotated[
        str, typer.Option(metavar="DIR", help="With --operators: the key of the workers' host, if this is it.")
    ] = wiring.KEYS,
    threads: Annotated[int, typer.Option(help="With --operators: threads; 0 is all.")] = 1,
    executor: ExecutorName = executors.DEFAULT,
    as_json: AsJson = False,
) -> int:
    """Find the first difference of two runs of one recipe: of two machines, versions or placements.

    Compares what was recorded, from the recipe down to the unit and the element; nothing is replayed. Exit code 0
    where the runs are equal as far as both go, 1 where they differ, 2 where they could not be compared.

    \b
    trueweight diff quickstart quickstart-2
    trueweight diff quickstart quickstart --other-store s3://bucket/runs
    trueweight diff quickstart quickstart-2 --operators
    """
    console, make = console_for(as_json), executors.named(executor)
    stores = [wiring.open_folder(folder, create=False) for folder in (store, other_store or store)]
    found = compare(stores[0], a, stores[1], b, observe=teller(console) if as_json else lambda _: None)
    told = comparison_report(found)
    if operators and isinstance(found.outcome, Differ):
        told["replays"] = [
            _replayed(objects, name, found.outcome, make=make, threads=threads, keys=keys, tell=teller(console))
            for objects, name in zip(stores, (a, b), strict=True)
        ]
    if as_json:
        print_json(told)
    else:
        _print_comparison(console, told)
    return OUTCOMES[type(found.outcome)][1]


def comparison_report(found: Comparison) -> dict[str, Any]:
    """The comparison as JSON values."""
    told: dict[str, Any] = {
        "runs": list(found.runs),
        "verdict": OUTCOMES[type(found.outcome)][0],
        "steps": found.steps,
        "lengths": list(found.lengths),
        "units": found.units,
        "notes": list(found.notes),
    }
    match found.outcome:
        case Differ() as differ:
            told |= {"path": differ.path, "reason": differ.reason}
            told |= {"levels": _places(differ.levels), "state": _places(differ.state)}
            told["unit"] = _unit(differ.unit) if differ.unit else None
        case Incomparable(reason=reason):
            told["reason"] = reason
    return told


def _places(places: Sequence[Place]) -> list[dict[str, Any]]:
    return [asdict(place) for place in places]


def _unit(unit: UnitDifference) -> dict[str, Any]:
    blocks = {"blocks": [unit.blocks.start, unit.blocks.stop]}
    return {**vars(unit), **blocks, "signers": [list(signers) for signers in unit.signers]}


def _replayed(
    store: Store,
    name: str,
    found: Differ,
    *,
    make: executors.Make,
    threads: int,
    keys: str,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """What a replay here says of one run's step, down to the operator where its workers can be asked."""
    told: dict[str, Any] = {"run": name, "agrees": None, "reason": "", "finding": None}
    if found.segment is None or found.step is None:
        return told | {"reason": "the difference is in no step, so there is none to replay"}
    history = History.open(store, name)

    def replay(plan: Plan | None) -> Replay:
        return Replay(store, history.run, threads=threads, build=worker_builder(make), plan=plan)

    try:
        judged = judge(history, found.segment, found.step, replay, tell)
        told["agrees"] = judged.agrees
        if judged.unit:
            told["reason"] = f"{judged.unit}: expected {judged.unit.expected}, got {judged.unit.actual}"
        if judged.fact and found.segment < len(history.segments()):
            faults = injected(store, name)
            finding, _, _ = investigate(
                store, history, judged.fact, make=make, threads=threads, keys=keys, faults=faults, observe=tell
            )
            told["finding"] = finding_report(finding)
        elif judged.fact:
            told["reason"] = f"{judged.fact.path}: expected {judged.fact.expected}, got {judged.fact.actual}"
    except TrueweightError as error:
        told["reason"] = str(error)
    return told


def _print_comparison(console: Console, told: dict[str, Any]) -> None:
    for name, run, steps in zip("AB", told["runs"], told["lengths"], strict=True):
        say(console, f"{name}: {run}, {counted(steps, 'step')}")
    for note in told["notes"]:
        say(console, note)
    _print_places(console, told.get("levels", []))
    for name, signers in zip("AB", (told.get("unit") or {}).get("signers", []), strict=False):
        say(console, f"signed in {name} by {', '.join(signers)}")
    _print_places(console, told.get("state", []))
    if told.get("reason"):
        say(console, told["reason"])
    for name, replayed in zip("AB", told.get("replays", []), strict=False):
        agrees = {True: "agrees with this machine", False: "does not agree with this machine", None: "was not replayed"}
        say(console, f"{name} {agrees[replayed['agrees']]}" + (f": {replayed['reason']}" if replayed["reason"] else ""))
        if replayed["finding"]:
            print_finding(lambda line: say(console, f"  {line}"), replayed["finding"])
    equal = f"{counted(told['steps'], 'step')} and {told['units']} signed values are equal"
    verdict = told["verdict"]
    say(console, f"verdict: {verdict}" + (f" at {told['path']}" if "path" in told else "") + f"; {equal}")


def _print_places(console: Console, places: list[dict[str, Any]]) -> None:
    for depth, place in enumerate(places):
        say(console, f"{'  ' * depth}{place['level']}: {place['at']}")
        if place["a"] or place["b"]:
            say(console, f"{'  ' * depth}  A {reports.cell(place['a'])}, B {reports.cell(place['b'])}")


# ---------------------------------------------------------------------------------------------------------- selfcheck


def selfcheck_command(
    hours: Annotated[float, typer.Option(help="Go on for so long.", min=0.0)] = 0.0,
    rounds: Annotated[int, typer.Option(help=f"Do so many rounds; without --hours {2 * PATTERNS}.", min=0)] = 0,
    run: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="Soak with this run's Programs; else with the vectors.")
    ] = None,
    store: Annotated[str, typer.Option("--store", metavar="DIR", help="The run's store.")] = ".trueweight",
    executor: ExecutorName = executors.DEFAULT,
    threads: Annotated[int, typer.Option(help="Cores to load, one process on each; 0 is all.", min=0)] = 0,
    memory: Annotated[int, typer.Option(help="MiB that each core writes and reads again every round.", min=0)] = 64,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append every mismatch to this file at once, as a JSON line.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Soak this host: the same work on every core, again and again, every result compared to the byte.

    Every round is forward, backward, loss and update on operands of another pattern, and a stretch of memory. A result
    that is not the first pass's, or the known answer, is run again with traces and told with core, operator and
    element. Exit code 0 without a mismatch, 1 with one, 2 where it could not run. Ctrl-C ends it with what was done.

    \b
    trueweight selfcheck
    trueweight selfcheck --hours 8 --run quickstart --log selfcheck.jsonl
    """
    console, make = console_for(as_json), executors.named(executor)
    if hours and rounds:
        raise UsageError("selfcheck: expected one of --hours and --rounds; drop the other")
    limit, seconds = (math.inf if hours else rounds or 2 * PATTERNS), hours * 3600 or math.inf
    numbers = host_cores()
    if threads > len(numbers):
        raise UsageError(f"--threads {threads}: expected at most {len(numbers)}, the cores of this host; correct it")
    numbers = numbers[: threads or None]
    workload = _workload(run, store)
    record = _recorder(log, console)
    progress = _Progress(console, rounds=limit, seconds=seconds)
    started = monotonic()
    soaked = Soaked(cores=tuple(numbers))
    cores: list[ProcessCore] = []
    stop = StopRequest(lambda _: tell_from_signal("stopping after this round; once more to abort at once"))
    with stop:
        try:
            _room(len(numbers), memory)
            cores += [ProcessCore(number, workload, make, memory) for number in numbers]
            for core in cores:
                core.ready()
            say(console, f"{counted(len(cores), 'core')}, {memory} MiB each, {executor} executor: {run or 'vectors'}")
            soaked = soak(
                cores,
                workload,
                memory=memory,
                more=lambda state: state.rounds < limit and monotonic() - started < seconds and not stop(),
                record=record,
                observe=progress,
            )
        except FailureError as error:
            soaked = Soaked(cores=tuple(numbers), reason=str(error))
        finally:
            progress.close()
            for core in cores:
                core.stop()
    told = soak_report(soaked, interrupted=stop())
    if as_json:
        print_json(told)
    else:
        _print_soak(console, told)
    return 1 if soaked.mismatches else 2 if soaked.reason else 0


def _workload(run: str | None, store: str) -> Workload:
    if run is None:
        return Vectors()
    objects = wiring.open_folder(store, create=False)
    job = wiring.stored_job(objects, History.open(objects, run))
    return RunPrograms.of(job.program, job.feed)


def _room(cores: int, memory: int) -> None:
    """FailureError where the host has not that much memory to give."""
    free = available()
    if free is not None and cores * memory << 20 > free:
        raise FailureError(
            f"expected {cores * memory} MiB for {cores} cores, got {free >> 20} MiB available; "
            "give it a smaller --memory, or less --threads"
        )


def _recorder(log: Path | None, console: Console) -> Callable[[Mismatch], None]:
    """Tells of a mismatch, and appends it to the log so that nothing can lose it."""

    def record(mismatch: Mismatch) -> None:
        told = mismatch_report(mismatch)
        if log is not None:
            try:
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(told) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise file_failure("writing", log, error) from error
        for line in _mismatch_lines(told):
            say(console, line)

    if log is not None and not log.parent.is_dir():
        raise UsageError(f"--log {log}: expected a folder at {log.parent}, got none; make it, or choose another")
    return record


def soak_report(soaked: Soaked, *, interrupted: bool) -> dict[str, Any]:
    """The soak as JSON values."""
    failures = {core: sum(one.core == core for one in soaked.mismatches) for core in soaked.cores}
    return {
        "verdict": "mismatch" if soaked.mismatches else "not run" if soaked.reason else "no mismatch",
        "interrupted": interrupted,
        "rounds": soaked.rounds,
        "units": soaked.units,
        "seconds": soaked.seconds,
        "units_per_second": soaked.units / soaked.seconds if soaked.seconds else 0.0,
        "cores": [{"core": core, "mismatches": count} for core, count in failures.items()],
        "mismatches": [mismatch_report(one) for one in soaked.mismatches],
        "patterns": list(soaked.patterns),
        "digest": merkle.list_root(list(map(bytes.fromhex, soaked.patterns))).hex(),
        "reason": soaked.reason,
    }


def mismatch_report(mismatch: Mismatch) -> dict[str, Any]:
    """A mismatch as JSON values."""
    told = asdict(mismatch)
    for side in ("expected", "actual"):
        if told[side]:
            value, bits = told[side]
            told[side] = {"value": value if not isinstance(value, float) or math.isfinite(value) else str(value)}
            told[side]["bits"] = bits
    return told


def _mismatch_lines(told: dict[str, Any]) -> list[str]:
    lines = [f"MISMATCH on core {told['core']}, round {told['round']}, pattern {told['pattern']}: {told['unit']}"]
    if told["operator"]:
        label = f" ({told['label']})" if told["label"] else ""
        at = f", element [{', '.join(map(str, told['index']))}]" if told["expected"] else ""
        lines.append(f"  {told['seen']} {told['number']} {told['operator']}{label}{at}")
    if told["expected"]:
        shown = [f"{told[side]['value']} ({told[side]['bits']})" for side in ("expected", "actual")]
        lines.append(f"  expected {shown[0]}, got {shown[1]}")
    lines.append(f"  wrong again in {told['repeated']} of {told['repeats']} further runs on that core")
    return lines + ([f"  {told['reason']}"] if told["reason"] else [])


def _print_soak(console: Console, told: dict[str, Any]) -> None:
    say(console, reports.table(told["cores"], {"core": "core", "mismatches": "mismatches"}))
    ended = "ended by Ctrl-C after" if told["interrupted"] else "done:"
    rate = f"{told['units_per_second']:,.0f} units/s, {duration(told['seconds'])}"
    say(console, f"{ended} {counted(told['rounds'], 'round')}, {told['units']} units, {rate}")
    if told["patterns"]:
        say(console, f"{counted(len(told['patterns']), 'pattern')} of operands: {told['digest']}, as on every host")
    say(console, f"verdict: {told['verdict']}" + (f": {told['reason']}" if told["reason"] else ""))


class _Progress:
    """One live line on a terminal, a plain line every few seconds in a log."""

    def __init__(self, console: Console, *, rounds: float, seconds: float) -> None:
        self._console, self._rounds, self._seconds = console, rounds, seconds
        self._shown = float("-inf")
        self._live: Live | None = None

    def __call__(self, state: Soaked) -> None:
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False, transient=True)
                self._live.start()
            self._live.update(Text(self._line(state)), refresh=True)
        elif state.seconds - self._shown >= LOG_SECONDS:
            self._shown = state.seconds
            say(self._console, self._line(state))

    def close(self) -> None:
        """End the live line, if there is one."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _line(self, state: Soaked) -> str:
        each = state.seconds / state.rounds
        left = min((self._rounds - state.rounds) * each, self._seconds - state.seconds)
        of = f"/{self._rounds}" if math.isfinite(self._rounds) else ""
        return (
            f"round {state.rounds}{of}  {state.units / max(state.seconds, 1e-9):,.0f} units/s  "
            f"{len(state.mismatches)} mismatch{'' if len(state.mismatches) == 1 else 'es'}  "
            f"{duration(max(left, 0))} left"
        )
