"""A recipe handed to a Ray cluster as a job: the right files shipped, the log followed, its exit code returned."""

import asyncio
import importlib.util
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from runtime.actors.cluster import CONNECT_SECONDS, require_listener, trusted
from storage.errors import FailureError, UsageError

PACKAGES = ("trueweight", "verification", "runtime", "ledger", "storage")
_SKIPPED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "node_modules")


def submit_job(
    *,
    address: str,
    recipe: Path,
    files: Sequence[Path],
    modules: Sequence[str],
    arguments: Sequence[str],
    write: Callable[[str], None],
    started: Callable[[str], None],
    timeout: float = CONNECT_SECONDS,
) -> int:
    """The exit code of `python -m trueweight run RECIPE arguments...` as a job of the cluster at `address`.

    `files` are the recipe's own (beside it or below), `modules` the Python modules that its factory lives in.
    `started` is told the job's id, `write` every piece of its log. The token is what the environment says
    (RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH), or else what `trueweight cluster up` left for the address.
    """
    if not address.startswith(("http://", "https://")):
        raise UsageError(f"--address {address!r}: expected the head's dashboard such as http://10.0.0.1:8265")
    require_listener(address, timeout)
    with trusted(address), TemporaryDirectory(prefix="trueweight-job-") as folder:
        entry = _stage(Path(folder), recipe, files, modules)
        client = _client(address)
        command = shlex.join(["python", "-m", "trueweight", "run", entry, *arguments])
        try:
            job = client.submit_job(entrypoint=command, runtime_env={"working_dir": folder})
        except (RuntimeError, OSError) as error:
            raise FailureError(
                f"job at {address}: expected it to be accepted, got {error}; see the head's log"
            ) from error
        started(job)
        asyncio.run(_follow(client, job, write))
        return _exit_code(client, job)


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    # The client lets these override the address that it is given; the one on the command line is what the user means.
    hidden = {name: os.environ.pop(name) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS") if name in os.environ}
    try:
        return JobSubmissionClient(address)
    except Exception as error:  # Ray raises several kinds, AuthenticationError among them
        raise FailureError(
            f"Ray jobs at {address}: expected a Ray dashboard that lets us in, got {str(error).strip()}; check it "
            f"and, for a cluster with tokens, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from error
    finally:
        os.environ.update(hidden)


def _stage(folder: Path, recipe: Path, files: Sequence[Path], modules: Sequence[str]) -> str:
    """Copy what the job needs into `folder`; the recipe's path in there."""
    for name in PACKAGES:
        _copy_module(name, folder)
    for name in modules:
        _copy_module(name, folder)
    for file in (recipe, *files):
        target = folder / "job" / Path(os.path.relpath(file, recipe.parent))
        if not target.resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"recipe {recipe}: expected its files in its own folder, got {file}; move it there")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return f"job/{recipe.name}"


def _copy_module(name: str, folder: Path) -> None:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UsageError(
            f"module {name!r}: expected to find its files here, got none; run this where it can be imported"
        )
    origin = Path(spec.origin)
    if origin.name == "__init__.py":
        shutil.copytree(origin.parent, folder / name, ignore=_SKIPPED, dirs_exist_ok=True)
    else:
        shutil.copyfile(origin, folder / origin.name)


async def _follow(client: Any, job: str, write: Callable[[str], None]) -> None:
    """Write the job's log until the job ends or the log breaks off; the exit code tells which."""
    try:
        async for piece in client.tail_job_logs(job):
            write(piece)
    except (RuntimeError, OSError) as error:
        write(f"\nlog of {job} broke off: {error}\n")


def _exit_code(client: Any, job: str) -> int:
    """0 where the job succeeded, the exit code of its command where it failed."""
    details = client.get_job_info(job)
    status = str(details.status.value if hasattr(details.status, "value") else details.status)
    if status == "SUCCEEDED":
        return 0
    if status == "FAILED" and details.driver_exit_code:
        return int(details.driver_exit_code)
    raise FailureError(
        f"job {job}: expected it to succeed, got {status}: {details.message or 'no message'}; see `ray job logs {job}`"
    )
