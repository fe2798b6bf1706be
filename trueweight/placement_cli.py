"""`trueweight plan` and `trueweight profile`: who would do what, and how fast a machine is, before anything runs."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from runtime import executors
from runtime.controller import Elastic, Job, sent
from runtime.plan import Plan
from runtime.planner import Excluded, Placement, Stage, gib, make_placement
from runtime.profiles import FOLDER, HostProfile, cached, host_of, make_model, profile_file
from runtime.recipe import load_recipe
from runtime.revision import ByPlanner
from trueweight import reports, wiring
from trueweight.cluster_files import read_file
from trueweight.console import console_for, print_json, say, teller
from trueweight.placement_hosts import planned_hosts

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in TOML.")]
StoreFolder = Annotated[str, typer.Option("--store", metavar="DIR", help="Where data and programs are prepared.")]
Threads = Annotated[int, typer.Option(help="Threads to measure with; 0 is every core.", min=0)]
ExecutorName = Annotated[str, typer.Option("--executor", help="compiled or reference.")]
Profiles = Annotated[str, typer.Option("--profiles", metavar="DIR", help="Where measurements are kept.")]
Refresh = Annotated[bool, typer.Option("--refresh", help="Measure again, whatever is kept.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object; progress goes to stderr.")]

WIDTH = 40
"""Characters of a bar."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("plan")(plan_command)
    app.command("profile")(profile_command)


def plan_command(
    recipe: RecipePath,
    cluster: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Hosts in TOML; this machine without. See docs/placement.md.")
    ] = None,
    stages: Annotated[int | None, typer.Option(help="Exactly so many stages; without, as many as is best.")] = None,
    store: StoreFolder = ".trueweight",
    threads: Threads = 0,
    executor: ExecutorName = executors.DEFAULT,
    profiles: Profiles = FOLDER,
    refresh: Refresh = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a picture of the plan, too.")] = None,
    as_json: AsJson = False,
) -> int:
    """Show which hosts would take which blocks of a recipe, and how long a step should take.

    Needs no cluster: hosts are read from a file, and how long the recipe's blocks take is measured on this machine
    once. Which plan a run has changes no bit of its result, only how fast it is there. A host too small for any block
    is listed for verification only. Exit code 70 where the model does not fit, naming what is missing.

    \b
    trueweight plan recipes/quickstart.toml
    trueweight plan recipes/quickstart.toml --cluster cluster_configs/two-laptops.toml
    trueweight plan my.toml --cluster lab.toml --stages 2 --html plan.html
    """
    console = console_for(as_json)
    tables = read_file(cluster).hosts if cluster else None
    job, profile = _measured(recipe, store, threads, executor, profiles, refresh, console)
    hosts = [host for table in tables for host in planned_hosts(table, profile)] if tables else [host_of(profile)]
    started = time.perf_counter()
    placement = make_placement(make_model(job.program, profile), hosts, stages=stages)
    told = placement_report(placement, job, searched=time.perf_counter() - started)
    if html:
        from trueweight.placement_page import page

        html.write_text(page(told), encoding="utf-8")
    if as_json:
        return print_json(told)
    print_placement(console, told)
    if html:
        say(console, f"{html}: the picture")
    return 0


def profile_command(
    recipe: RecipePath,
    store: StoreFolder = ".trueweight",
    threads: Threads = 0,
    executor: ExecutorName = executors.DEFAULT,
    profiles: Profiles = FOLDER,
    refresh: Refresh = False,
    as_json: AsJson = False,
) -> int:
    """Show how fast this machine is at a recipe's own blocks.

    Measured the first time and kept; `plan` reads it. It holds for one recipe's programs, executor, thread count and
    version: others are measured anew.

    \b
    trueweight profile recipes/quickstart.toml
    trueweight profile recipes/quickstart.toml --threads 1 --refresh
    """
    console = console_for(as_json)
    job, profile = _measured(recipe, store, threads, executor, profiles, refresh, console)
    told = profile_report(profile, job, Path(profiles).expanduser())
    if as_json:
        return print_json(told)
    for key in ("host", "cores", "memory", "threads", "executor", "version", "measured", "program", "file"):
        say(console, f"{key:12}{told[key] if key != 'memory' else gib(told[key])}")
    columns = {"kind": "kind", "blocks": "blocks", "forward_ms": "forward ms", "backward_ms": "backward ms"}
    columns |= {"prepare_ms": "once a step ms", "micro_batches_per_second": "micro-batches/s"}
    console.print()
    say(console, reports.table(told["kinds"], columns))
    console.print()
    say(console, f"loss         {told['loss_ms']:.3f} ms a micro-batch")
    say(console, f"update       {told['update_ms_per_million']:.2f} ms per million weights, with norm and hashes")
    say(console, f"speed        {told['gops']:.0f} GOP/s in digit products")
    say(console, f"a step here  {told['step_seconds']:.3f} s")
    return 0


