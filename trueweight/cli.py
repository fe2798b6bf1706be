"""The commands. Exit codes: 0 done; 1 diverged or damaged, 2 inconclusive; 64 usage; 70 failure; 130 Ctrl-C."""

import secrets
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.exceptions import TyperException

from runtime import executors, recipe_keys
from runtime.controller import Ended, Job
from runtime.doctor import examine
from runtime.plan import Plan, make_plan
from runtime.program import vectors
from runtime.recipe import load_recipe
from runtime.segments import FINISHED, History
from runtime.worker import worker_builder
from storage.errors import FailureError, TrueweightError, UsageError
from trueweight import investigation, pinpoint_cli, reports, store_cli, wiring
from trueweight.console import console_for, print_json, say, teller, writer
from trueweight.locks import check_lock, read_lock, write_lock
from trueweight.training import INTERRUPTED_EXIT, Training, report_end
from verification.audit import SegmentAudit, audit
from verification.replay import Replay
from verification.sampling import sample

app = typer.Typer(
    name="trueweight",
    help="Training whose weights can be proved: the recipe determines the bits, and anyone can replay them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(store_cli.app, name="store")
app.command("pinpoint")(pinpoint_cli.pinpoint_command)
app.add_typer(pinpoint_cli.evidence_app, name="evidence")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in TOML.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name; `trueweight runs` lists them.")]
StoreFolder = Annotated[str, typer.Option("--store", metavar="DIR", help="The store: a folder or a URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object; progress goes to stderr.")]
Replicas = Annotated[int, typer.Option(help="Replicas of each stage.")]
Stages = Annotated[int, typer.Option(help="Pipeline stages.")]
Shares = Annotated[str, typer.Option(help="Micro-batches by replica, such as 3,1; even without.")]
Threads = Annotated[int, typer.Option(help="Threads of a worker; 0 is all that torch sees.")]
ExecutorName = Annotated[str, typer.Option("--executor", help="compiled or reference: the same bytes.")]
Address = Annotated[str | None, typer.Option(help="A Ray cluster, HOST:PORT; else RAY_ADDRESS; else one is started.")]
Local = Annotated[bool, typer.Option("--local", help="Run the workers in this process, without Ray.")]
Keys = Annotated[str, typer.Option(metavar="DIR", help="Folder of each host's worker key.")]
LockFile = Annotated[Path | None, typer.Option("--lock", metavar="FILE", help="Roots that the run must give.")]


@app.command()
def run(
    recipe: RecipePath,
    store: StoreFolder = ".trueweight",
    name: Annotated[str | None, typer.Option(help="The run's name; the recipe's without.")] = None,
    replicas: Replicas = 1,
    stages: Stages = 1,
    shares: Shares = "",
    threads: Threads = 1,
    executor: ExecutorName = executors.DEFAULT,
    address: Address = None,
    local: Local = False,
    lock: LockFile = None,
    keys: Keys = wiring.KEYS,
    inject: Annotated[
        list[str] | None, typer.Option(metavar="FAULT", help="Spoil the run; see docs/pinpoint.md. With --local.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Train a recipe. Where and by how many workers changes no bit.

    Without --address and RAY_ADDRESS a Ray cluster is started on this machine and ends with the command. Ctrl-C
    finishes the step and saves; `trueweight resume` goes on from there.

    \b
    trueweight run recipes/quickstart.toml --replicas 2 --stages 2
    trueweight run recipes/quickstart.toml --lock recipes/quickstart.lock.toml
    trueweight run my.toml --address 10.0.0.1:6379 --replicas 4 --shares 3,3,1,1
    trueweight run faulty.toml --local --inject kind=skip,step=3,micro_batch=1
    """
    console = console_for(as_json)
    read = load_recipe(recipe)
    expected = read_lock(lock) if lock else None
    parts = _shares(shares)
    make_plan(blocks=max(stages, 1), stages=stages, replicas=replicas, micro_batches=1, shares=parts)
    objects = wiring.open_folder(store, create=True)
    chosen = wiring.choose_name(objects, name, default=read.name)
    with (
        objects.writing(f"run {chosen}"),
        wiring.worker_group(local=local, address=address, executor=executor, tell=teller(console)) as group,
    ):
        job = wiring.prepare_job(objects, read, name=chosen, folder=recipe.parent, tell=teller(console))
        if expected and lock:
            check_lock(expected, wiring.found_roots(job), lock)
        plan = _plan(job, stages=stages, replicas=replicas, shares=parts)
        if inject:
            group = investigation.spoiled(objects, job, plan, inject, local=local, executor=executor)
        training = Training(console=console, store=objects, job=job, keys=keys, threads=threads)
        ended = training.run(group, plan)
    return report_end(console, ended, job, as_json=as_json, store=store, lock=(lock, expected))


@app.command()
def resume(
    name: RunName,
    store: StoreFolder = ".trueweight",
    replicas: Replicas = 1,
    stages: Stages = 1,
    shares: Shares = "",
    threads: Threads = 1,
    executor: ExecutorName = executors.DEFAULT,
    address: Address = None,
    local: Local = False,
    lock: LockFile = None,
    keys: Keys = wiring.KEYS,
    as_json: AsJson = False,
) -> int:
    """Go on with a run from its last consistent point.

    The workers may be others than before: neither their number nor their place changes a bit.

    \b
    trueweight resume quickstart
    trueweight resume quickstart --replicas 2 --address 10.0.0.1:6379
    """
    console = console_for(as_json)
    expected = read_lock(lock) if lock else None
    objects = wiring.open_folder(store, create=False)
    history = History.open(objects, name)
    job = wiring.stored_job(objects, history)
    plan = _plan(job, stages=stages, replicas=replicas, shares=_shares(shares))
    if history.head.status == FINISHED:
        position = history.position()
        ended = Ended(status=FINISHED, step=position.next_step, state_root=position.poststate)
    else:
        with wiring.worker_group(local=local, address=address, executor=executor, tell=teller(console)) as group:
            training = Training(console=console, store=objects, job=job, keys=keys, threads=threads)
            ended = training.run(group, plan, history)
    return report_end(console, ended, job, as_json=as_json, store=store, lock=(lock, expected))


@app.command()
def show(name: RunName, store: StoreFolder = ".trueweight", as_json: AsJson = False) -> int:
    """Show a run: segments, roots, losses, who did what."""
    report = reports.run_report(History.open(wiring.open_folder(store, create=False), name))
    if as_json:
        return print_json(report)
    console = Console()
    for key in ("run", "status", "run_digest", "recipe", "data", "program", "initial_state", "state", "steps"):
        say(console, f"{key.replace('_', ' '):14}{report[key]}")
    say(console, f"{'loss':14}{reports.curve([row['loss'] for row in report['losses']])}")
    columns = {"index": "segment", "first_step": "from step", "steps": "steps", "prestate": "prestate"}
    columns |= {"poststate": "poststate", "first_loss": "first loss", "last_loss": "last loss"}
    for rows, heads in (
        (report["segments"], columns),
        ([row for row in report["losses"] if "validation_loss" in row], {
            "step": "after step", "validation_loss": "validation loss", "validation_accuracy": "accuracy",
        }),
        (report["workers"], {"worker": "worker", "address": "signed by", "steps": "steps", "units": "units"}),
    ):  # fmt: skip
        if rows:
            console.print()
            say(console, reports.table(rows, heads))
    return 0


@app.command()
def runs(store: StoreFolder = ".trueweight", as_json: AsJson = False) -> int:
    """List the store's runs."""
    found = reports.all_runs(wiring.open_folder(store, create=False))
    if as_json:
        return print_json({"runs": found})
    columns = {"run": "run", "status": "status", "steps": "steps", "segments": "segments", "state": "state"}
    print(reports.table(found, columns) if found else "no runs yet: start one with `trueweight run RECIPE`")
    return 0


@app.command("audit")
def audit_command(
    name: RunName,
    store: StoreFolder = ".trueweight",
    every: Annotated[bool, typer.Option("--all", help="Replay every segment.")] = False,
    segments: Annotated[str, typer.Option(help="Replay these, such as 3,7.")] = "",
    sample_count: Annotated[int, typer.Option("--sample", help="Replay this many, drawn at random (1 without).")] = 0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sample, to draw the same one again.")] = None,
    threads: Threads = 1,
    executor: ExecutorName = executors.DEFAULT,
    as_json: AsJson = False,
) -> int:
    """Replay segments from their stored state and compare.

    Exit code 0 is a match, 1 diverged (at the segment and step that are printed), 2 inconclusive.

    One segment is drawn at random unless told otherwise. The replay needs the store alone, neither the recipe's file
    nor the model's code, and says what it would have missed.

    \b
    trueweight audit quickstart
    trueweight audit quickstart --sample 2 --seed 7
    trueweight audit quickstart --segments 0,3
    trueweight audit quickstart --all --json
    """
    console, make = console_for(as_json), executors.named(executor)
    if sum((every, bool(segments), bool(sample_count))) > 1 or sample_count < 0:
        raise UsageError("audit: expected one of --all, --segments 3,7 and --sample 2; drop the others")
    sampling = not every and not segments
    drawn = (secrets.randbits(63) if seed is None else seed) if sampling else None
    if drawn is not None and not 0 <= drawn < 2**64:
        raise UsageError(f"--seed {drawn}: expected 0 to 2^64 - 1; choose another")
    chosen = _segments(segments)

    def choose(history: History, total: int) -> Sequence[int]:
        if drawn is not None:
            return sample(history.run_digest, total, max(sample_count, 1), drawn)
        for index in chosen:
            if index >= total:
                raise UsageError(
                    f"--segments {index}: expected segments below {total}, got another; see `trueweight show`"
                )
        return range(total) if every else chosen

    objects = wiring.open_folder(store, create=False)
    report = audit(
        objects,
        name,
        choose,
        replay=lambda history: Replay(objects, history.run, threads=threads, build=worker_builder(make)),
        observe=teller(console) if as_json or console.is_terminal else lambda _: None,
    )
    told = reports.audit_report(report, seed=drawn)
    if as_json:
        print_json(told)
    else:
        _print_audit(console, told, report.segments)
    return reports.VERDICTS[type(report.verdict)][1]


@app.command()
def doctor(as_json: AsJson = False) -> int:
    """Check that this machine computes exactly.

    Runs the known-answer vectors of every operator and of whole blocks on each device found and compares bytes; then
    measures how fast it is. Exit code 1 where a device misses one, with the operators, the input and both bytes.

    \b
    trueweight doctor
    trueweight doctor --json
    """
    examined = list(examine(executors.found(), vectors.load()))
    if as_json:
        print_json({"executors": [asdict(one) for one in examined]})
    else:
        rows = [{**asdict(one), "verdict": "wrong" if one.failure else "exact"} for one in examined]
        columns = {"executor": "executor", "vectors": "vectors", "verdict": "verdict"}
        columns |= {"path": "digit products by", "product_gops": "GOP/s", "float_gflops": "float32 BLAS (GFLOP/s)"}
        columns |= {"elementwise_gflops": "loops (GFLOP/s)", "memory_gbs": "memory (GB/s)"}
        print(reports.table(rows, columns))
    for one in examined:
        if one.failure:
            print(f"{one.executor}: {one.failure}; give this device no exact work", file=sys.stderr)
    return 1 if any(one.failure for one in examined) else 0


@app.command("recipe")
def recipe_command(as_json: AsJson = False) -> int:
    """List every key of a recipe.

    Each with its default, its meaning and what it takes; docs/recipes.md explains more.

    \b
    trueweight recipe
    trueweight recipe --json
    """
    rows = [row._asdict() for row in recipe_keys.rows()]
    if as_json:
        return print_json({"keys": rows})
    heading = ""
    for row in rows:
        if row["table"] != heading:
            heading = row["table"]
            print(f"\n{heading}")
        print(f"  {row['key']:18} {row['default'] or 'required':14} {row['meaning']} ({row['takes']})")
    return 0


@app.command()
def prepare(recipe: RecipePath, store: StoreFolder = ".trueweight", as_json: AsJson = False) -> int:
    """Prepare a recipe's data and programs only."""
    console = console_for(as_json)
    read = load_recipe(recipe)
    objects = wiring.open_folder(store, create=True)
    with objects.writing(f"prepare {read.name}"):
        job = wiring.prepare_job(objects, read, name=read.name, folder=recipe.parent, tell=teller(console))
    return print_json(wiring.found_roots(job)) if as_json else 0


@app.command("lock")
def lock_command(
    name: RunName,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The lock file to write.")],
    store: StoreFolder = ".trueweight",
    as_json: AsJson = False,
) -> int:
    """Write the roots of a finished run, for others to compare with."""
    lock = wiring.lock_of(History.open(wiring.open_folder(store, create=False), name))
    write_lock(file, lock, name=name)
    if as_json:
        return print_json({"file": str(file), **vars(lock)})
    print(f"{file}: state {lock.state}")
    return 0


@app.command()
def submit(
    recipe: RecipePath,
    address: Annotated[str, typer.Option(help="The head's dashboard, such as http://10.0.0.1:8265.")],
    store: Annotated[
        str, typer.Option("--store", metavar="DIR", help="The store's folder on the head.")
    ] = "~/.trueweight/store",
    name: Annotated[str | None, typer.Option(help="The run's name; the recipe's without.")] = None,
    replicas: Replicas = 1,
    stages: Stages = 1,
    shares: Shares = "",
    threads: Threads = 1,
    executor: ExecutorName = executors.DEFAULT,
    lock: LockFile = None,
    as_json: AsJson = False,
) -> int:
    """Run a recipe as a job of a Ray cluster.

    Follows the log and leaves with the job's exit code; Ctrl-C leaves the job running.

    Ships this Trueweight, the recipe, the files that it names and the module of its factory. For a cluster with tokens
    set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN.

    \b
    trueweight submit recipes/quickstart.toml --address http://10.0.0.1:8265 --replicas 2
    """
    from runtime.actors.jobs import submit_job

    read = load_recipe(recipe)
    files, modules = wiring.recipe_files(read, recipe)
    arguments = ["--store", store, "--replicas", str(replicas), "--stages", str(stages), "--threads", str(threads)]
    arguments += ["--executor", executor]
    arguments += ["--shares", shares] if _shares(shares) else []
    arguments += ["--name", name] if name else []
    if lock:
        read_lock(lock)
        files.append(lock)
        arguments += ["--lock", f"job/{lock.name}"]
    console = console_for(as_json)
    jobs: list[str] = []

    def started(job: str) -> None:
        jobs.append(job)
        say(
            console,
            f"job {job} at {address}; Ctrl-C leaves it running, `ray job stop {job} --address {address}` stops it",
        )

    code = submit_job(
        address=address,
        recipe=recipe,
        files=files,
        modules=modules,
        arguments=arguments,
        write=writer(console),
        started=started,
    )
    if as_json:
        print_json({"job": jobs[0], "address": address, "exit_code": code})
    return code


# ---------------------------------------------------------------------------------------------- reading and writing


def _plan(job: Job, *, stages: int, replicas: int, shares: Sequence[int] | None) -> Plan:
    micro_batches = job.feed.recipe.training.micro_batches
    return make_plan(
        blocks=len(job.program.blocks), stages=stages, replicas=replicas, micro_batches=micro_batches, shares=shares
    )


def _shares(text: str) -> list[int] | None:
    return _integers(text, "--shares", "shares such as 3,1") if text else None


def _segments(text: str) -> list[int]:
    return sorted(set(_integers(text, "--segments", "segments such as 3,7"))) if text else []


def _integers(text: str, option: str, expected: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"{option} {text!r}: expected {expected}; correct it")
    return [int(part) for part in parts]


def _print_audit(console: Console, told: dict[str, Any], segments: Sequence[SegmentAudit]) -> None:
    if segments:
        columns = {"index": "segment", "steps_replayed": "steps replayed", "prestate": "prestate"}
        columns |= {"poststate": "poststate", "receipts": "receipts", "verdict": "verdict"}
        say(console, reports.table(told["segments"], columns))
    say(console, f"replayed {told['replayed']} of {told['total']} segments" + _drawn(told["seed"]))
    if told["total"] < told["planned"]:
        say(console, f"the run has committed {told['total']} of the {told['planned']} segments of its recipe")
    for chance in told["missed"]:
        if chance["probability"]:
            say(console, f"chance of missing {chance['forged_segments']} forged segments: {chance['probability']:.1%}")
    say(console, f"verdict: {told['verdict']}")
    for key in ("path", "expected", "actual", "reason"):
        if key in told:
            say(console, f"  {key}: {told[key]}")


def _drawn(seed: int | None) -> str:
    return "" if seed is None else f", drawn with --seed {seed}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. Errors are told on stderr without a traceback."""
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="trueweight", standalone_mode=False)
    except TyperException as error:
        told = getattr(error, "format_message", error.__str__)()
        print(f"error: {told}; see `trueweight --help`", file=sys.stderr)
        return UsageError.exit_code
    except TrueweightError as error:
        print(f"error: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("aborted: nothing half-written; `trueweight runs` lists what can be resumed", file=sys.stderr)
        return INTERRUPTED_EXIT
    except Exception:  # noqa: BLE001 - Python would leave with 1, which accuses: it means diverged
        traceback.print_exc()
        print("error: a fault of Trueweight itself; please report the lines above", file=sys.stderr)
        return FailureError.exit_code
    return code if isinstance(code, int) else 0
