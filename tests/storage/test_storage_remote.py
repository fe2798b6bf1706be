"""Remote media: retries until a deadline, lost answers, racing processes, what is refused and how it is said."""

import errno
import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from fsspec.implementations.memory import MemoryFileSystem
from s3fs.errors import translate_boto_error

from storage.errors import FailureError, UsageError
from storage.objects import Found, ObjectStore
from storage.remote import DEADLINE, FsspecObjects, open_remote
from storage.store import MARKER, Store, open_store


class Clock:
    """Time that passes by waiting, and by `costs` seconds a look."""

    def __init__(self, costs: float = 0.0) -> None:
        self.now, self.costs = 0.0, costs
        self.waits: list[float] = []

    def __call__(self) -> float:
        self.now += self.costs
        return self.now

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


class Flaky:
    """A filesystem like s3fs whose next requests raise `faults`, None for one that does not; `after` they are done."""

    protocol = ("s3", "s3a")

    def __init__(self, *faults: Exception | None, after: bool = False, overwrites: bool = False) -> None:
        self.files = MemoryFileSystem(global_store=False, skip_instance_cache=True)
        self.faults, self.after, self.overwrites = list(faults), after, overwrites
        self.requests: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._request, name)

    def invalidate_cache(self) -> None:
        return

    def _request(self, name: str, *args: Any, **options: Any) -> Any:
        self.requests.append(name)
        fault = self.faults.pop(0) if self.faults else None
        if fault and not self.after:
            raise fault
        if self.overwrites:
            options.pop("mode", None)
        answer = getattr(self.files, name)(*args, **options)
        if fault:
            raise fault
        return answer


def over(files: Flaky, clock: Clock | None = None, deadline: float = DEADLINE) -> FsspecObjects:
    clock = clock or Clock()
    objects = FsspecObjects(files, "/bucket/x", "s3://bucket/x", deadline=deadline, clock=clock, wait=clock.wait)
    objects._exclusive = True  # most tests are not about the look whether it is
    return objects


def aws(code: str, status: int) -> Exception:
    """What s3fs raises for an answer of S3."""
    answer = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(answer, "PutObject"))


PASSING: dict[str, Exception] = {
    "timeout": TimeoutError(),
    "reset": ConnectionResetError(),
    "errno": OSError(errno.ENETUNREACH, "network unreachable"),
    "slow-down": aws("SlowDown", 503),
    "internal": aws("InternalError", 500),
    "request-timeout": aws("RequestTimeout", 400),
    "conflict": aws("ConditionalRequestConflict", 409),
    "new-5xx": aws("SomethingNew", 502),
    "no-endpoint": EndpointConnectionError(endpoint_url="https://s3"),
    "disconnected": aiohttp.ServerDisconnectedError(),
    "cut": aiohttp.ClientPayloadError(),
}
LASTING: dict[str, Exception] = {
    "argument": aws("InvalidArgument", 400),
    "value": ValueError("no"),
    "errno": OSError(errno.EINVAL, "no"),
}
DENIED: dict[str, Exception] = {
    "head": PermissionError("Forbidden"),
    "denied": aws("AccessDenied", 403),
    "expired": aws("ExpiredToken", 400),
    "gcs": OSError("Forbidden: b/x"),
}

REQUESTS: dict[str, Callable[[ObjectStore], Any]] = {
    "read": lambda objects: objects.read("a"),
    "part": lambda objects: objects.read("a", 1, 2),
    "find": lambda objects: objects.find("a"),
    "list": lambda objects: list(objects.list("")),
    "create": lambda objects: objects.create("b", b"new"),
    "replace": lambda objects: objects.replace("a", b"new"),
}


# --------------------------------------------------------------------------------------------------------- retries


