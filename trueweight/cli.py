"""The commands. Exit codes: 0 done; 1 diverged or damaged, 2 inconclusive; 64 usage; 70 failure; 130 Ctrl-C."""

import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer.exceptions import TyperException

from ledger.port import DryRun
from runtime import executors, recipe_keys
from runtime.controller import Elastic, Ended, Job
from runtime.doctor import examine
from runtime.groups import WorkerGroup
from runtime.plan import Plan, make_plan
from runtime.program import vectors
from runtime.recipe import load_recipe
from runtime.segments import FINISHED, History
from storage.errors import FailureError, TrueweightError, UsageError
from trueweight import (
    audit_cli,
    cluster_cli,
    investigation,
    lab_cli,
    ledger_cli,
    pinpoint_cli,
    placement_cli,
    reports,
    store_cli,
    wiring,
    witness_cli,
)
from trueweight.audit_cli import integers
from trueweight.console import console_for, print_json, say, teller, writer
from trueweight.locks import check_lock, read_lock, write_lock
from trueweight.training import INTERRUPTED_EXIT, Training, report_end

app = typer.Typer(
    name="trueweight",
    help="Training whose weights can be proved: the recipe determines the bits, and anyone can replay them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(store_cli.app, name="store")
app.add_typer(cluster_cli.app, name="cluster")
placement_cli.register(app)
app.command("audit")(audit_cli.audit_command)
app.command("pinpoint")(pinpoint_cli.pinpoint_command)
app.command("witness")(witness_cli.witness_command)
app.add_typer(pinpoint_cli.evidence_app, name="evidence")
app.command("diff")(lab_cli.diff_command)
app.command("selfcheck")(lab_cli.selfcheck_command)
ledger_cli.register(app)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in TOML.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name; `trueweight runs` lists them.")]
StoreFolder = Annotated[str, typer.Option("--store", metavar="DIR", help="The store: a folder or a URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object; progress goes to stderr.")]
Replicas = Annotated[int, typer.Option(help="Replicas of each stage; 0 is all that the CPUs take, more as hosts join.")]
Stages = Annotated[int, typer.Option(help="Pipeline stages.")]
Auto = Annotated[
    bool,
    typer.Option(
        "--auto",
        help="Measure each host, place by the planner, and move blocks while training when that pays for itself.",
    ),
]
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
    auto: Auto = False,
    threads: Threads = 1,
    executor: ExecutorName = executors.DEFAULT,
    address: Address = None,
    local: Local = False,
    lock: LockFile = None,
    keys: Keys = wiring.KEYS,
    inject: Annotated[
        list[str] | None, typer.Option(metavar="FAULT", help="Spoil the run; see docs/pinpoint.md. With --local.")
    ] = None,
    ledger: Annotated[
        str, typer.Option(metavar="WHERE", help="Commit each segment: embedded, anvil, or a node's URL.")
    ] = "",
    as_json: AsJson = False,
) -> int:
    """Train a recipe. Where and by how many workers changes no bit.

    Without --address and RAY_ADDRESS a Ray cluster is started on this machine and ends with the command. Ctrl-C
    finishes the step and saves; `trueweight resume` goes on from there.

    \b
    trueweight run recipes/quickstart.toml --replicas 2 --stages 2
    trueweight run recipes/quickstart.toml --lock recipes/quickstart.lock.toml
    trueweight run my.toml --address 10.0.0.1:6379 --replicas 4 --shares 3,3,1,1
    trueweight run my.toml --address 10.0.0.1:6379 --auto
    trueweight run faulty.toml --local --inject kind=skip,step=3,micro_batch=1
    """
    console = console_for(as_json)
    read = load_recipe(recipe)
    expected = read_lock(lock) if lock else None
    parts = _shares(shares)
    if auto:
        _require_free(stages=stages, replicas=replicas, shares=shares, threads=threads, local=local)
        threads = 0  # one for each CPU of the host
    make_plan(blocks=max(stages, 1), stages=stages, replicas=replicas or 1, micro_batches=1, shares=parts)
    objects = wiring.open_folder(store, create=True)
    chosen = wiring.choose_name(objects, name, default=read.name)
    with (
        objects.writing(f"run {chosen}"),
        wiring.worker_group(local=local, address=address, executor=executor, tell=teller(console)) as workers,
    ):
        job = wiring.prepare_job(objects, read, name=chosen, folder=recipe.parent, tell=teller(console))
        if expected and lock:
            check_lock(expected, wiring.found_roots(job), lock)
        group, plan, elastic = _placed(job, workers, stages=stages, replicas=replicas, shares=parts)
        if auto:
            plan, elastic = placement_cli.follow(job, objects.get(job.programs), workers, console)
        if inject:
            group = investigation.spoiled(objects, job, plan, inject, local=local, executor=executor)
        training = Training(console=console, store=objects, job=job, keys=keys, threads=threads, elastic=elastic)
        if ledger:
            tell = ledger_cli.committer(store, chosen, ledger, keys=keys, tell=teller(console))
            training = replace(training, also=tell)
        ended = training.run(group, plan)
    return report_end(console, ended, job, as_json=as_json, store=store, lock=(lock, expected))


