"""A Ray cluster to work in: one that is there already, or one that is started for the occasion."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import ray

from storage.errors import FailureError, UsageError

CONNECT_SECONDS = 10.0
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster that this process is connected to. `started` says whether it ends with this process."""

    address: str
    started: bool
    cpus: float


@contextmanager
def joined(address: str | None = None, *, timeout: float = CONNECT_SECONDS) -> Iterator[Cluster]:
    """Connected to the cluster at `address`, else at RAY_ADDRESS, else to a new one on this machine.

    On leaving, only a cluster that was started here is stopped. Raises FailureError where nothing answers within
    `timeout` seconds, UsageError for an address of another kind.
    """
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if target not in ("local", "auto"):
        if "://" in target:
            raise UsageError(
                f"Ray address {target!r}: expected HOST:PORT, got a URL; for those use `trueweight submit`"
            )
        require_listener(target, timeout)
    hidden = os.environ.pop("RAY_ADDRESS", None)  # Ray would prefer it to the address that it is given
    try:
        found: Any = ray.init(address=target, log_to_driver=False, logging_level=logging.ERROR, **_extras(target))
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise FailureError(
            f"Ray cluster at {target}: expected to join it, got {_first_line(error)}; run this on a host of it, "
            f"or hand the recipe to it with `trueweight submit RECIPE --address http://HEAD:8265`"
        ) from error
    finally:
        if hidden is not None:
            os.environ["RAY_ADDRESS"] = hidden
    try:
        resources: dict[str, float] = ray.cluster_resources()
        yield Cluster(
            address=str(found.address_info["address"]), started=target == "local", cpus=resources.get("CPU", 1.0)
        )
    finally:
        ray.shutdown()  # only disconnects, unless `local` started the cluster: that one ends with its driver


def require_listener(address: str, timeout: float) -> None:
    """Return where something accepts connections at HOST:PORT or a URL; raise within `timeout` seconds otherwise."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        port = None
    if not parts.hostname or port is None:
        raise UsageError(f"Ray address {address!r}: expected HOST:PORT such as 10.0.0.1:6379; correct --address")
    try:
        socket.create_connection((parts.hostname, port), timeout=timeout).close()
    except OSError as error:
        raise FailureError(
            f"Ray cluster at {address}: expected an answer within {timeout:g} s, got {error.strerror or error}; check "
            f"the address (--address or RAY_ADDRESS) and that the cluster's head is up"
        ) from error


def _extras(target: str) -> dict[str, Any]:
    """A cluster started for one run needs no dashboard; where one is joined, that is not for us to say."""
    return {"include_dashboard": False} if target == "local" else {}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
