"""Investigations put together: the replay, the machine that trained as witness, and the faults that it was given."""

from collections.abc import Callable, Sequence
from pathlib import Path

from runtime.controller import Job
from runtime.executors import Make, named
from runtime.faults import Fault, check_fault, faulty_builder, parse_fault, random_fault
from runtime.feed import Feed
from runtime.groups import LocalGroup, WorkerGroup
from runtime.plan import Plan
from runtime.program.training import TrainingProgram
from runtime.segments import History
from runtime.tracing import traced_builder
from storage.errors import UsageError
from storage.files import make_folder, write_whole
from storage.identity import load_or_create
from storage.store import Store
from trueweight import wiring
from verification.asking import AskedTraces
from verification.audit import Diverged
from verification.pinpoint import Finding, Narrowing, pinpoint, traces_at
from verification.replay import Replay
from verification.traces import ReplayedTraces, TraceProvider, Witness

FAULTS = "faults.txt"
"""In a run's folder: what was injected, for the machine that trained to repeat."""


def investigate(
    store: Store,
    history: History,
    found: Diverged,
    *,
    make: Make,
    threads: int = 1,
    keys: str | None = None,
    witness_url: str = "",
    faults: Sequence[Fault] = (),
    observe: Callable[[str], None] = lambda _: None,
) -> tuple[Finding, Narrowing | None, ReplayedTraces | None]:
    """(the finding for what an audit found, what was asked, the replay's traces).

    `keys` is the folder of the key of the workers' host, which this is; None to ask nobody. At `witness_url`, if there
    is one, their host answers.
    """
    program = TrainingProgram.decode(store.get(history.run.programs))
    feed: Feed = wiring.stored_job(store, history).feed
    replays: list[ReplayedTraces] = []

    def ours(index: int, step: int, plan: Plan) -> TraceProvider:
        def replay() -> Replay:
            return Replay(store, history.run, threads=threads, build=traced_builder(make), plan=plan)

        replays.append(traces_at(history, index, step, replay, observe))
        return replays[0]

    def theirs(index: int, step: int, plan: Plan) -> TraceProvider | None:
        if witness_url:
            return AskedTraces(witness_url, run=history.run_digest, segment=index, step=step)
        if keys is None:
            return None
        return witness(store, history, index, step, plan, keys=keys, make=make, faults=faults, threads=threads)

    finding, narrowing = pinpoint(history, found, program, ours=ours, theirs=theirs, batch=feed.batch, observe=observe)
    return finding, narrowing, replays[0] if replays else None


def witness(
    store: Store,
    history: History,
    segment: int,
    step: int,
    plan: Plan,
    *,
    keys: str,
    make: Make,
    faults: Sequence[Fault] = (),
    threads: int = 1,
) -> TraceProvider | None:
    """The workers of this host, made to repeat the step with whatever was injected into them; None without their key.

    It goes back to the segment before, so that what was kept from the step before is there again.
    """
    key = Path(keys).expanduser() / "worker.key"
    if not key.exists():
        return None
    build = traced_builder(make)
    if faults:
        build = faulty_builder(make, faults, repeating=True, build=traced_builder)
    traces = traces_at(
        history,
        max(segment - 1, 0),
        step,
        lambda: Replay(store, history.run, threads=threads, build=build, plan=plan, keys=str(key.parent)),
    )
    identity = load_or_create(key)
    return Witness(traces, dict.fromkeys(plan.workers, identity), history.run_digest, step)


def injected(store: Store, name: str) -> list[Fault]:
    """The faults that were injected into a run, as its folder says."""
    folder = wiring.run_folder(store, name)
    path = folder / FAULTS if folder else None
    return (
        [parse_fault(line) for line in path.read_text(encoding="utf-8").splitlines()] if path and path.exists() else []
    )


def spoiled(store: Store, job: Job, plan: Plan, texts: Sequence[str], *, local: bool, executor: str) -> WorkerGroup:
    """Workers of this process with faults in them, noted in the run's folder; `random=SEED` draws one.

    UsageError where the recipe does not allow it, or the workers would be others' processes.
    """
    recipe = job.feed.recipe
    if not recipe.faults:
        raise UsageError("--inject: expected a recipe that says `faults = true`; nobody spoils a real run")
    if not local:
        raise UsageError("--inject: expected workers of this process; add --local")
    faults = []
    for text in texts:
        key, _, seed = text.partition("=")
        if key == "random" and seed.isdecimal():
            faults.append(random_fault(job.program, plan, first=0, stop=job.feed.steps, seed=int(seed)))
        else:
            faults.append(parse_fault(text))
        check_fault(faults[-1], job.program, plan, job.feed.steps)
    folder = wiring.run_folder(store, job.name)
    if folder is None:
        raise UsageError("--inject: expected a store in a folder, where the faults are noted; choose another --store")
    make_folder(folder)
    write_whole(folder / FAULTS, "".join(f"{fault}\n" for fault in faults).encode())
    return LocalGroup(faulty_builder(named(executor), faults))