@app.command()
def resume(
    name: RunName,
    store: StoreFolder = ".trueweight",
    replicas: Replicas = 1,
    stages: Stages = 1,
    shares: Shares = "",
    auto: Auto = False,
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
    trueweight resume quickstart --auto --address 10.0.0.1:6379
    """
    console = console_for(as_json)
    expected = read_lock(lock) if lock else None
    if auto:
        _require_free(stages=stages, replicas=replicas, shares=shares, threads=threads, local=local)
        threads = 0  # one for each CPU of the host
    objects = wiring.open_folder(store, create=False)
    history = History.open(objects, name)
    job = wiring.stored_job(objects, history)
    parts = _shares(shares)
    _plan(job, stages=stages, replicas=replicas or 1, shares=parts)
    if history.head.status == FINISHED:
        position = history.position()
        ended = Ended(status=FINISHED, step=position.next_step, state_root=position.poststate)
    else:
        with wiring.worker_group(local=local, address=address, executor=executor, tell=teller(console)) as workers:
            group, plan, elastic = _placed(job, workers, stages=stages, replicas=replicas, shares=parts)
            if auto:
                plan, elastic = placement_cli.follow(job, objects.get(job.programs), workers, console)
            training = Training(console=console, store=objects, job=job, keys=keys, threads=threads, elastic=elastic)
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


@app.command()
def doctor(
    only_vectors: Annotated[bool, typer.Option("--vectors", help="Compare, and measure nothing.")] = False,
    as_json: AsJson = False,
) -> int:
    """Check that this machine computes exactly.

    Runs the known-answer vectors of every operator and of whole blocks on each device found and compares bytes; then
    measures how fast it is. Exit code 1 where a device misses one, with the operators, the input and both bytes.

    \b
    trueweight doctor
    trueweight doctor --vectors --json
    """
    examined = list(examine(executors.found(), vectors.load(), measured=not only_vectors))
    if as_json:
        print_json({"executors": [asdict(one) for one in examined]})
    else:
        rows = [{**asdict(one), "verdict": "wrong" if one.failure else "exact"} for one in examined]
        columns = {"executor": "executor", "vectors": "vectors", "verdict": "verdict"}
        columns["path"] = "digit products by"
        if not only_vectors:
            columns |= {"product_gops": "GOP/s", "float_gflops": "float32 BLAS (GFLOP/s)"}
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
    auto: Auto = False,
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
    if auto:
        _require_free(stages=stages, replicas=replicas, shares=shares, threads=threads, local=False)
    arguments += ["--auto"] if auto else []
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


def _placed(
    job: Job, workers: wiring.Workers, *, stages: int, replicas: int, shares: Sequence[int] | None
) -> tuple[WorkerGroup, Plan, Elastic | None]:
    """(the group, its plan, how its workers may change); 0 replicas are as many as the cluster's CPUs take."""
    most = job.feed.recipe.training.micro_batches
    count = replicas or max(min(int(workers.cpus) // max(stages, 1), most), 1)
    plan = _plan(job, stages=stages, replicas=count, shares=shares)
    if workers.membership is None:
        return workers.group, plan, None
    return workers.group, plan, Elastic(membership=workers.membership, grow=not replicas, fixed=shares is not None)


def _require_free(*, stages: int, replicas: int, shares: str, threads: int, local: bool) -> None:
    """UsageError where something is asked for that --auto decides."""
    asked = {
        "--local": local,
        "--stages": stages != 1,
        "--replicas": replicas != 1,
        "--shares": bool(shares),
        "--threads": threads != 1,
    }
    if given := [option for option, is_given in asked.items() if is_given]:
        raise UsageError(
            f"--auto chooses hosts, blocks, micro-batches and threads of a cluster's workers: expected none of "
            f"{', '.join(asked)} beside it, got {', '.join(given)}; drop {'these' if given[1:] else 'it'}"
        )


def _shares(text: str) -> list[int] | None:
    return integers(text, "--shares", "shares such as 3,1") if text else None


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
    except DryRun as end:
        print(end)
        return 0
    except KeyboardInterrupt:
        print("aborted: nothing half-written; `trueweight runs` lists what can be resumed", file=sys.stderr)
        return INTERRUPTED_EXIT
    except Exception:  # noqa: BLE001 - Python would leave with 1, which accuses: it means diverged
        traceback.print_exc()
        print("error: a fault of Trueweight itself; please report the lines above", file=sys.stderr)
        return FailureError.exit_code
    return code if isinstance(code, int) else 0
