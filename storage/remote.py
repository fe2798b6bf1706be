"""Keys as objects of a bucket, or of whatever else fsspec opens; every operation is tried again until a deadline.

References rest on one thing: a key is created only where it is absent, whoever else writes. The filesystems that do
this on the server are the rows of `_CREDENTIALS`; any other is opened for reading alone, since fsspec looks first and
writes afterwards there. Servers differ from what they imitate, so the first create is put twice to see it refused.
"""

import errno
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from random import SystemRandom
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from fsspec.core import url_to_fs

from storage.errors import FailureError, UsageError
from storage.objects import Data, Found

T = TypeVar("T")

DEADLINE = 120.0
"""Seconds for which an operation is tried again."""
FIRST_DEADLINE = 20.0
"""The same until the server has answered once: a wrong name is told soon, a long night at the server is sat out."""
_LEAST_TRIES = 3  # even of an operation that takes longer than the deadline: a large file, a long list
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
_CONNECT_SECONDS, _SILENT_SECONDS = 10, 60

_CREDENTIALS = {
    "s3": "AWS_PROFILE or AWS_ACCESS_KEY_ID",  # If-None-Match: *
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",  # ifGenerationMatch=0
    "abfs": "AZURE_STORAGE_ACCOUNT_NAME",  # overwrite=False
    "memory": "nothing",  # a lock: it is in this process
}
"""Filesystems whose pipe_file(mode="create") is atomic, and what to check where they deny access."""
_RIGHTS = {
    "reading": "read and list (on S3: s3:GetObject, s3:ListBucket)",
    "listing": "list (on S3: s3:ListBucket)",
    "creating": "write (on S3: s3:PutObject)",
    "writing": "write (on S3: s3:PutObject)",
    "deleting": "delete (on S3: s3:DeleteObject)",
}
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_TIMES = ("LastModified", "mtime", "last_modified", "modified", "created")
_MEMORY = threading.RLock()
_RANDOM = SystemRandom()


