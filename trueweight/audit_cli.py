"""`trueweight audit`: what to replay, where, and how the verdict is told."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Annotated, Any

import typer
from rich.console import Console

from runtime import executors
from runtime.executors import Make
from runtime.segments import History
from runtime.worker import worker_builder
from storage.errors import TrueweightError, UsageError
from storage.files import write_whole
from storage.store import Store
from trueweight import reports, wiring
from trueweight.auditing import Audited, Auditor, Choice, make_beacon
from trueweight.console import console_for, print_json, tell_from_signal, teller
from trueweight.following import Follower
from trueweight.forecasting import forecast_report, print_forecast
from trueweight.interrupts import StopRequest
from trueweight.investigation import injected, investigate
from trueweight.junit import junit
from trueweight.page import audit_page
from trueweight.pinpoint_cli import finding_report, print_finding
from verification.audit import Diverged, SegmentAudit, Spread, audit
from verification.replay import Replay
from verification.sampling import UNIFORM, Piece

_TICK_SECONDS = 0.05


def audit_command(
    name: Annotated[str, typer.Argument(metavar="RUN", help="A run's name; `trueweight runs` lists them.")],
    store: Annotated[str, typer.Option("--store", metavar="DIR", help="The store: a folder or a URL.")] = ".trueweight",
    every: Annotated[bool, typer.Option("--all", help="Replay every segment.")] = False,
    segments: Annotated[str, typer.Option(metavar="LIST", help="Replay these, such as 3,7.")] = "",
    unit: Annotated[
        str, typer.Option(metavar="LIST", help="Replay what workers signed in a first step, such as 3:s0r1.")
    ] = "",
    count: Annotated[int | None, typer.Option("--sample", metavar="N", help="Draw so many (1 without).")] = None,
    rate: Annotated[float | None, typer.Option(metavar="R", help="Draw this share, such as 0.1.")] = None,
    units: Annotated[bool, typer.Option("--units", help="Draw workers' units of first steps, not segments.")] = False,
    strategy: Annotated[
        str | None, typer.Option(help="uniform; or, of units: stratified (each worker) or risk (new workers).")
    ] = None,
    beacon: Annotated[
        str | None,
        typer.Option(
            metavar="B", help="What decides the draw: HEX, seed (the default), or chained to the last record."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draw, to make the same one again; else random.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Audit a run that goes on, segment by segment.")] = False,
    poll: Annotated[float | None, typer.Option(metavar="S", help="With --follow: seconds between looks (10).")] = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="With --follow: past a divergence.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be replayed and what it takes here, and replay nothing.")
    ] = False,
    workers: Annotated[int, typer.Option(metavar="N", help="Replay segments in so many Ray actors.")] = 1,
    address: Annotated[str | None, typer.Option(help="The Ray cluster for them, HOST:PORT.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of a worker; 0 is all that torch sees.")] = 1,
    executor: Annotated[
        str, typer.Option("--executor", help="compiled or reference: the same bytes.")
    ] = executors.DEFAULT,
    pinpoint: Annotated[bool, typer.Option("--pinpoint", help="Narrow a divergence down at once.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as a page.")] = None,
    junit_file: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="Write the report for build servers.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; progress goes to stderr.")] = False,
) -> int:
    """Replay parts of a run from its stored state and compare.

    Exit code 0 is a match, 1 diverged (at the segment and step that are printed), 2 inconclusive.

    One segment is drawn at random unless told otherwise. The replay needs the store alone, neither the recipe's file
    nor the model's code, and writes nothing there; the report says what it would have missed.

    The beacon decides the draw, so nobody must know it before the run is committed. A chained one follows from the
    last record (with --follow from each segment's own): all draw the same, but whoever writes the records can try
    several until the draw spares a forgery.

    \b
    trueweight audit quickstart
    trueweight audit quickstart --sample 2 --seed 7
    trueweight audit quickstart --segments 0,3
    trueweight audit quickstart --all --workers 4 --json
    trueweight audit quickstart --unit 3:s0r1
    trueweight audit quickstart --units --rate 0.5 --dry-run
    trueweight audit quickstart --rate 0.25 --strategy stratified --html report.html
    trueweight audit quickstart --follow --rate 0.25 --store https://example.org/store
    """
    console, make = console_for(as_json), executors.named(executor)
    ways = {"--all": every, "--segments": segments, "--unit": unit, "--sample": count is not None}
    _one_way(ways | {"--rate": rate is not None})
    drawing = not (every or segments or unit)
    _goes_with({"--seed": seed, "--beacon": beacon, "--strategy": strategy, "--units": units}, drawing, "--rate 0.1")
    choice = Choice(
        named=(*_segments(segments), *_units(unit)),
        every=every,
        units=units,
        strategy=strategy or UNIFORM,
        rate=rate,
        count=count,
        beacon=make_beacon(beacon, seed),
    )
    _goes_with({"--poll": poll is not None, "--keep-going": keep_going}, follow, "--follow")
    if follow and (rate is None or choice.of_units or (poll is not None and poll <= 0)):
        raise UsageError("--follow: expected --rate R, whole segments and a --poll above 0; correct these options")
    remote = workers != 1 or address is not None
    if dry_run and (follow or remote or pinpoint or html or junit_file):
        raise UsageError(
            "--dry-run: expected only what to audit, --executor, --threads and --json with it; drop the others"
        )
    _check_places(workers, remote and (follow or choice.of_units), (html, junit_file))
    objects = wiring.open_folder(store, create=False)
    if dry_run:
        foreseen = forecast_report(
            objects, name, choice, make=make, executor=executor, threads=threads, tell=teller(console)
        )
        _tell(console, foreseen, print_forecast, as_json)
        return 0
    observe = teller(console) if as_json or console.is_terminal else lambda _: None
    auditor = Auditor(
        store=objects,
        name=name,
        replay=partial(_replay, make=make, threads=threads),
        executor=partial(make, threads),
        observe=observe,
        spread=_spread(store, name, executor, threads, workers, address, observe) if remote else None,
    )
    if follow:
        audited = _follow(auditor, choice, console, poll=poll or 10.0, keep_going=keep_going)
    else:
        audited = auditor.run(choice)
    told = reports.audited_report(audited)
    if pinpoint:
        told["divergence"] = _divergence(auditor, audited, make, threads, teller(console))
    _tell(console, told, print_audit, as_json)
    if html is not None:
        write_whole(html, audit_page(_run(objects, name), told, told.get("divergence")).encode())
    if junit_file is not None:
        write_whole(junit_file, junit(told).encode())
    return reports.VERDICTS[type(audited.verdict)][1]


# ----------------------------------------------------------------------------------------------------------- options


def integers(text: str, option: str, expected: str) -> list[int]:
    """The numbers of a list such as 3,7; UsageError naming the option otherwise."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"{option} {text!r}: expected {expected}; correct it")
    return [int(part) for part in parts]


def _segments(text: str) -> list[Piece]:
    numbers = integers(text, "--segments", "segments such as 3,7") if text else []
    return [Piece(number) for number in sorted(set(numbers))]


def _units(text: str) -> list[Piece]:
    pieces = set()
    for part in text.split(",") if text else ():
        segment, colon, worker = part.strip().partition(":")
        if not (segment.isdecimal() and colon and worker):
            raise UsageError(f"--unit {part!r}: expected a segment and a worker such as 3:s0r1; correct it")
        pieces.add(Piece(int(segment), worker))
    return sorted(pieces)


def _one_way(ways: dict[str, object]) -> None:
    given = [option for option, value in ways.items() if value]
    if len(given) > 1:
        raise UsageError(
            f"audit: expected one of --all, --segments 3,7, --unit 3:s0r1, --sample 2 and --rate 0.1, got "
            f"{' and '.join(given)}; drop the others"
        )


def _check_places(workers: int, refused: bool, files: Sequence[Path | None]) -> None:
    """UsageError where there can be no such workers, or a report has no folder."""
    if workers < 1 or refused:
        raise UsageError(
            f"--workers {workers}: expected at least 1, and segments of a run that is not followed; drop --workers "
            f"and --address, or --follow, --unit, --units and --strategy"
        )
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise UsageError(f"{file}: expected a folder to write it in, got none; make the folder first")


def _goes_with(options: dict[str, object], allowed: bool, needed: str) -> None:
    """UsageError where one of the options is given and what it belongs to is not."""
    given = [option for option, value in options.items() if value not in (None, False)]
    if given and not allowed:
        raise UsageError(f"{given[0]}: expected {needed} with it; add that, or drop {' and '.join(given)}")


# ---------------------------------------------------------------------------------------------------------- auditing


def _replay(history: History, *, make: Make, threads: int) -> Replay:
    return Replay(history.store, history.run, threads=threads, build=worker_builder(make))


def _spread(
    store: str,
    name: str,
    executor: str,
    threads: int,
    workers: int,
    address: str | None,
    observe: Callable[[str], None],
) -> Spread:
    def spread(_: History, indexes: Sequence[int]) -> Iterable[SegmentAudit]:
        from verification import actors

        return actors.spread(
            store_url=store,
            name=name,
            indexes=indexes,
            executor=executor,
            threads=threads,
            workers=workers,
            address=address,
            observe=observe,
        )

    return spread


def _follow(auditor: Auditor, choice: Choice, console: Console, *, poll: float, keep_going: bool) -> Audited:
    with StopRequest(tell_from_signal) as stop:

        def wait() -> None:
            until = monotonic() + poll
            while not stop() and (left := until - monotonic()) > 0:
                sleep(min(left, _TICK_SECONDS))

        follower = Follower(
            auditor=auditor,
            rate=choice.rate or 1.0,
            beacon=choice.beacon,
            keep_going=keep_going,
            tell=teller(console),
            wait=wait,
            stop=stop,
        )
        return follower.run()


def _divergence(
    auditor: Auditor, audited: Audited, make: Make, threads: int, tell: Callable[[str], None]
) -> dict[str, Any] | None:
    """What `trueweight pinpoint` says of the first divergence; None without one, or where it cannot be narrowed."""
    found, store = audited.verdict, auditor.store
    if not isinstance(found, Diverged):
        return None
    try:
        if unit := next((unit for unit in audited.units if unit.verdict == found), None):
            whole = audit(store, auditor.name, lambda *_: [unit.index], replay=auditor.replay)
            if not isinstance(whole.verdict, Diverged):
                tell(f"not narrowed down: segment {unit.index} as a whole is {reports.verdict_name(whole.verdict)}")
                return None
            found = whole.verdict
        finding, _, _ = investigate(
            store,
            History.open(store, auditor.name),
            found,
            make=make,
            threads=threads,
            keys=wiring.KEYS,
            faults=injected(store, auditor.name),
            observe=auditor.observe,
        )
    except TrueweightError as error:
        tell(f"not narrowed down: {error}")
        return None
    return finding_report(finding)


def _run(store: Store, name: str) -> dict[str, Any]:
    """What the page says of the run, as far as it can be read."""
    try:
        return reports.run_report(History.open(store, name))
    except TrueweightError:
        return {}


# ----------------------------------------------------------------------------------------------------------- telling


def _tell(
    console: Console, told: dict[str, Any], show: Callable[[Callable[[str], None], dict[str, Any]], None], as_json: bool
) -> None:
    """A report for programs or for people."""
    if as_json:
        print_json(told)
    else:
        show(teller(console), told)


def print_audit(tell: Callable[[str], None], told: dict[str, Any]) -> None:
    """The report for people."""
    if told["segments"]:
        columns = {"index": "segment", "worker": "worker", "steps_replayed": "steps replayed"}
        columns |= {"units_replayed": "units replayed", "prestate": "prestate", "poststate": "poststate"}
        columns |= {"receipts": "receipts", "verdict": "verdict"}
        present = {key: head for key, head in columns.items() if any(key in row for row in told["segments"])}
        tell(reports.table(told["segments"], present))
    sample = told["sample"] or {"of": "segments", "strategy": None}
    if sample["of"] == "units":
        receipts = "1 receipt" if len(told["segments"]) == 1 else f"{len(told['segments'])} receipts"
        tell(f"replayed what {receipts} of first steps say: {told['units_replayed']} units")
    else:
        tell(f"replayed {told['replayed']} of {told['total']} segments")
    tell(f"cost: {_cost(told, sample)}")
    if told["total"] < told["planned"]:
        tell(f"the run has committed {told['total']} of the {told['planned']} segments of its recipe")
    if sample["strategy"]:
        _print_sample(tell, told, sample)
    tell(f"verdict: {told['verdict']}")
    for key in ("path", "expected", "actual", "reason"):
        if key in told:
            tell(f"  {key}: {told[key]}")
    if told.get("divergence"):
        print_finding(tell, told["divergence"])


def _cost(told: dict[str, Any], sample: dict[str, Any]) -> str:
    steps = f"{told['steps_replayed']:.4g} steps"
    if told["steps"]:
        steps = f"{told['steps_replayed']:.4g} of {told['steps']} steps ({sample['cost']:.1%})"
    parts = [steps, f"{told['seconds']:.1f} s"]
    if told["fetched_bytes"] is not None:
        parts.append(f"{told['fetched_bytes'] / 1e6:.1f} MB fetched")
    if told["peak_bytes"] is not None:
        parts.append(f"at most {told['peak_bytes'] / 1e6:.0f} MB of memory")
    return ", ".join(parts)


def _print_sample(tell: Callable[[str], None], told: dict[str, Any], sample: dict[str, Any]) -> None:
    how = f"--rate {sample['rate']:g}" if sample["rate"] else f"--sample {sample['count']}"
    strategies = {"stream": " --follow", "uniform": " --units" if sample["of"] == "units" else ""}
    how += strategies.get(sample["strategy"], f" --strategy {sample['strategy']}")
    by = {"seed": f"--seed {told['seed']}", "given": f"--beacon {sample['beacon']}", "chained": "--beacon chained"}
    tell(f"drew {sample['count']} of {sample['candidates']} {sample['of']} with {how} {by[sample['beacon_from']]}")
    of = "segments" if sample["of"] == "segments" else "units of first steps"
    rows = [
        {"share": f"{row['share']:.0%}", "forged": row["forged"], "missed": f"{row['probability']:.1%}"}
        for row in sample["missed"]
    ]
    if rows:
        tell(reports.table(rows, {"share": "if forged", "forged": of, "missed": "chance of missing all"}))
    else:
        tell("what this may have missed is not known: not all that was drawn could be replayed")