@pytest.mark.parametrize("error", PASSING)
@pytest.mark.parametrize("name", REQUESTS)
def test_passing_errors_are_tried_again(error: str, name: str) -> None:
    files, clock = Flaky(), Clock()
    objects = over(files, clock)
    objects.create("a", b"old")
    found = objects.find("a")
    files.faults = [PASSING[error]] * 4
    expected = {"read": b"old", "part": b"l", "find": found, "list": [found], "create": True, "replace": None}
    assert REQUESTS[name](objects) == expected[name]
    assert not files.faults
    assert len(clock.waits) == 4
    for number, seconds in enumerate(clock.waits):
        assert 0.1 * 2**number <= seconds <= 0.2 * 2**number


@pytest.mark.parametrize("name", REQUESTS)
def test_gives_up_at_the_deadline(name: str) -> None:
    files, clock = Flaky(*[aws("SlowDown", 503)] * 999), Clock()
    pattern = (
        r"(reading|listing|creating|writing) (a|b|all keys) in s3://bucket/x: gave up after \d+ tries in 1[012]\d s: "
    )
    with pytest.raises(FailureError, match=pattern + r"OSError: .*SlowDown; check the network") as caught:
        REQUESTS[name](over(files, clock))
    assert 105 <= clock.now <= 120
    assert max(clock.waits) <= 10
    assert str(len(files.requests)) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_server_that_never_answered_is_given_up_soon() -> None:
    silence = [ConnectionRefusedError()] * 999
    clock = Clock()
    with pytest.raises(FailureError, match="check the network"):
        over(Flaky(*silence), clock).read("a")
    assert 10 <= clock.now <= 20
    files, clock = Flaky(), Clock()
    objects = over(files, clock)
    assert objects.read("a") is None
    files.faults = silence
    with pytest.raises(FailureError, match="check the network"):
        objects.read("a")
    assert clock.now >= 105


def test_slow_requests_have_three_tries() -> None:
    files = Flaky(*[TimeoutError()] * 3)
    with pytest.raises(FailureError, match="gave up after 3 tries"):
        over(files, Clock(costs=1000.0)).read("a")
    files = Flaky(*[TimeoutError()] * 2)
    over(files, Clock(costs=1000.0)).replace("a", b"new")


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        (LASTING, "check the URL and that service"),
        (
            DENIED,
            r"access denied \(.*\); check AWS_PROFILE or AWS_ACCESS_KEY_ID, or give these credentials the right to",
        ),
    ],
    ids=["lasting", "denied"],
)
@pytest.mark.parametrize("name", REQUESTS)
def test_lasting_errors_are_not_tried_again(errors: dict[str, Exception], said: str, name: str) -> None:
    for error in errors.values():
        files, clock = Flaky(error), Clock()
        with pytest.raises(FailureError, match=said):
            REQUESTS[name](over(files, clock))
        assert len(files.requests) == 1
        assert not clock.waits


def test_delete_is_tried_once() -> None:
    files = Flaky(TimeoutError())
    with pytest.raises(FailureError, match="deleting a in s3://bucket/x: TimeoutError; check the network"):
        over(files).delete("a")
    assert files.requests == ["rm_file"]
    over(files).delete("a")


# -------------------------------------------------------------------------------------------------- exclusive creation


def test_create_knows_its_own_after_a_lost_answer() -> None:
    files = Flaky(TimeoutError(), after=True)
    objects = over(files)
    assert objects.create("a", b"mine")
    assert files.requests == ["pipe_file", "pipe_file", "cat_file"]
    assert not objects.create("a", b"mine"), "an answer that was not lost is believed"


def test_create_knows_another_s_after_a_lost_request() -> None:
    files = Flaky(None, TimeoutError())
    objects = over(files)
    objects.create("a", b"theirs")
    assert not objects.create("a", b"mine")
    assert objects.read("a") == b"theirs"


