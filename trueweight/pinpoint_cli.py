"""`trueweight pinpoint`, `trueweight evidence` and `run --inject`: where a run left its recipe, and who signed it."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from runtime import executors
from runtime.segments import History
from runtime.worker import worker_builder
from storage.codec import encode
from storage.errors import UsageError
from storage.files import file_failure, write_whole
from trueweight import reports, wiring
from trueweight.auditing import peak_bytes
from trueweight.console import console_for, print_json, say, teller
from trueweight.investigation import injected, investigate
from verification.audit import Diverged, Match, audit
from verification.evidence import check_evidence, make_evidence, read_evidence
from verification.pinpoint import Finding
from verification.replay import Replay

MEANINGS = {
    "software or fraud": "the worker repeats it, so it is in its software or on purpose; what it signed proves it",
    "hardware fault": "the worker does not repeat it: test its memory and processor, and do not train on it",
    "unavailable": "the worker could not be asked; what it signed shows the unit and no more",
    "record": "no worker's receipt is wrong: the records were put together wrongly",
}
evidence_app = typer.Typer(help="Check files of evidence.", no_args_is_help=True, rich_markup_mode=None)


def pinpoint_command(
    name: Annotated[str, typer.Argument(metavar="RUN", help="A run's name; `trueweight runs` lists them.")],
    segment: Annotated[
        int | None, typer.Option(help="The segment that diverged; without, the first that does.")
    ] = None,
    store: Annotated[str, typer.Option("--store", metavar="DIR", help="The store: a folder or a URL.")] = ".trueweight",
    keys: Annotated[
        str, typer.Option(metavar="DIR", help="The key of the workers' host, with which it signs its answers.")
    ] = wiring.KEYS,
    ask: Annotated[bool, typer.Option("--ask/--no-ask", help="Ask the workers, whose host this is, to repeat.")] = True,
    witness: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Ask elsewhere: what `trueweight witness` printed where they trained."),
    ] = "",
    evidence: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the evidence to a file.")] = None,
    threads: Annotated[int, typer.Option(help="Threads; 0 is all.")] = 1,
    executor: Annotated[
        str, typer.Option("--executor", help="compiled or reference: the same bytes.")
    ] = executors.DEFAULT,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; progress goes to stderr.")] = False,
) -> int:
    """Find where a run left its recipe: step, worker, unit, operator, element, and the signature under it.

    Replays the segment, compares what every worker signed with a replay on the same plan, then asks the worker at
    fault to repeat itself and follows its answers down to the first element that is wrong. Exit code 0 where the run
    matches, 1 where a divergence was found, 2 where the replay could not be made.

    \b
    trueweight pinpoint quickstart
    trueweight pinpoint quickstart --segment 3 --evidence quickstart.evidence
    trueweight pinpoint quickstart --witness http://trainer:8710/6yZk0vVdWw2c
    """
    console, make, started = console_for(as_json), executors.named(executor), perf_counter()
    tell = teller(console)
    if witness and not ask:
        raise UsageError("--no-ask asks nobody, --witness somebody: expected one of them; drop the other")
    objects = wiring.open_folder(store, create=False)
    history = History.open(objects, name)
    total = len(history.segments())
    if segment is not None and not 0 <= segment < total:
        raise UsageError(f"--segment {segment}: expected a segment below {total}; see `trueweight show {name}`")

    @cache
    def machine() -> Replay:
        return Replay(objects, history.run, threads=threads, build=worker_builder(make))

    found = None
    for index in range(total) if segment is None else [segment]:
        report = audit(objects, name, lambda *_, index=index: [index], replay=lambda _: machine(), observe=tell)
        found = report.verdict
        if not isinstance(found, Match):
            break
    if not isinstance(found, Diverged):
        told: dict[str, Any] = {"run": name, **reports.verdict_report(found or Match())}
        if as_json:
            print_json(told)
        else:
            say(console, f"verdict: {told['verdict']}" + (f": {told['reason']}" if "reason" in told else ""))
        return reports.VERDICTS[type(found or Match())][1]
    machine.cache_clear()  # its memory goes to those that are asked
    finding, narrowing, traces = investigate(
        objects,
        history,
        found,
        make=make,
        threads=threads,
        keys=keys if ask else None,
        witness_url=witness,
        faults=injected(objects, name),
        observe=tell,
    )
    told = finding_report(finding)
    told["seconds"], told["peak_bytes"] = seconds, peak = perf_counter() - started, peak_bytes()
    if evidence is not None:
        if narrowing is None or "receipt" not in narrowing.answers:
            tell(f"{evidence}: not written: {finding.reason}, so no worker's signature is under it")
        else:
            write_whole(evidence, encode(make_evidence(finding, narrowing, traces.state if traces else None)))
            told["evidence"] = str(evidence)
    if as_json:
        print_json(told)
    else:
        print_finding(lambda line: say(console, line), told)
        say(console, f"cost: {seconds:.1f} s, at most {peak / 1e6:.0f} MB of memory")
    return 1


def finding_report(finding: Finding) -> dict[str, Any]:
    """The finding as JSON values."""
    told: dict[str, Any] = {
        "run": finding.run,
        "segment": finding.segment,
        "cause": finding.cause,
        "repeat": finding.repeat,
        "reason": finding.reason,
        "path": [vars(level) for level in finding.path],
        "worker": finding.worker,
        "address": finding.address,
        "signature": finding.signature,
    }
    if finding.element:
        element = finding.element
        told |= {"operator": element.operator, "number": element.number, "label": element.label}
        told |= {"index": list(element.index), "shape": list(element.shape)}
        for side, (value, bits) in (("expected", element.expected), ("actual", element.actual)):
            shown = value if not isinstance(value, float) or abs(value) < float("inf") else str(value)
            told[side] = {"value": shown, "bits": bits}
    return told


def print_finding(tell: Callable[[str], None], told: dict[str, Any]) -> None:
    """The finding for people."""
    for depth, level in enumerate(told["path"]):
        tell(f"{'  ' * depth}{level['level']}: {level['at']}")
        if level["expected"]:
            tell(f"{'  ' * depth}  expected {reports.cell(level['expected'])}, got {reports.cell(level['actual'])}")
    if told["worker"]:
        tell(f"signed by worker {told['worker']} {told['address']}")
    if told["reason"]:
        tell(told["reason"])
    tell(f"cause: {told['cause']} ({MEANINGS[told['cause']]})")
    if "evidence" in told:
        tell(f"evidence: {told['evidence']}; anybody checks it with: trueweight evidence check {told['evidence']}")


@evidence_app.command("check")
def check_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file of evidence.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Check a file of evidence: signatures, inclusion in what was committed, and the operator computed again.

    Needs no store and no network. Compare the run's digest with the one that you know. Exit code 0 where it shows what
    it says, 1 where it does not, 64 where it is no evidence.

    \b
    trueweight evidence check quickstart.evidence
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise file_failure("reading", file, error) from error
    shown = check_evidence(read_evidence(data))
    told = {
        "run": shown.run.hex(),
        "segment": shown.segment.hex(),
        "step": shown.step,
        "worker": shown.worker,
        "address": f"0x{shown.address.hex()}",
        "proven": shown.proven,
        "claim": shown.claim,
    }
    if as_json:
        return print_json(told)
    print(f"run {told['run']}, segment {told['segment']}, step {told['step']}")
    print(f"worker {told['worker']} {told['address']} signed its receipt and its answers, and they are as committed")
    print(f"claim: {told['claim']}")
    print(f"proven here: {told['proven']}" if told["proven"] else "what is right takes a replay: `trueweight pinpoint`")
    return 0
