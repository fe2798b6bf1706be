"""Puts the parts together: from a recipe or a run's name to a controller with everything that it needs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runtime.controller import Job
from runtime.costs import Model
from runtime.data import open_dataset, prepare
from runtime.executors import named
from runtime.feed import Feed
from runtime.groups import LocalGroup, Membership, WorkerGroup
from runtime.program.training import TrainingProgram
from runtime.recipe import FactoryConfig, Recipe, decode_recipe
from runtime.revision import Sites
from runtime.segments import History, free_name, head_name, taken
from storage.errors import UsageError
from storage.local import LocalObjects
from storage.store import Store, open_store
from trueweight.locks import Lock

KEYS = "~/.trueweight/keys"
"""Folder of a host's worker key, unless --keys says otherwise."""

Tell = Callable[[str], None]


def open_folder(folder: str, *, create: bool) -> Store:
    """The store in a folder (`~` allowed) or at a URL."""
    return open_store(folder if "://" in folder else str(Path(folder).expanduser()), create=create)


def store_folder(store: Store) -> Path | None:
    """The store's folder, None where it is elsewhere."""
    return store.objects.path if isinstance(store.objects, LocalObjects) else None


def run_folder(store: Store, name: str) -> Path | None:
    """Where a run's diary is kept, None for a store without a folder."""
    folder = store_folder(store)
    return folder / "runs" / name if folder else None


def choose_name(store: Store, name: str | None, *, default: str) -> str:
    """The name of a new run: the given one, which must be free, else the default or its first free successor."""
    if name is None:
        return free_name(store, default)
    if store.read(head_name(name)) is not None:
        raise taken(name)
    return name


def prepare_job(store: Store, recipe: Recipe, *, name: str, folder: Path, tell: Tell) -> Job:
    """A job whose recipe, data and programs are in the store. Model code, the user's too, is imported here only.

    `folder` is where the recipe's relative paths start.
    """
    from runtime.program.build import build_training_program

    tell(f"recipe {recipe.name}: {recipe.digest.hex()}")
    store.put(recipe.canonical())
    data = prepare(
        recipe.data, store, folder=folder, progress=lambda what, share: tell(f"data: {what}") if share < 1 else None
    )
    dataset = open_dataset(store, data)
    tell(f"data root: {data.hex()}")
    program = build_training_program(recipe, dataset)
    programs = store.put(program.encode())
    tell(f"program root: {program.root.hex()} ({len(program.blocks)} blocks, {len(program.kinds)} kinds)")
    return Job(name=name, feed=Feed(recipe=recipe, dataset=dataset), program=program, programs=programs, data=data)


def stored_job(store: Store, history: History) -> Job:
    """The job of a run that has begun: recipe, data and programs as committed, nothing lowered or prepared anew."""
    run = history.run
    feed = Feed(recipe=decode_recipe(store.get(run.recipe)), dataset=open_dataset(store, run.data))
    program = TrainingProgram.decode(store.get(run.programs))
    return Job(name=run.name, feed=feed, program=program, programs=run.programs, data=run.data, engine=run.engine)


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Where workers are started. `membership` is None where they cannot change; `cpus` are those of all hosts."""

    group: WorkerGroup
    membership: Membership | None = None
    cpus: float = 1.0
    survey: Callable[[TrainingProgram, bytes], tuple[Model, Sites]] | None = None
    """Measures the hosts at a program, given with its encoding; None where there are none to tell apart."""


@contextmanager
def worker_group(*, local: bool, address: str | None, executor: str, tell: Tell) -> Iterator[Workers]:
    """A group to start workers in: this process, the Ray cluster that is named, or one that lives for the occasion."""
    make = named(executor)
    if local:
        if address:
            raise UsageError(
                "--local runs in this process, --address in a cluster: expected one of them; drop the other"
            )
        from runtime.worker import worker_builder

        yield Workers(group=LocalGroup(worker_builder(make)))
        return
    from runtime.actors.cluster import joined
    from runtime.actors.group import RayGroup
    from runtime.actors.sites import RaySites

    with joined(address) as cluster:
        tell(f"Ray {'started' if cluster.started else 'joined'} at {cluster.address}: {cluster.cpus:g} CPUs")
        group = RayGroup(cpus=cluster.cpus, executor=executor)

        def survey(program: TrainingProgram, programs: bytes) -> tuple[Model, Sites]:
            sites = RaySites(group, program=program, programs=programs, executor=executor, tell=tell)
            return sites.model(), sites

        yield Workers(group=group, membership=group, cpus=cluster.cpus, survey=survey)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What a step consumes: `items` of `name`, tokens or images."""

    items: int
    name: str


def consumed(feed: Feed) -> Unit:
    """What one step of the feed consumes."""
    dataset = feed.dataset
    batch = feed.recipe.training.batch
    return Unit(items=batch * dataset.context, name="tokens" if dataset.is_text else "images")


def found_roots(job: Job) -> dict[str, str]:
    """The roots that are known before training, by their names in a lock."""
    return {"recipe": job.feed.recipe.digest.hex(), "data": job.data.hex(), "program": job.program.root.hex()}


def lock_of(history: History) -> Lock:
    """The lock of a run; UsageError unless it is finished."""
    if history.head.status != "finished":
        raise UsageError(
            f"run {history.name}: expected a finished run to lock, got one that is {history.head.status}; "
            f"finish it with `trueweight resume {history.name}`"
        )
    run = history.run
    return Lock(
        recipe=run.recipe.hex(),
        data=run.data.hex(),
        program=run.program_root.hex(),
        state=history.position().poststate.hex(),
    )


def recipe_files(recipe: Recipe, path: Path) -> tuple[list[Path], list[str]]:
    """(the local files that the recipe names, the modules that its factory needs): what a job has to be sent."""
    named = [recipe.data.tokeniser_file, recipe.data.url if "://" not in recipe.data.url else ""]
    files = [path.parent / name for name in named if name]
    for file in files:
        if not file.is_file():
            raise UsageError(f"recipe {path}: expected the file {file}, got nothing there; correct its [data] table")
    modules = [recipe.model.factory.split(":")[0].split(".")[0]] if isinstance(recipe.model, FactoryConfig) else []
    return files, modules