def test_lost_answers_lose_no_swap() -> None:
    files = Flaky()
    store = Store(over(files))
    for number in range(9):
        old = str(number - 1).encode() if number else None
        files.faults, files.after = [None, TimeoutError()] if number else [None, None], True
        store.swap("head", old, str(number).encode())
        assert store.read("head") == str(number).encode()


def test_condition_that_a_server_does_not_name_is_met() -> None:
    assert over(Flaky(aws("PreconditionFailed", 412))).create("a", b"") is False


def test_server_that_overwrites_is_refused_at_the_first_create() -> None:
    objects = FsspecObjects(Flaky(overwrites=True), "/bucket", "s3://bucket")
    with pytest.raises(UsageError, match="s3://bucket overwrites a key that it was told to create"):
        objects.create("leases/1", b"mine")
    assert objects.read("leases/1") == b"mine"


def test_server_is_looked_at_once() -> None:
    files = Flaky()
    objects = FsspecObjects(files, "/bucket", "s3://bucket")
    assert objects.create("a", b"")
    assert objects.create("b", b"")
    assert files.requests == ["pipe_file"] * 3


# ---------------------------------------------------------------------------------------------------------------- S3

ORDINARY: dict[str, Any] = {"key": "a/b", "data": b"mine"}


def test_s3_is_asked_once_a_try(bucket: str, s3_server: Any) -> None:
    clock = Clock()
    objects = open_remote(bucket + "/x", clock=clock, wait=clock.wait)
    objects.create("first", b"")
    s3_server.requests.clear()
    for method, status in (("PUT", 503), ("PUT", 500), ("GET", 503), ("GET", 500)):
        s3_server.fail(method, status)
    assert objects.create(**ORDINARY)
    assert objects.read("a/b") == b"mine"
    assert [method for method, _ in s3_server.requests] == ["PUT"] * 3 + ["GET"] * 3
    assert len(clock.waits) == 4


def test_s3_answers_that_are_lost(bucket: str, s3_server: Any) -> None:
    clock = Clock()
    objects = open_remote(bucket + "/x", clock=clock, wait=clock.wait)
    s3_server.fail("PUT", 500, done=True)
    assert objects.create(**ORDINARY)
    assert not objects.create(**ORDINARY)
    store = Store(objects)
    s3_server.fail("PUT", 500, done=True)
    store.swap("head", None, b"1")
    assert store.read("head") == b"1"


def test_s3_gives_up(bucket: str, s3_server: Any) -> None:
    clock = Clock()
    objects = open_remote(bucket, deadline=1.0, clock=clock, wait=clock.wait)
    s3_server.fail("GET", 503, times=9)
    with pytest.raises(FailureError, match=rf"reading a in {bucket}: gave up after \d tries in [01] s: .*told to fail"):
        objects.read("a")
    s3_server.faults.clear()


WRITER = """
import sys
from storage.errors import Conflict
from storage.store import open_store
store, name = open_store(sys.argv[1], create=True), sys.argv[2]
with store.writing("race"):
    for number in range(8):
        digest = store.put(f"segment {number} of {name}".encode())
        while True:
            old = store.read("runs/r")
            try:
                store.swap("runs/r", old, (old or b"") + digest)
                break
            except Conflict:
                continue
"""


@pytest.mark.parametrize("where", ["s3", "local"])
def test_racing_processes_lose_no_segment(where: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    url = request.getfixturevalue("bucket") + "/store" if where == "s3" else str(tmp_path / "store")
    root = Path(__file__).parents[2]
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, url, str(number)], cwd=root) for number in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    store = open_store(url, create=False)
    told = store.read("runs/r") or b""
    segments = [store.get(told[at : at + 32]).decode() for at in range(0, len(told), 32)]
    for name in range(2):
        mine = [segment for segment in segments if segment.endswith(f"of {name}")]
        assert mine == [f"segment {number} of {name}" for number in range(8)]
    assert list(store.objects.list("leases/")) == []