def _measured(
    recipe: Path, store: str, threads: int, executor: str, profiles: str, refresh: bool, console: Console
) -> tuple[Job, HostProfile]:
    """The recipe prepared in the store, and this machine's profile of its programs."""
    make, read = executors.named(executor), load_recipe(recipe)
    objects = wiring.open_folder(store, create=True)
    with objects.writing(f"plan {read.name}"):
        job = wiring.prepare_job(objects, read, name=read.name, folder=recipe.parent, tell=teller(console))
    profile = cached(
        job.program,
        make,
        executor=executor,
        threads=threads,
        folder=Path(profiles).expanduser(),
        refresh=refresh,
        tell=teller(console),
    )
    return job, profile


def follow(job: Job, programs: bytes, workers: wiring.Workers, console: Console) -> tuple[Plan, Elastic]:
    """(the plan to begin with, how the run keeps to the planner's): all hosts measured, and what they will do shown.

    `programs` is the encoding of the job's program. FailureError where the model does not fit the hosts.
    """
    assert workers.membership is not None
    assert workers.survey is not None
    model, sites = workers.survey(job.program, programs)
    reviser = ByPlanner(model=model, sites=sites)
    started = time.perf_counter()
    plan = sent(reviser, reviser.begin())
    if reviser.placement:
        print_placement(console, placement_report(reviser.placement, job, searched=time.perf_counter() - started))
    return plan, Elastic(membership=workers.membership, reviser=reviser)


# ------------------------------------------------------------------------------------------------------------- reports


def placement_report(placement: Placement, job: Job, *, searched: float) -> dict[str, Any]:
    """The placement as JSON values; seconds, bytes, shares of 1."""
    unit = wiring.consumed(job.feed)
    parts = {name: getattr(placement, name) for name in ("compute", "transfers", "reduce", "update")}
    return {
        "recipe": job.feed.recipe.name,
        "program": job.program.root.hex(),
        "blocks": len(job.program.blocks),
        "micro_batches": job.program.micro_batches,
        "bounds": list(placement.bounds),
        "replicas": list(placement.replicas),
        "stages": [_stage_report(number, stage, placement) for number, stage in enumerate(placement.stages)],
        "excluded": [_excluded_report(one) for one in placement.excluded],
        "step_seconds": placement.seconds,
        "parts_seconds": parts,
        f"{unit.name}_per_second": unit.items / placement.seconds if placement.seconds else None,
        "idle": placement.idle,
        "tightest": placement.tightest,
        "exact": placement.exact,
        "search_seconds": searched,
    }


def _stage_report(number: int, stage: Stage, placement: Placement) -> dict[str, Any]:
    return {
        "stage": number,
        "first_block": stage.first,
        "last_block": stage.stop - 1,
        "seconds": stage.seconds,
        "share": stage.seconds / placement.seconds if placement.seconds else 0.0,
        "idle": stage.idle,
        "hosts": [
            {
                "host": member.host.name,
                "speed": member.host.speed,
                "memory_bytes": member.memory_bytes,
                "memory_limit_bytes": member.host.memory,
                "units": member.units,
                "busy_seconds": member.busy,
                "idle": member.idle,
            }
            for member in stage.members
        ],
        "units": list(stage.units),
    }


def _excluded_report(one: Excluded) -> dict[str, Any]:
    role = "verification only" if one.too_small else "spare"
    return {"host": one.host.name, "role": role, "reason": one.reason}


