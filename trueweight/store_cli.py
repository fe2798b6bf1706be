"""`trueweight store ...`: look at a store, check it, clean it, move it, prove what it holds."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from runtime.recipe import decode_recipe
from runtime.segments import History, head_name, run_names
from storage import checking, collection, proofs, transfer, usage
from storage.checkpoints import Checkpoint, open_checkpoint
from storage.codec import decode, encode
from storage.errors import FailureError, UsageError
from storage.files import write_whole
from storage.objects import Found
from storage.reachable import reachable
from storage.records import Pin, SegmentRecord
from storage.saving import save_state
from storage.store import CHECKPOINTS, Store, root_of
from trueweight import exports, huggingface, reports, tensor_files, wiring
from trueweight.console import as_json as as_json_text
from trueweight.console import console_for, print_json, say

PINS = "pins/"

app = typer.Typer(
    help="Look at a store, check it, clean it, move it, prove what it holds.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

StoreFolder = Annotated[
    str, typer.Option("--store", metavar="DIR", help="The store: a folder, or a URL such as s3://.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object; progress goes to stderr.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run, or a pin; `trueweight store ls` lists them.")]
Segment = Annotated[int | None, typer.Option(help="The state after this segment; the newest without.", min=0)]


@app.command("ls")
def list_command(store: StoreFolder = ".trueweight", as_json: AsJson = False) -> int:
    """List the checkpoints: whose they are, and what they take.

    `own` is what a checkpoint stores that none above it does. Checkpoints that nothing refers to come last; `store gc`
    collects them.

    \b
    trueweight store ls
    trueweight store ls --store s3://bucket/runs --json
    """
    objects = wiring.open_folder(store, create=False)
    rows = _checkpoints(objects)
    if as_json:
        return print_json({"store": str(objects), "checkpoints": rows})
    columns = {"of": "of", "segment": "segment", "steps": "steps", "state": "state", "tensors": "tensors"}
    shown = [{**row, **{key: size(row[key]) for key in ("logical", "own")}} for row in rows]
    print(reports.table(shown, {**columns, "logical": "logical", "own": "own"}) if rows else "no checkpoints yet")
    for row in rows:
        if "error" in row:
            print(f"{row['of']}: {row['error']}")
    return 0


@app.command("du")
def usage_command(store: StoreFolder = ".trueweight", as_json: AsJson = False) -> int:
    """Say how much the store takes, and how much it saves.

    `logical` are the bytes of all checkpoints' tensors, `distinct` those that are left when equal frames of several are
    counted once (the dedup ratio is logical to distinct), `stored` what the distinct ones take when compressed.

    \b
    trueweight store du
    """
    objects = wiring.open_folder(store, create=False)
    kinds = [asdict(one) for one in usage.usage(objects)]
    rows = [row for row in _checkpoints(objects) if row["logical"] is not None]
    logical, distinct = (sum(row[key] for row in rows) for key in ("logical", "distinct"))
    stored = sum(one["stored"] for one in kinds if one["kind"] in ("packs", "manifests"))
    ratios = {"dedup": logical / distinct if distinct else None, "ratio": logical / stored if stored else None}
    known = {"checkpoints": len(rows), "logical": logical, "distinct": distinct, "stored": stored, **ratios}
    if as_json:
        return print_json({"store": str(objects), **known, "kinds": kinds})
    print(
        reports.table(
            [{**one, "stored": size(one["stored"])} for one in kinds],
            {"kind": "kind", "files": "files", "stored": "stored"},
        )
    )
    print(f"{len(rows)} checkpoints: logical {size(logical)}, distinct {size(distinct)}, stored {size(stored)}")
    print(", ".join(f"{name} {value:.2f} to 1" for name, value in ratios.items() if value))
    return 0


@app.command("verify")
def verify_command(
    store: StoreFolder = ".trueweight",
    sample: Annotated[int, typer.Option(help="Read this many random leaves instead of everything.", min=0)] = 0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sample, to draw the same one again.")] = None,
    as_json: AsJson = False,
) -> int:
    """Read everything again and say what is damaged or missing, down to tensor and leaf.

    Exit code 0 is a whole store, 1 damage. A sample of 459 leaves finds damage of 1 % of all leaves with a probability
    of 99 %, whatever the size of the model.

    \b
    trueweight store verify
    trueweight store verify --sample 459
    """
    console = console_for(as_json)
    objects = wiring.open_folder(store, create=False)
    drawn = secrets.randbits(32) if seed is None else seed
    with _progress(console, in_bytes=True) as advance:
        if sample:
            told = checking.verify_sample(objects, sample, drawn, advance=advance)
        else:
            told = checking.verify(objects, advance=advance)
    report: dict[str, Any] = {"store": str(objects), "whole": not told.findings, "checkpoints": told.checkpoints}
    report |= {"read_bytes": told.read_bytes, "leaves": told.leaves} | ({} if sample else {"files": told.files})
    if sample:
        shares = [{"damaged": share, "found": checking.detection(share, told.leaves)} for share in (0.1, 0.01, 0.001)]
        report |= {"seed": drawn, "detection": shares}
    report["findings"] = [asdict(finding) for finding in told.findings]
    if as_json:
        print_json(report)
        return 1 if told.findings else 0
    for finding in told.findings:
        say(console, f"{finding.kind} {finding.key}: {finding.reason}")
    if sample:
        say(console, f"{told.leaves} random leaves of {told.checkpoints} checkpoints, drawn with --seed {drawn}")
        for share in report["detection"]:
            say(
                console,
                f"damage of {share['damaged']:.1%} of all leaves would be found with probability {share['found']:.2%}",
            )
    else:
        say(console, f"{told.files} files and {told.leaves} leaves of {told.checkpoints} checkpoints read")
    say(console, f"{len(told.findings)} findings" if told.findings else "everything that was read is whole")
    return 1 if told.findings else 0


@app.command("gc")
def collect_command(
    store: StoreFolder = ".trueweight",
    age: Annotated[str, typer.Option(help="Touch nothing younger: 90s, 30m, 12h, 7d.")] = "1d",
    grace: Annotated[str, typer.Option(help="Delete only what a pass this long ago condemned.")] = "1h",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen, change nothing.")] = False,
    as_json: AsJson = False,
) -> int:
    """Collect what no run and no pin refers to, in two passes.

    The first pass that finds a file unreferenced condemns it; a later one deletes it, so whoever is reading has the
    time between them to finish. Run it from a timer, or twice. Training may go on meanwhile: it holds a lease.

    \b
    trueweight store gc --dry-run
    trueweight store gc
    trueweight store gc --age 0s --grace 0s        at once, where you know that nobody reads
    """
    console = console_for(as_json)
    objects = wiring.open_folder(store, create=False)
    done = collection.collect(objects, age=seconds(age, "--age"), grace=seconds(grace, "--grace"), dry_run=dry_run)
    counted = {name: getattr(done, name) for name in ("deleted", "condemned", "young", "left")}
    if as_json:
        files = {name: [asdict(found) for found in listed] for name, listed in counted.items()}
        return print_json(
            {"store": str(objects), "dry_run": dry_run, **files, "alive": done.alive, "alive_bytes": done.alive_bytes}
        )
    would = "would be " if dry_run else ""
    say(console, f"{_counted(done.deleted)} {would}deleted, {_counted(done.condemned)} condemned")
    say(console, f"{_counted(done.young)} unreferenced, but too young or held by a writer")
    say(console, f"alive: {done.alive} files, {size(done.alive_bytes)}")
    if done.condemned and not dry_run:
        say(console, f"what is condemned is deleted by the first pass after {grace}")
    if done.left:
        say(console, f"{_counted(done.left)} could not be deleted in time: run it again")
    return 0


@app.command("copy")
def copy_command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A store.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="A store, or a place for one.")],
    runs: Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="Runs or pins; all without.")] = None,
    as_json: AsJson = False,
) -> int:
    """Copy runs and pins with all that they need to another store.

    Every byte is checked on the way, references move last, and a copy that was cut off goes on where it stopped. A run
    that is in both stores is brought up to date; one that has another history there is refused.

    \b
    trueweight store copy .trueweight s3://bucket/runs
    trueweight store copy s3://bucket/runs /mnt/backup quickstart
    """
    console = console_for(as_json)
    here, there = wiring.open_folder(source, create=False), wiring.open_folder(target, create=True)
    names = [_reference(here, name) for name in runs] if runs else None
    with _progress(console) as advance:
        done = transfer.copy(here, there, names, advance=advance)
    if as_json:
        return print_json({"source": str(here), "target": str(there), **asdict(done)})
    say(console, f"{done.written} files ({size(done.written_bytes)}) written, {done.there} were there")
    say(console, f"references moved: {', '.join(done.references) or 'none'}")
    return 0


@app.command("repair")
def repair_command(
    other: Annotated[str, typer.Option("--from", metavar="OTHER", help="A store that has a copy.")],
    store: StoreFolder = ".trueweight",
    as_json: AsJson = False,
) -> int:
    """Mend what is damaged or missing from another store.

    Everything is read first, as by `store verify`; what is fetched is checked. Exit code 1 where something is left.

    \b
    trueweight store repair --from s3://bucket/runs
    """
    console = console_for(as_json)
    here, there = wiring.open_folder(store, create=False), wiring.open_folder(other, create=False)
    with _progress(console, in_bytes=True) as advance:
        done = transfer.repair(here, there, advance=advance)
    failed = [{**asdict(finding), "why": why} for finding, why in done.failed]
    if as_json:
        print_json(
            {"store": str(here), "from": str(there), "mended": [asdict(one) for one in done.mended], "failed": failed}
        )
    else:
        for finding in done.mended:
            say(console, f"mended {finding.key}")
        for one in failed:
            say(console, f"not mended {one['key']}: {one['why']}")
        say(console, f"{len(done.mended)} mended, {len(failed)} not" if done.mended or failed else "nothing to mend")
    return 1 if failed else 0


@app.command("pin")
def pin_command(
    run: RunName,
    segment: Segment = None,
    name: Annotated[str | None, typer.Option(help="The pin's name; RUN and the segment without.")] = None,
    store: StoreFolder = ".trueweight",
    as_json: AsJson = False,
) -> int:
    """Keep a state, whatever becomes of its run.

    \b
    trueweight store pin quickstart --segment 3 --name before-the-spike
    """
    objects = wiring.open_folder(store, create=False)
    root, _ = state_of(objects, run, segment)
    chosen = name or f"{run}-{'last' if segment is None else segment}"
    with objects.writing(f"pin {chosen}"):
        _pin(objects, chosen, root)
    if as_json:
        return print_json({"pin": chosen, "state": root.hex()})
    print(f"pinned {chosen}: state {root.hex()}")
    return 0


@app.command("unpin")
def unpin_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A pin.")],
    store: StoreFolder = ".trueweight",
    as_json: AsJson = False,
) -> int:
    """Drop a pin; what nothing else refers to is left to `store gc`."""
    return _drop(wiring.open_folder(store, create=False), PINS + name, as_json)


@app.command("forget")
def forget_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run.")],
    store: StoreFolder = ".trueweight",
    as_json: AsJson = False,
) -> int:
    """Drop a run from the store; its states go with the next collections, but for those that are pinned."""
    return _drop(wiring.open_folder(store, create=False), head_name(run), as_json)


@app.command("prove")
def prove_command(
    run: RunName,
    tensor: Annotated[str, typer.Option(help="A tensor of the state, such as weight/block001.up.weight.")],
    index: Annotated[str, typer.Option(help="The element, such as 3,7; empty for a scalar.")],
    segment: Segment = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the proof there instead of printing it.")
    ] = None,
    store: StoreFolder = ".trueweight",
    as_json: AsJson = False,
) -> int:
    """Prove the value of one element: the value, its leaf and the path to the state root, as JSON.

    Reads one frame and the manifest. `store check-proof` checks the file with no store; a contract takes the same.

    \b
    trueweight store prove quickstart --segment 3 --tensor weight/block001.up.weight --index 3,7 --out proof.json
    """
    objects = wiring.open_folder(store, create=False)
    root, record = state_of(objects, run, segment)
    parts = [part.strip() for part in index.split(",")] if index.strip() else []
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--index {index!r}: expected numbers such as 3,7; correct it")
    proof = proofs.prove(open_checkpoint(objects, root), tensor, [int(part) for part in parts], record)
    proofs.check(proof)
    if out is None:
        return print_json(proof)
    write_whole(out, (as_json_text(proof) + "\n").encode())
    if as_json:
        return print_json({"file": str(out), "value": proof["element"]["value"], "state_root": root.hex()})
    print(f"{out}: {tensor}{proof['element']['index']} is {proof['element']['value']}, below state {root.hex()}")
    return 0


@app.command("check-proof")
def check_proof_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A proof that `store prove` made.")],
    root: Annotated[
        str | None, typer.Option(metavar="HEX", help="The state root that you know; else it is only told.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Check a proof offline. Exit code 0 where it holds, 1 where it does not.

    It shows that the element is below the state root that is printed; that this is the run's root you know from
    elsewhere: name it with --root.

    \b
    trueweight store check-proof proof.json --root 3f2a...
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"proof {file}: {error}; name a file that `trueweight store prove --out` wrote") from error
    shown = proofs.check(proofs.read_proof(text))
    if root is not None and root.lower() != shown.state_root.hex():
        raise proofs.FalseProof(
            f"proof refused: it is about state {shown.state_root.hex()}, not {root}; ask for another one"
        )
    told = {"tensor": shown.entry.name, "index": list(shown.index), "value": shown.value, "bits": shown.bits}
    told |= {"state_root": shown.state_root.hex()}
    if shown.segment and shown.segment_digest:
        told |= {
            "segment": shown.segment.index,
            "segment_digest": shown.segment_digest.hex(),
            "run": shown.segment.run.hex(),
        }
    if as_json:
        return print_json(told)
    print(
        f"{shown.entry.name}{list(shown.index)} is {shown.value} (bits {shown.bits}) in state {shown.state_root.hex()}"
    )
    if shown.segment and shown.segment_digest:
        print(
            f"the state after segment {shown.segment.index} of run {shown.segment.run.hex()}, "
            f"record {shown.segment_digest.hex()}"
        )
    if root is None:
        print("compare the state root, or name it with --root")
    return 0


@app.command("export")
def export_command(
    run: RunName,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file, or for hf the folder, to make.")],
    form: Annotated[str, typer.Option("--format", help="safetensors, torch or hf.")] = "safetensors",
    segment: Segment = None,
    everything: Annotated[bool, typer.Option("--all", help="The whole state, the optimiser's moments too.")] = False,
    store: StoreFolder = ".trueweight",
    as_json: AsJson = False,
) -> int:
    """Write weights for other programs, every byte checked on the way.

    safetensors and torch hold the weights under the module's own names; hf is a folder that transformers opens (gpt and
    llama).

    \b
    trueweight store export quickstart model.safetensors
    trueweight store export quickstart gpt/ --format hf --segment 3
    """
    console = console_for(as_json)
    objects = wiring.open_folder(store, create=False)
    root, record = state_of(objects, run, segment)
    made_by = History.open(objects, run).run if run in run_names(objects) else None
    facts = {"run": run} | ({"segment": str(record.index)} if record else {})
    told = exports.export(
        open_checkpoint(objects, root),
        out,
        form=form,
        everything=everything,
        recipe=decode_recipe(objects.get(made_by.recipe)) if made_by else None,
        facts=facts,
        tokeniser=huggingface.tokeniser_of(objects, made_by.data) if made_by and form == exports.HF else None,
        tell=lambda line: say(console, line),
    )
    if as_json:
        return print_json(told)
    say(console, f"{out}: {told['tensors']} tensors of state {root.hex()}, {size(told['bytes'])}")
    return 0


@app.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A safetensors file, or one of torch.save.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The pin under which the state is kept.")],
    form: Annotated[str | None, typer.Option("--format", help="safetensors or torch; by the suffix without.")] = None,
    store: StoreFolder = ".trueweight",
    as_json: AsJson = False,
) -> int:
    """Take tensors from a file into the store, as a pinned state with a root. Nothing in the file is executed.

    \b
    trueweight store import model.safetensors base
    """
    console = console_for(as_json)
    arrays = tensor_files.load_file(file, form or tensor_files.guess_form(file))
    objects = wiring.open_folder(store, create=True)
    with objects.writing(f"import {file}"), _progress(console, in_bytes=True) as advance:
        total, done = sum(array.nbytes for array in arrays.values()), 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            advance("importing", done, total)

        root = save_state(objects, arrays, advance=count)
        _pin(objects, name, root)
    if as_json:
        return print_json({"pin": name, "state": root.hex(), "tensors": len(arrays)})
    say(console, f"pinned {name}: {len(arrays)} tensors, state {root.hex()}")
    return 0


# -------------------------------------------------------------------------------------------------------- parts


def state_of(store: Store, name: str, segment: int | None) -> tuple[bytes, SegmentRecord | None]:
    """(state root, the segment that ends in it) of a run or a pin; UsageError naming what there is."""
    pinned = store.read(PINS + name) if name not in run_names(store) else None
    if pinned is not None:
        if segment is not None:
            raise UsageError(f"--segment {segment}: {name} is a pin, which holds one state; leave it out")
        return decode(Pin, pinned).state, None
    history = History.open(store, name)
    segments = history.segments()
    if segment is None:
        root = history.position().poststate
        return root, segments[-1] if segments and segments[-1].poststate == root else None
    if segment >= len(segments):
        raise UsageError(f"--segment {segment}: expected one below {len(segments)}; see `trueweight show {name}`")
    return segments[segment].poststate, segments[segment]


def seconds(text: str, option: str) -> float:
    """The seconds in 90s, 30m, 12h or 7d; UsageError naming the option otherwise."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number, unit = text[:-1], text[-1:]
    try:
        found = float(number) * units[unit]
    except (ValueError, KeyError):
        found = -1.0
    if not 0 <= found < float("inf"):
        raise UsageError(f"{option} {text!r}: expected a time such as 90s, 30m, 12h or 7d; correct it")
    return found