def test_eight_threads(bucket: str) -> None:
    store = open_store(bucket, create=True)
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(lambda number: store.put(b"%d" % (number % 8)), range(32)))
        assert list(pool.map(store.get, digests)) == [b"%d" % (number % 8) for number in range(32)]
    assert len(list(store.digests())) == 8


def test_large_objects_are_created_once(bucket: str) -> None:
    objects = open_remote(bucket)
    data = bytes(range(256)) * (101 * 4096)  # over what s3fs uploads in one request
    assert objects.create("packs/a", data)
    assert not objects.create("packs/a", data)
    assert objects.read("packs/a", len(data) - 5) == data[-5:]
    objects.replace("packs/a", b"")
    assert objects.read("packs/a") == b""


def test_keys_beside_the_store_are_not_in_it(bucket: str, s3_server: Any) -> None:
    client = s3_server.client("s3")
    for key in ("store-2/a", "stor", "store/", "store/folder/", "store.txt"):
        client.put_object(Bucket=bucket[5:], Key=key, Body=b"")
    objects = open_remote(bucket + "/store/")
    assert list(objects.list("")) == []
    assert objects.find("folder") is None
    objects.create("folder/a", b"")
    assert [found.key for found in objects.list("")] == ["folder/a"]
    assert str(objects) == bucket + "/store"
    with pytest.raises(UsageError, match=f"{bucket} is not a store: expected a file '{MARKER}'"):
        open_store(bucket, create=True)


def test_times_are_those_of_the_server(bucket: str, s3_server: Any) -> None:
    objects = open_remote(bucket)
    objects.create("a", b"1")
    told = s3_server.client("s3").head_object(Bucket=bucket[5:], Key="a")["LastModified"].timestamp()
    assert objects.find("a") == next(objects.list("")) == Found(key="a", size=1, modified=told)


def test_lists_and_look_ups_agree_on_the_time() -> None:
    """S3 lists milliseconds; a look-up tells seconds."""
    files, told = Flaky(), datetime(2026, 1, 1, 12, 0, 0, 999_000, tzinfo=UTC)
    answer = {"name": "/bucket/x/a", "size": 1, "type": "file"}
    files.files.info = lambda path: answer | {"LastModified": told.replace(microsecond=0)}
    files.files.find = lambda path, **_: {"/bucket/x/a": answer | {"LastModified": told}}
    assert over(files).find("a") == next(over(files).list("")) == Found(key="a", size=1, modified=1767268800.0)


def test_endpoint_of_s3_alone(bucket: str, s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server.url)
    assert open_remote(bucket).create("a", b"")


# --------------------------------------------------------------------------------------------- what S3 refuses at start

READER = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": ["s3:Get*", "s3:List*"], "Resource": "*"}],
}


@pytest.fixture
def reader(bucket: str, s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a store with an object b"data", on a server that checks who asks; the environment has a reader's."""
    import moto.settings

    open_store(bucket, create=True).put(b"data")
    iam, name = s3_server.client("iam"), bucket[5:]
    iam.create_user(UserName=name)
    iam.put_user_policy(UserName=name, PolicyName="read", PolicyDocument=json.dumps(READER))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    with monkeypatch.context() as patch:
        patch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
        yield bucket


def test_read_only_bucket_is_said_when_writing_begins(reader: str) -> None:
    store = open_store(reader, create=False)
    assert [store.get(digest) for digest in store.digests()] == [b"data"]
    expected = (
        rf"creating leases/\w+ in {reader}: access denied \(PermissionError: Access Denied\); check AWS_PROFILE or "
        r"AWS_ACCESS_KEY_ID, or give these credentials the right to write \(on S3: s3:PutObject\)"
    )
    with pytest.raises(FailureError, match=expected), store.writing("a test"):
        pytest.fail("nothing is done")
    with pytest.raises(FailureError, match=r"deleting a .*the right to delete \(on S3: s3:DeleteObject\)"):
        store.objects.delete("a")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"AWS_ACCESS_KEY_ID": "AKIAWRONG"}, "The AWS Access Key Id you provided does not exist in our records"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "The request signature we calculated does not match"),
        (
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
            "NoCredentialsError: Unable to locate credentials",
        ),
        ({"AWS_PROFILE": "nobody"}, r"ProfileNotFound: The config profile \(nobody\) could not be found"),
    ],
)
def test_wrong_credentials_are_said_at_start(
    reader: str, monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None], said: str
) -> None:
    for name, value in change.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    expected = rf"reading {MARKER} in {reader}: access denied \(.*{said}.*\); check AWS_PROFILE or AWS_ACCESS_KEY_ID"
    with pytest.raises(FailureError, match=expected):
        open_store(reader, create=False)


