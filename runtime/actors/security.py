"""Who may talk to a Ray cluster: its token, where its certificates are, and the environment that tells Ray of both."""

import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from storage.errors import FailureError

FOLDER = "~/.trueweight/cluster"
TOKEN, CLUSTER, HOSTS = "token", "cluster.json", "hosts"  # file names, not secrets
CA_KEY, CA, CERTIFICATE, KEY = "ca.key", "ca.crt", "host.crt", "host.key"

# A node whose process is gone is noticed after three periods, one that hangs after three timeouts and periods: 1.5 s
# and 4.5 s. Only the head reads them; a node has them too in case that it becomes one.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
# Where one of these is set the user has said how to talk to clusters.
EXPLICIT = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USE_TLS")
MODE, TOKEN_TEXT, TOKEN_PATH, TLS = EXPLICIT


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """A token's file and, where gRPC is encrypted, the folder with ca.crt, host.crt and host.key."""

    token: Path
    certificates: Path | None = None

    def environment(self) -> dict[str, str]:
        """What Ray has to find in the environment of a node or a driver."""
        told = {MODE: "token", TOKEN_PATH: str(self.token)}
        if self.certificates is None:
            return told
        return told | {
            TLS: "1",
            "RAY_TLS_SERVER_CERT": str(self.certificates / CERTIFICATE),
            "RAY_TLS_SERVER_KEY": str(self.certificates / KEY),
            "RAY_TLS_CA_CERT": str(self.certificates / CA),
        }


# ------------------------------------------------------------------------------------------------------ what there is


def told() -> bool:
    """Whether the user's environment already says how to talk to a cluster."""
    return any(name in os.environ for name in EXPLICIT)


def known(address: str, folder: str = FOLDER) -> Credentials | None:
    """The credentials of the cluster at HOST:PORT or at the URL of its dashboard, where `trueweight cluster` left them.

    A dashboard is also known by its port alone on this machine, where an SSH tunnel ends. None for other clusters.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    found = []
    for file in sorted(Path(folder).expanduser().glob(f"*/{CLUSTER}")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            host, port, dashboard = str(record["address"]), int(record["port"]), int(record["dashboard_port"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if "://" in address:
            matches = parts.port == dashboard and parts.hostname in (host, "localhost", "127.0.0.1")
        else:
            matches = (parts.hostname, parts.port) == (host, port)
        if matches:
            found.append(_credentials(file.parent, record))
    return found[0] if len(found) == 1 else None


def _credentials(folder: Path, record: Mapping[str, object]) -> Credentials:
    """The folder's token, and the certificates of whichever of the cluster's hosts this machine is."""
    hosts = record.get("hosts")
    for name, address in hosts.items() if record.get("tls") and isinstance(hosts, Mapping) else ():
        if (folder / HOSTS / name / KEY).is_file() and _is_here(str(address)):
            return Credentials(token=folder / TOKEN, certificates=folder / HOSTS / name)
    return Credentials(token=folder / TOKEN)


def _is_here(address: str) -> bool:
    """Whether the address is one of this machine's: only those can be bound."""
    try:
        family = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


@contextmanager
def applied(environment: Mapping[str, str]) -> Iterator[None]:
    """Ray in this process and in those that it starts follows `environment`; on leaving it is as it was before.

    A token that stands in RAY_AUTH_TOKEN is hidden where another is named, because Ray would prefer it.
    """
    changed: dict[str, str | None] = dict(environment)
    if TOKEN_PATH in changed:
        changed.setdefault(TOKEN_TEXT, None)
    before = {name: os.environ.get(name) for name in changed}
    try:
        _set(changed)
        yield
    finally:
        _set(before)


def _set(environment: Mapping[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    # Ray reads both once a process, when it is imported. It does the same where `ray.init` turns tokens on.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def local() -> Iterator[None]:
    """For a cluster on this machine that lives for the occasion: a token of its own, unless the user wants none."""
    if os.environ.get(MODE, "token").lower() != "token":
        with applied(HEALTH):
            yield
        return
    with TemporaryDirectory(prefix="trueweight-ray-") as folder:
        credentials = Credentials(token=make_token(Path(folder) / TOKEN))
        with applied(credentials.environment() | HEALTH):
            yield


# ------------------------------------------------------------------------------------------------------ making them


def make_token(path: Path) -> Path:
    """The path, which holds a token that only its owner can read; a new one where there was none."""
    if not path.is_file():
        write_private(path, secrets.token_hex(32))
    return path


def write_private(path: Path, text: str) -> None:
    """Put the text there in one move, for its owner's eyes only (0600, in a folder of 0700 where it is new)."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise FailureError(f"{path}: expected to write it, got {error.strerror}; make the folder writable") from error
