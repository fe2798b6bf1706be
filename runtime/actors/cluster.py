"""A Ray cluster to work in: one that is there already, or one that is started for the occasion."""

import logging
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray

from runtime.actors import security
from storage.errors import FailureError, UsageError

CONNECT_SECONDS = 10.0
_DEFAULT_PORTS = {"http": 80, "https": 443}
_WHO = "/ray.rpc.NodeInfoGcsService/GetClusterId"  # a head answers it to anybody who may join
_HOW_TO_JOIN = (
    "run this on a host that `trueweight cluster up` set up, or set RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH and, for "
    "TLS, RAY_USE_TLS=1 and RAY_TLS_*"
)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster that this process is connected to. `started` says whether it ends with this process."""

    address: str
    started: bool
    cpus: float


@contextmanager
def joined(address: str | None = None, *, timeout: float = CONNECT_SECONDS) -> Iterator[Cluster]:
    """Connected to the cluster at `address`, else at RAY_ADDRESS, else to a new one on this machine.

    A new one has a token of its own. For one that is there the environment says how to talk to it, or else what
    `trueweight cluster up` left here for that address. On leaving, only a cluster that was started here is stopped.
    Raises FailureError where nothing answers within `timeout` seconds or the token is not the cluster's, UsageError
    for an address of another kind.
    """
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    if target not in ("local", "auto") and "://" in target:
        raise UsageError(f"Ray address {target!r}: expected HOST:PORT, got a URL; for those use `trueweight submit`")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with ExitStack() as stack:
        if target == "local":
            stack.enter_context(security.local())
        elif target != "auto":
            stack.enter_context(trusted(target))
            require_listener(target, timeout)
            require_welcome(target, timeout)
        found = _connect(target)
        stack.callback(ray.shutdown)  # only disconnects, unless `local` started the cluster: it ends with its driver
        resources: dict[str, float] = ray.cluster_resources()
        yield Cluster(
            address=str(found.address_info["address"]), started=target == "local", cpus=resources.get("CPU", 1.0)
        )


def _connect(target: str) -> Any:
    # Ray would tell of lost workers on stdout, between the lines or the JSON of a command, which tells of them itself.
    ray._private.worker._worker_logs_enabled = False
    hidden = os.environ.pop("RAY_ADDRESS", None)  # Ray would prefer it to the address that it is given
    try:
        return ray.init(address=target, log_to_driver=False, logging_level=logging.ERROR, **_extras(target))
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise FailureError(
            f"Ray cluster at {target}: expected to join it, got {_first_line(error)}; run this on a host of it, "
            f"or hand the recipe to it with `trueweight submit RECIPE --address http://HEAD:8265`"
        ) from error
    finally:
        if hidden is not None:
            os.environ["RAY_ADDRESS"] = hidden


@contextmanager
def trusted(address: str) -> Iterator[None]:
    """Ray here talks to `address` with what `trueweight cluster up` left for it, unless the environment says how."""
    found = None if security.told() else security.known(address)
    if found is None:
        yield
        return
    with security.applied(found.environment()):
        yield


def require_listener(address: str, timeout: float) -> None:
    """Return where something accepts connections at HOST:PORT or a URL; raise within `timeout` seconds otherwise."""
    host, port = _host_port(address)
    try:
        socket.create_connection((host, port), timeout=timeout).close()
    except OSError as error:
        raise FailureError(
            f"Ray cluster at {address}: expected an answer within {timeout:g} s, got {error.strerror or error}; check "
            f"the address (--address or RAY_ADDRESS) and that the cluster's head is up"
        ) from error


def require_welcome(address: str, timeout: float) -> None:
    """Return where the head at HOST:PORT takes this process's token and certificates.

    Ray itself tries for 20 s with a wrong token, and for ever where only one side encrypts.
    """
    encrypted = os.environ.get(security.TLS, "0").lower() in ("1", "true")
    if _speaks_tls(address, timeout) != encrypted:
        wanted, got = ("TLS", "a cluster without it") if encrypted else ("a cluster without TLS", "one with it")
        remedy = "unset RAY_USE_TLS" if encrypted else _HOW_TO_JOIN
        raise FailureError(f"Ray cluster at {address}: expected {wanted}, got {got}; {remedy}")
    import grpc

    with _channel(address, encrypted) as channel:
        call = channel.unary_unary(_WHO)
        try:
            call(b"", timeout=timeout, metadata=_authorization(), wait_for_ready=True)
        except grpc.RpcError as error:
            code = error.code()
            if code == grpc.StatusCode.UNAUTHENTICATED:
                raise FailureError(
                    f"Ray cluster at {address}: expected its token, got {_named_token()}; {_HOW_TO_JOIN}"
                ) from error
            if code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
                raise FailureError(
                    f"Ray cluster at {address}: expected its head to answer within {timeout:g} s, got "
                    f"{code.name.lower()}; check that a Ray head is behind that port and, for TLS, that its "
                    f"certificate names this address"
                ) from error


def _channel(address: str, encrypted: bool) -> Any:
    import grpc

    if not encrypted:
        return grpc.insecure_channel(address)
    try:
        chain, key, ca = (
            Path(os.environ[f"RAY_TLS_{name}"]).read_bytes() for name in ("SERVER_CERT", "SERVER_KEY", "CA_CERT")
        )
    except (KeyError, OSError) as error:
        raise UsageError(
            f"RAY_USE_TLS=1: expected certificates to read, got {error}; set RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY "
            f"and RAY_TLS_CA_CERT to files of this host"
        ) from error
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, chain))


def _authorization() -> list[tuple[str, str]]:
    """What Ray sends with each call."""
    token = _token()
    return [("authorization", f"Bearer {token}")] if token else []


def _token() -> str:
    if os.environ.get(security.MODE, "").lower() != "token":
        return ""
    text = os.environ.get(security.TOKEN_TEXT)
    file = Path(os.environ.get(security.TOKEN_PATH) or "~/.ray/auth_token").expanduser()
    try:
        return (text or file.read_text(encoding="utf-8")).strip()
    except OSError:
        return ""


def _named_token() -> str:
    """Which token this process has, without telling it."""
    if not _token():
        return "none"
    if os.environ.get(security.TOKEN_TEXT):
        return f"the one in {security.TOKEN_TEXT}"
    return f"the one in {os.environ.get(security.TOKEN_PATH) or '~/.ray/auth_token'}"


def _speaks_tls(address: str, timeout: float) -> bool:
    """Whether the server answers a TLS greeting in kind. Whom it is, is not asked here."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, port = _host_port(address)
    try:
        with (
            socket.create_connection((host, port), timeout=timeout) as plain,
            context.wrap_socket(plain, server_hostname=host) as wrapped,
        ):
            return wrapped.version() is not None
    except (OSError, ValueError):
        return False


def _host_port(address: str) -> tuple[str, int]:
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        port = None
    if not parts.hostname or port is None:
        raise UsageError(f"Ray address {address!r}: expected HOST:PORT such as 10.0.0.1:6379; correct --address")
    return parts.hostname, port


def _extras(target: str) -> dict[str, Any]:
    """A cluster started for one run needs no dashboard; where one is joined, that is not for us to say."""
    return {"include_dashboard": False} if target == "local" else {}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