@pytest.mark.parametrize("name", REQUESTS)
def test_missing_bucket(bucket: str, name: str) -> None:
    with pytest.raises(FailureError, match=r"in s3://no-such-bucket/x: .*does not exist; make that bucket, or check"):
        REQUESTS[name](open_remote("s3://no-such-bucket/x"))
    with pytest.raises(FailureError, match="make that bucket"):
        open_store("s3://no-such-bucket", create=True)


def test_bucket_that_only_a_write_finds_missing() -> None:
    with pytest.raises(FailureError, match=r"creating a in s3://bucket/x: no such bucket .*; make that bucket"):
        over(Flaky(FileNotFoundError("b/o"))).create("a", b"")


# ------------------------------------------------------------------------------------------------------- other places


def test_urls_that_are_none(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"store xyz://a: Protocol not known: xyz; choose a folder or a URL"):
        open_store("xyz://a", create=True)
    with pytest.raises(UsageError, match="expected a bucket; name it as in s3://bucket/path"):
        open_store("s3://", create=True)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UsageError, match=r"store gs://a: .*; run pip install 'trueweight\[gcs\]'"):
        open_store("gs://a", create=True)
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(UsageError, match=r"store az://a: Install adlfs .*; install that package"):
        open_store("az://a", create=True)
    with pytest.raises(FailureError, match=r"opening ftp://127.0.0.1:9/a: ConnectionRefusedError"):
        open_store("ftp://127.0.0.1:9/a", create=True)


def test_memory_of_this_process() -> None:
    digest = open_store("memory://test_memory_of_this_process/a", create=True).put(b"data")
    assert open_store("memory://test_memory_of_this_process/a", create=False).get(digest) == b"data"
    with pytest.raises(UsageError, match="no store at memory://test_memory_of_this_process/b"):
        open_store("memory://test_memory_of_this_process/b", create=False)