def profile_report(profile: HostProfile, job: Job, folder: Path) -> dict[str, Any]:
    """The profile as JSON values, times in milliseconds."""
    program = job.program
    counts = [sum(block.kind == kind for block in program.blocks) for kind in range(len(program.kinds))]
    file = profile_file(folder, program, executor=profile.executor, threads=profile.threads)
    return {
        "host": profile.host,
        "cores": profile.cores,
        "memory": profile.memory,
        "threads": profile.threads,
        "executor": profile.executor,
        "version": profile.version,
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(profile.measured)),
        "program": profile.program,
        "file": str(file),
        "kinds": [
            {
                "kind": kind,
                "blocks": counts[kind],
                "forward_ms": times.forward * 1e3,
                "backward_ms": times.backward * 1e3,
                "prepare_ms": times.prepare * 1e3,
                "handed_bytes": times.handed_bytes,
                "micro_batches_per_second": 1 / max(times.forward + times.backward, 1e-9),
            }
            for kind, times in enumerate(profile.kinds)
        ],
        "loss_ms": profile.loss * 1e3,
        "update_ms_per_million": profile.update * 1e3,
        "gops": profile.gops,
        "bandwidth": profile.bandwidth,
        "latency_ms": profile.latency * 1e3,
        "step_seconds": make_placement(make_model(program, profile), [host_of(profile)]).seconds,
    }


# ------------------------------------------------------------------------------------------------------------ printing


def print_placement(console: Console, told: Mapping[str, Any]) -> None:
    """The plan as a table, a picture and a prediction."""
    columns = {"stage": "stage", "blocks": "blocks", "hosts": "hosts", "memory": "memory", "share": "share of step"}
    say(console, reports.table([_row(stage) for stage in told["stages"]], columns | {"idle": "idle"}))
    console.print()
    for line in picture(told):
        say(console, line)
    console.print()
    rate = next((key for key in told if key.endswith("_per_second")), "")
    found = "no plan is better" if told["exact"] else "the best found; there may be a better one"
    parts = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in told["parts_seconds"].items() if seconds)
    say(console, f"step         {told['step_seconds']:.3g} s predicted: {parts}")
    say(console, f"speed        {told[rate] or 0:,.0f} {rate.removesuffix('_per_second')}/s")
    say(console, f"idle         {told['idle']:.0%} of the hosts' speed")
    say(console, f"tightest     {told['tightest']}")
    say(console, f"search       {told['search_seconds'] * 1e3:.0f} ms; {found}")


def _row(stage: Mapping[str, Any]) -> dict[str, Any]:
    fullest = max(stage["hosts"], key=lambda host: host["memory_bytes"] / host["memory_limit_bytes"])
    return {
        "stage": stage["stage"],
        "blocks": _blocks(stage),
        "hosts": _names([host["host"] for host in stage["hosts"]]),
        "memory": f"{gib(fullest['memory_bytes'])} of {gib(fullest['memory_limit_bytes'])}",
        "share": f"{stage['share']:.0%}",
        "idle": f"{stage['idle']:.0%}",
    }


def _blocks(stage: Mapping[str, Any]) -> str:
    first, last = stage["first_block"], stage["last_block"]
    return str(first) if first == last else f"{first}-{last}"


def _names(names: Sequence[str], most: int = 4) -> str:
    return (
        ", ".join(names) if len(names) <= most else f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
    )


def picture(told: Mapping[str, Any]) -> list[str]:
    """A bar for each host: its stage's place in the chain of blocks, dark while it works and light while it waits."""
    rows = [(host, stage) for stage in told["stages"] for host in stage["hosts"]]
    width = max([len(host["host"]) for host, _ in rows] + [len(one["host"]) for one in told["excluded"]], default=0)
    each = max(1, WIDTH // told["blocks"])
    lines = []
    for host, stage in rows:
        blocks = stage["last_block"] - stage["first_block"] + 1
        busy = round(blocks * each * (1 - host["idle"]))
        bar = " " * each * stage["first_block"] + "█" * busy + "░" * (blocks * each - busy)
        units = f"{host['units']} of {told['micro_batches']} micro-batches, {host['idle']:.0%} idle"
        lines.append(f"{host['host']:{width}}  |{bar:{each * told['blocks']}}|  s{stage['stage']}  {units}")
    blank = " " * each * told["blocks"]
    lines += [f"{one['host']:{width}}  |{blank}|  {one['role']}: {one['reason']}" for one in told["excluded"]]
    return lines