def size(count: int | None) -> str:
    """Bytes for people: 12 B, 3.4 kB, 1.18 GB."""
    if count is None:
        return "-"
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" or value >= 100 else f"{value:.3g} {units[0]}"


@dataclass(frozen=True, kw_only=True)
class _Owner:
    """Whose a checkpoint is: a run after a segment or some steps, or a pin."""

    name: str = "nothing"
    segment: int | None = None
    steps: int | None = None


def _checkpoints(store: Store) -> list[dict[str, Any]]:
    """A row for each checkpoint, by whose it is: runs by segment, pins, then those that nothing refers to."""
    owners, rows = _owners(store)
    found = list(filter(None, (root_of(one.key) for one in store.objects.list(CHECKPOINTS))))
    order = [root for root in owners if root in set(found)] + [root for root in found if root not in owners]
    whole: list[Checkpoint] = []
    fresh = []
    for root in order:
        owner = owners.get(root, _Owner())
        row: dict[str, Any] = {"of": owner.name, "segment": owner.segment, "steps": owner.steps, "state": root.hex()}
        try:
            checkpoint = open_checkpoint(store, root)
        except FailureError as error:
            rows.append({**_EMPTY, **row, "error": str(error)})
            continue
        whole.append(checkpoint)
        fresh.append({**row, "tensors": len(checkpoint.names), "logical": usage.logical_bytes(checkpoint)})
    own = ({"distinct": logical, "own": stored} for logical, stored in usage.own_bytes(whole))
    return [{**row, **sizes} for row, sizes in zip(fresh, own, strict=True)] + rows


