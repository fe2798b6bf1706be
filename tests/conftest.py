"""What all tests share: which files begin, and an S3 server in this process, moto's, with a bucket for each test."""

import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

SECONDS = {"slow": 15.0, "ray": 10.0, "chain": 3.0}
"""Of a test with such a mark, roughly; of one without, a tenth of a second."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first: one that came last would leave the other workers with nothing to do."""
    files: dict[Any, float] = {}
    for item in items:
        seconds = max((s for mark, s in SECONDS.items() if item.get_closest_marker(mark)), default=0.1)
        files[item.path] = files.get(item.path, 0.0) + seconds
    items.sort(key=lambda item: files[item.path], reverse=True)


_CODES = {500: "InternalError", 503: "SlowDown"}


@dataclass(frozen=True)
class Fault:
    """A request of this method is answered with the status; it is done all the same if `done`."""

    method: str
    status: int
    done: bool


class S3Server:
    """Moto's S3, one request at a time: its conditional put looks first and writes afterwards."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=MotoRequestHandler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.port}"

    def fail(self, method: str, status: int, *, times: int = 1, done: bool = False) -> None:
        """The next `times` requests of the method are answered with the status, but done all the same if `done`."""
        self.faults += [Fault(method, status, done)] * times

    def client(self, service: str) -> Any:
        """A boto3 client with every right."""
        import boto3

        return boto3.client(
            service,
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="owner",
            aws_secret_access_key="owner",
        )

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        with self._lock:
            method = environ["REQUEST_METHOD"]
            self.requests.append((method, environ["PATH_INFO"]))
            fault = next((fault for fault in self.faults if fault.method == method), None)
            if fault is None:
                return self._app(environ, start_response)
            self.faults.remove(fault)
            if fault.done:
                list(self._app(environ, lambda *_: None))
            else:
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(f"{fault.status} {_CODES[fault.status]}", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{_CODES[fault.status]}</Code><Message>told to fail</Message></Error>".encode()]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


_numbers = itertools.count()


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[str]:
    """The URL of a new bucket, which this process and those it starts have every right to."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "owner")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "owner")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    name = f"bucket-{next(_numbers)}"
    s3_server.client("s3").create_bucket(Bucket=name)
    s3_server.requests.clear()
    yield f"s3://{name}"
    assert not s3_server.faults, "a fault that no request met"
    s3_server.faults.clear()