class FsspecObjects:
    """An ObjectStore under `root` of an fsspec filesystem, called `url` in messages.

    The filesystem's own retries should be off: `create` takes a key that it meets for its own only where it has tried
    before and the bytes are equal. `clock` and `wait` are in seconds.
    """

    def __init__(
        self,
        filesystem: Any,
        root: str,
        url: str,
        *,
        deadline: float = DEADLINE,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        names = filesystem.protocol
        self._files, self._root, self._url = filesystem, root.rstrip("/"), url.rstrip("/")
        self._protocol: str = names if isinstance(names, str) else names[0]
        self._web = self._protocol == "http"
        self._deadline, self._clock, self._wait = deadline, clock, wait
        self._answered = False
        in_process = self._protocol == "memory"
        self._lock: AbstractContextManager[Any] = _MEMORY if in_process else nullcontext()
        self._exclusive = in_process  # else seen by the first create

    def __str__(self) -> str:
        return self._url

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """See ObjectStore."""
        if stop is not None and stop <= start:
            return None if self.find(key) is None else b""
        try:
            return self._tried("reading", key, lambda: self._part(self._path(key), start, stop))
        except FileNotFoundError:
            return None

    def create(self, key: str, data: Data) -> bool:
        """See ObjectStore. Of writers that race with equal bytes, several may be told True where answers are lost."""
        self._require_exclusive()
        data = bytes(data)
        made, tries = self._piped("creating", key, data)
        if made and not self._exclusive:
            if self._piped("creating", key, data)[0]:  # the same bytes: no harm done
                raise UsageError(
                    f"{self} overwrites a key that it was told to create, so two writers could lose one another's "
                    f"reference: expected a server with conditional puts; use one that has them, or a folder"
                )
            self._exclusive = True
        return made or (tries > 1 and self.read(key) == data)

    def replace(self, key: str, data: Data) -> None:
        """See ObjectStore."""
        self._require_exclusive()
        self._piped("writing", key, bytes(data), mode="overwrite")

    def find(self, key: str) -> Found | None:
        """See ObjectStore."""
        try:
            return self._tried("reading", key, lambda: self._looked_up(key))
        except FileNotFoundError:
            return None

    def list(self, prefix: str) -> Iterator[Found]:
        """See ObjectStore."""
        try:
            return self._tried("listing", prefix, lambda: self._listed(prefix))
        except FileNotFoundError:
            return iter(())

    def delete(self, key: str) -> None:
        """See ObjectStore. Tried once: a second try could take what another writer has created since the first."""
        self._require_exclusive()
        try:
            self._tried("deleting", key, lambda: self._files.rm_file(self._path(key)), again=False)
        except FileNotFoundError:
            return

    # ------------------------------------------------------------------------------------------------- one request

    def _part(self, path: str, start: int, stop: int | None) -> bytes:
        try:
            if not self._web:
                return bytes(self._files.cat_file(path, start=start, end=stop))
            size = None if (start, stop) == (0, None) else self._files.info(path)["size"]
            if size is None:
                return bytes(self._files.cat_file(path))[start:stop]
            data = bytes(self._files.cat_file(path, start=start, end=stop))
            return data[start:stop] if len(data) == size else data  # a web server may send all, whatever is asked
        except Exception as error:
            if _status(error) == 416:
                return b""
            raise

    def _piped(self, doing: str, key: str, data: bytes, mode: str = "create") -> tuple[bool, int]:
        """(whether the key was written rather than there already, number of tries)."""
        tries = 0

        def pipe() -> bool:
            nonlocal tries
            tries += 1
            try:
                self._files.pipe_file(self._path(key), data, mode=mode)
            except Exception as error:
                if mode == "create" and (isinstance(error, FileExistsError) or _status(error) == 412):
                    return False
                raise
            return True

        try:
            return self._tried(doing, key, pipe), tries
        except FileNotFoundError as error:  # objects have no folders that could be missing
            raise self._failure(_Kind.NO_BUCKET, doing, key, f"no such bucket ({_said(error.__cause__)})") from error

    def _looked_up(self, key: str) -> Found | None:
        self._files.invalidate_cache()
        info = self._files.info(self._path(key))
        return self._found(key, info) if info["type"] == "file" else None

    def _listed(self, prefix: str) -> Iterator[Found]:
        self._files.invalidate_cache()
        if self._protocol in _CREDENTIALS:
            infos = self._files.find(self._root, detail=True, prefix=prefix)
        else:
            infos = self._files.find(self._path(prefix.rpartition("/")[0]).rstrip("/"), detail=True)
        keys = {self._key(name): info for name, info in infos.items()}
        wanted = sorted(key for key in keys if key.startswith(prefix) and key[-1:] not in "/")  # no placeholders
        if self._web:  # a page of links tells names alone
            looked_up = (self.find(key) for key in wanted)
            return iter([found for found in looked_up if found is not None])
        return iter([self._found(key, keys[key]) for key in wanted])

    def _found(self, key: str, info: dict[str, Any]) -> Found:
        size, when = info["size"], next((info[name] for name in _TIMES if info.get(name) is not None), None)
        if size is None:
            size = len(self._files.cat_file(self._path(key)))
        if when is None and self._protocol in _CREDENTIALS:
            raise FailureError(f"{self} does not say when {key} was written; upgrade fsspec and its driver")
        seconds = 0.0 if when is None else float(when.timestamp() if hasattr(when, "timestamp") else when)
        if "LastModified" in info:
            seconds = float(math.floor(seconds))  # S3 lists milliseconds, and looks up seconds
        return Found(key=key, size=int(size), modified=seconds)

    def _path(self, key: str) -> str:
        return f"{self._root}/{quote(key) if self._web else key}"

    def _key(self, path: str) -> str:
        """The key at a path, empty where the path is none of ours."""
        if not path.startswith(self._root + "/"):
            return ""
        key = path[len(self._root) + 1 :]
        return key if not self._web else "" if "?" in key else unquote(key)

    # ------------------------------------------------------------------------------------------------- many requests

    def _tried(self, doing: str, key: str, act: Callable[[], T], *, again: bool = True) -> T:
        """What `act` returns, at last. FileNotFoundError where the key is not there; FailureError."""
        began, tries = self._clock(), 0
        while True:
            tries += 1
            try:
                with self._lock:
                    result = act()
                self._answered = True
                return result
            except FailureError:  # of a request within
                raise
            except Exception as error:
                kind, said = _kind(error), _said(error)
                self._answered |= kind is not _Kind.PASSING or _status(error) is not None
                if kind is _Kind.MISSING:
                    raise FileNotFoundError(key) from error
                spent = self._clock() - began
                pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (tries - 1)) * (0.5 + _RANDOM.random() / 2)
                if tries > 1:
                    said = f"gave up after {tries} tries in {spent:.0f} s: {said}"
                deadline = self._deadline if self._answered else min(self._deadline, FIRST_DEADLINE)
                late = tries >= _LEAST_TRIES and spent + pause > deadline
                if kind is not _Kind.PASSING or not again or late:
                    raise self._failure(kind, doing, key, said) from error
            self._wait(pause)

    def _failure(self, kind: "_Kind", doing: str, key: str, said: str) -> FailureError:
        remedy = kind.value
        if kind is _Kind.DENIED:
            check = _CREDENTIALS.get(self._protocol, "the credentials")
            said = f"access denied ({said})"
            remedy = f"check {check}, or give these credentials the right to {_RIGHTS[doing]}"
        return FailureError(f"{doing} {key or 'all keys'} in {self}: {said}; {remedy}")

    def _require_exclusive(self) -> None:
        if self._protocol not in _CREDENTIALS:
            raise UsageError(
                f"{self} can be read, not written: fsspec's {self._protocol!r} cannot create a file only where it is "
                f"absent, so two writers could lose one another's reference; write to a folder, s3://, gs:// or az://"
            )