_EMPTY = dict.fromkeys(("of", "segment", "steps", "state", "tensors", "logical", "distinct", "own"))


def _owners(store: Store) -> tuple[dict[bytes, _Owner], list[dict[str, Any]]]:
    """(the first owner of each state root, a row for each run or pin that cannot be read)."""
    owners: dict[bytes, _Owner] = {}
    damaged = []
    for run in run_names(store):
        try:
            history = History.open(store, run)
            owners.setdefault(history.run.initial_state, _Owner(name=run, steps=0))
            for one in history.segments():
                owner = _Owner(name=run, segment=one.index, steps=one.first_step + one.steps)
                owners.setdefault(one.poststate, owner)
            position = history.position()
            owners.setdefault(position.poststate, _Owner(name=run, steps=position.next_step))
        except FailureError as error:
            damaged.append({**_EMPTY, "of": run, "error": str(error)})
    for name in store.names(PINS):
        try:
            owners.setdefault(decode(Pin, store.read(name) or b"").state, _Owner(name=name.removeprefix(PINS)))
        except FailureError as error:
            damaged.append({**_EMPTY, "of": name, "error": str(error)})
    return owners, damaged


def _reference(store: Store, name: str) -> str:
    """The reference of a run or pin by the name that people use."""
    known = store.names("")
    for reference in (name, f"runs/{name}", PINS + name):
        if reference in known:
            return reference
    raise UsageError(f"{name!r}: expected a run or pin of {store} ({', '.join(known) or 'it has none'}); choose one")