def test_threads_that_create_one_key_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its filesystem looks first and writes afterwards, so between them nobody else may look."""
    barrier, exists = threading.Barrier(2), MemoryFileSystem.exists

    def look(files: MemoryFileSystem, path: str) -> bool:
        there = exists(files, path)
        with suppress(threading.BrokenBarrierError):
            barrier.wait(0.2)
        return there

    monkeypatch.setattr(MemoryFileSystem, "exists", look)
    stores = [open_remote("memory://test_threads_that_create_one_key_in_memory") for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(lambda objects: objects.create("a", b""), stores)) == [False, True]


class Page(http.server.SimpleHTTPRequestHandler):
    """A folder with index pages; `failing` requests are answered 500, and parts of files are sent if `parts`."""

    failing, parts = 0, False

    def log_message(self, *_args: object) -> None:
        return

    def end_headers(self) -> None:
        self.close_connection = True
        super().end_headers()

    def do_HEAD(self) -> None:
        if not self._failed():
            super().do_HEAD()

    def do_GET(self) -> None:
        if self._failed():
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not (self.parts and asked and path.is_file()):
            super().do_GET()
            return
        start, stop = int(asked[1]), int(asked[2] or 10**9) + 1
        body = path.read_bytes()[start:stop]
        self.send_response(206 if body else 416)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _failed(self) -> bool:
        if type(self).failing:
            type(self).failing -= 1
            self.send_error(500)
            return True
        return False


@pytest.fixture(params=[False, True], ids=["whole", "parts"])
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Store, str, type[Page]]]:
    """(a store in a folder, the URL under which it is served, the server's handler)."""
    store = open_store(str(tmp_path / "my store"), create=True)
    handler = type("Handler", (Page,), {"parts": request.param})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield store, f"http://127.0.0.1:{server.server_port}/my%20store", handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_web_page_is_a_store_to_read(page: tuple[Store, str, type[Page]]) -> None:
    store, url, _ = page
    digests = [store.put(data) for data in (b"", b"hello", bytes(100_000))]
    for value in (b"1", b"2"):
        store.swap("runs/a", store.read("runs/a"), value)
    store.swap("head", None, b"3")
    store.objects.create("odd/100%25-a_b.c", b"odd")
    web = open_store(url, create=False)
    assert [web.get(digest) for digest in digests] == [store.get(digest) for digest in digests]
    assert list(web.digests()) == sorted(digests)
    assert web.names("") == ["head", "runs/a"]
    assert web.read("runs/a") == b"2"
    assert web.objects.read("odd/100%25-a_b.c") == b"odd"
    for key in ("odd/a/b", "odd/a.b", "odd/B"):
        store.objects.create(key, b"")
    for prefix in ("odd/", "odd/1", "odd/2", "nothing/"):
        assert [found.key for found in web.objects.list(prefix)] == [found.key for found in store.objects.list(prefix)]
    assert web.objects.find("nothing") is None
    assert web.objects.read("nothing") is None


def test_parts_of_a_web_page(page: tuple[Store, str, type[Page]]) -> None:
    store, url, _ = page
    store.objects.create("packs/a", bytes(range(100)))
    web = open_remote(url)
    for start, stop in ((0, 100), (0, 1), (0, 0), (99, 100), (5, 60), (50, 150), (100, 120), (150, None), (7, None)):
        assert web.read("packs/a", start, stop) == bytes(range(100))[start:stop], (start, stop)
    assert web.read("packs/b", 1, 2) is None


def test_web_page_cannot_be_written(page: tuple[Store, str, type[Page]]) -> None:
    _, url, _ = page
    web = open_store(url, create=False)
    acts: list[Callable[[], object]] = [
        lambda: web.put(b"new"),
        lambda: web.swap("head", None, b"1"),
        lambda: web.writing("a test").__enter__(),
        lambda: web.objects.replace("a", b""),
        lambda: web.objects.delete("a"),
        lambda: open_store(url + "/empty", create=True),
    ]
    for act in acts:
        with pytest.raises(UsageError, match=r"can be read, not written: fsspec's 'http' cannot create .*; write to a"):
            act()


def test_web_page_that_fails_is_not_an_empty_one(page: tuple[Store, str, type[Page]]) -> None:
    store, url, handler = page
    store.objects.create("a", b"1")
    for act, expected in ((lambda web: web.find("a").size, 1), (lambda web: web.read("a"), b"1")):
        handler.failing = 5
        clock = Clock()
        assert act(open_remote(url, clock=clock, wait=clock.wait)) == expected
        assert clock.waits
        handler.failing = 999
        with pytest.raises(FailureError, match="gave up after"):
            act(open_remote(url, clock=clock, wait=clock.wait))
        handler.failing = 0


def test_folder_through_fsspec_is_read_only(tmp_path: Path) -> None:
    open_store(str(tmp_path), create=True).put(b"data")
    store = open_store(f"local://{tmp_path}", create=False)
    assert [store.get(digest) for digest in store.digests()] == [b"data"]
    with pytest.raises(UsageError, match="can be read, not written: fsspec's 'file'"):
        store.put(b"new")