def open_remote(url: str, **timing: Any) -> FsspecObjects:
    """What is at a URL that fsspec opens; most servers are asked nothing yet. UsageError for a URL that is none.

    `timing` is the `deadline`, `clock` and `wait` of FsspecObjects.
    """
    protocol = url.partition("://")[0]
    try:
        filesystem, root = url_to_fs(url, **_options(protocol))
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"run pip install 'trueweight[{extra}]'" if extra else "install that package"
        raise UsageError(f"store {url}: {error}; {remedy}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"store {url}: {error}; choose a folder or a URL such as s3://bucket/path") from error
    except Exception as error:  # some connect at once
        raise FailureError(f"opening {url}: {_said(error)}; {_Kind.LASTING.value}") from error
    if protocol in _EXTRAS and not root.strip("/"):
        raise UsageError(f"store {url}: expected a bucket; name it as in {protocol}://bucket/path")
    if _EXTRAS.get(protocol) == "s3":
        filesystem.retries = 1  # s3fs's own, beside botocore's; gcsfs's stay: references know their entries by a nonce
    return FsspecObjects(filesystem, root, url, **timing)


def _options(protocol: str) -> dict[str, Any]:
    """What a filesystem is made with: no cache of its own, and an end to waiting for one answer."""
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in ("s3", "s3a"):
        times = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _SILENT_SECONDS}
        return options | {"config_kwargs": times | {"retries": {"total_max_attempts": 1}, "max_pool_connections": 64}}
    if protocol in ("abfs", "abfss", "az"):
        return options | {"connection_timeout": _CONNECT_SECONDS, "read_timeout": _SILENT_SECONDS}
    if protocol in ("gs", "gcs", "http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(sock_connect=_CONNECT_SECONDS, sock_read=_SILENT_SECONDS)
        if protocol in ("gs", "gcs"):
            return options | {"requests_timeout": timeout}
        plain = {"Accept-Encoding": "identity"}  # a part of a compressed file is no part of the file
        return options | {"simple_links": False, "headers": plain, "client_kwargs": {"timeout": timeout}}
    return {}


# ------------------------------------------------------------------------------------------------ what went wrong


class _Kind(Enum):
    """Of errors; the value is the remedy."""

    MISSING = "check the key"
    NO_BUCKET = "make that bucket, or check its name"
    DENIED = "check the credentials"
    PASSING = "check the network and that service, then run the command again"
    LASTING = "check the URL and that service, then run the command again"


_PASSING_ERRNO = {
    getattr(errno, name)
    for name in (
        *("EIO", "EREMOTEIO", "EAGAIN", "EBUSY", "EINTR", "EPIPE", "ETIMEDOUT"),
        *("ENETDOWN", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH"),
    )
    if hasattr(errno, name)
}
# Classes of drivers that may not be installed; s3fs: botocore and aiohttp, gcsfs: requests and google, adlfs: azure.
_PASSING_NAMES = {
    *("HTTPClientError", "ResponseStreamingError", "IncompleteReadError", "ResponseParserError"),
    *("ClientConnectionError", "ClientPayloadError", "ConnectionError", "Timeout", "ChunkedEncodingError"),
    *("TransportError", "ChecksumError", "ServiceRequestError", "ServiceResponseError"),
}
_PASSING_STATUS = {408, 409, 425, 429}
_DENIED_NAME = re.compile("Credential|ClientAuthentication|SSOToken|TokenRetrieval|ProfileNotFound|RefreshError")
_NO_BUCKET = re.compile("specified (bucket|container) does not exist")


def _kind(error: BaseException) -> _Kind:
    status, names = _status(error), {cls.__name__ for cls in type(error).__mro__}
    if _NO_BUCKET.search(str(error)):
        return _Kind.NO_BUCKET
    if isinstance(error, FileNotFoundError):
        # fsspec's http says so of whatever fails
        below = _kind(error.__cause__) if error.__cause__ else _Kind.MISSING
        return below if below in (_Kind.DENIED, _Kind.PASSING) else _Kind.MISSING
    if isinstance(error, TimeoutError | ConnectionError):
        return _Kind.PASSING
    if status in (404, 410):
        return _Kind.MISSING
    denied = isinstance(error, PermissionError) or status in (401, 403) or str(error).startswith("Forbidden")
    if denied or any(_DENIED_NAME.search(name) for name in names):
        return _Kind.DENIED
    busy = status is not None and (status in _PASSING_STATUS or status >= 500)
    if busy or names & _PASSING_NAMES or getattr(error, "errno", None) in _PASSING_ERRNO:
        return _Kind.PASSING
    return _Kind.LASTING


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of the answer behind an error: of botocore, aiohttp, azure, gcsfs, in that order."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status: int | None = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status
        for name in ("status", "status_code", "code"):
            code = str(getattr(error, name, None))
            if code.isdecimal():
                return int(code)
        error = error.__cause__
    return None


def _said(error: BaseException | None) -> str:
    """An error in one line."""
    return ": ".join(part for part in (type(error).__name__, " ".join(str(error).split())) if part)
