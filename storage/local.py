"""Keys as files of a folder: written beside their place, synced, then linked or renamed into it."""

from collections.abc import Callable, Iterator
from os import fstat
from pathlib import Path
from stat import S_ISDIR

from storage.files import file_failure, make_folder, write_whole
from storage.objects import Data, Found

UNFINISHED = "unfinished/"
"""Where files are written; what a killed writer left there is a key like any other, and is collected as garbage."""


class LocalObjects:
    """An ObjectStore in a folder, which is made when the first key is."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """See ObjectStore."""
        path = self.path / key
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(start)
                if stop is None:
                    return file.read()
                return _exactly(file.read, min(stop, fstat(file.fileno()).st_size) - start)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise file_failure("reading", path, error) from error

    def create(self, key: str, data: Data) -> bool:
        """See ObjectStore."""
        try:
            self._write(key, data, exclusive=True)
        except FileExistsError:
            return False
        return True

    def replace(self, key: str, data: Data) -> None:
        """See ObjectStore."""
        self._write(key, data, exclusive=False)

    def find(self, key: str) -> Found | None:
        """See ObjectStore."""
        path = self.path / key
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise file_failure("reading", path, error) from error
        if S_ISDIR(status.st_mode):
            return None
        return Found(key=key, size=status.st_size, modified=status.st_mtime)

    def list(self, prefix: str) -> Iterator[Found]:
        """See ObjectStore."""
        folder, _, start = prefix.rpartition("/")
        yield from self._below(folder, start)

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        path = self.path / key
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise file_failure("deleting", path, error) from error

    def _write(self, key: str, data: Data, *, exclusive: bool) -> None:
        path, beside = self.path / key, self.path / UNFINISHED
        make_folder(path.parent)
        make_folder(beside)
        write_whole(path, data, exclusive=exclusive, beside=beside)

    def _below(self, folder: str, start: str) -> Iterator[Found]:
        path = self.path / folder
        try:
            children = [(child.name, child.is_dir()) for child in path.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise file_failure("listing", path, error) from error
        # as keys sort: a folder's keys go on with a slash
        for name, is_folder in sorted(children, key=lambda child: child[0] + "/" * child[1]):
            key = f"{folder}/{name}" if folder else name
            if not name.startswith(start):
                continue
            if is_folder:
                yield from self._below(key, "")
            elif found := self.find(key):
                yield found


def _exactly(read: Callable[[int], bytes | None], size: int) -> bytes:
    """Up to `size` bytes: one read may return fewer than there are."""
    parts = []
    while size > 0 and (part := read(size)):
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