def _pin(store: Store, name: str, root: bytes) -> None:
    """Set a pin, and see that what it keeps is there: a collection may have been under way."""
    reference = PINS + name
    value = encode(Pin(state=root))
    if store.read(reference) not in (None, value):
        raise UsageError(f"pin {name!r} holds another state; choose another --name, or `trueweight store unpin {name}`")
    if store.read(reference) is None:
        store.swap(reference, None, value)
    store.settle()
    lost = reachable(store, [reference]).lost
    if lost:
        store.swap(reference, value, None)
        raise lost[0].error


def _drop(store: Store, reference: str, as_json: bool) -> int:
    value = store.read(reference)
    if value is None:
        known = ", ".join(store.names(reference.partition("/")[0] + "/")) or "none"
        raise UsageError(f"{reference}: expected one of those in {store} ({known}); choose one")
    store.swap(reference, value, None)
    if as_json:
        return print_json({"dropped": reference})
    print(f"dropped {reference}; `trueweight store gc` collects what nothing else refers to")
    return 0


def _counted(files: tuple[Found, ...]) -> str:
    return f"{len(files)} files ({size(sum(found.size for found in files))})"


@contextmanager
def _progress(console: Console, *, in_bytes: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A function to be told (what, done, total), shown as a bar on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn() if in_bytes else MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
