"""Local files that are either whole or absent, whatever ends the process or the disk."""

import errno
import os
import secrets
from pathlib import Path

from storage.errors import FailureError

TEMPORARY = ".tmp-"
"""Prefix of files being written; a killed process leaves one behind, and nothing ever reads it."""

DIRECT_BYTES = 1 << 20
"""So much is written past the page cache: a checkpoint would be copied there, and push out what training reads."""
_BLOCK_BYTES = 4096

_REMEDIES = {
    errno.ENOSPC: "free space on that disk, then run the command again",
    errno.EDQUOT: "free space below your quota, then run the command again",
    errno.EACCES: "give this user access to that folder, or choose another",
    errno.EEXIST: "a file is in the place of a folder: choose another path",
    errno.EROFS: "choose a folder on a file system that can be written",
}


def write_whole(
    path: Path,
    data: bytes | bytearray | memoryview,
    *,
    mode: int = 0o666,
    exclusive: bool = False,
    beside: Path | None = None,
) -> None:
    """`path` holds `data` durably when this returns, and what it held before when this raises.

    Temporary file in the same folder, or in `beside` on the same disk, fsync, rename, fsync of the folder. Raises
    FailureError naming the path where the operating system refuses (disk full, no access); with `exclusive`,
    FileExistsError where `path` exists.
    """
    temporary = (beside or path.parent) / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
    try:
        try:
            _write_synced(temporary, data, mode)
            if exclusive:
                os.link(temporary, path)  # unlike a rename, refuses to replace
            else:
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise file_failure("writing", path, error) from error


def make_folder(path: Path) -> None:
    """The folder exists durably, its parents too; FailureError where it cannot be made."""
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise file_failure("making the folder", path, error) from error


def sync_folder(path: Path) -> None:
    """Names made or replaced in the folder survive a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def file_failure(doing: str, path: Path, error: OSError) -> FailureError:
    """A FailureError that says what failed where, the system's reason, and the remedy last."""
    remedy = _REMEDIES.get(error.errno or 0, "check that disk, then run the command again")
    return FailureError(f"{doing} {path}: {error.strerror or error}; {remedy}")


def _write_synced(path: Path, data: bytes | bytearray | memoryview, mode: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        rest = memoryview(data)
        if len(rest) >= DIRECT_BYTES:
            rest = rest[os.lseek(file, _write_direct(path, rest), os.SEEK_SET) :]
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    finally:
        os.close(file)


def _write_direct(path: Path, data: memoryview) -> int:
    """How many bytes have been written past the page cache: whole blocks, none where system or memory do not allow it.

    Linux takes blocks at addresses that are multiples of the block alone, and some file systems none at all.
    """
    done, stop = 0, len(data) - len(data) % _BLOCK_BYTES
    try:
        file = os.open(path, os.O_WRONLY | getattr(os, "O_DIRECT", 0))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return 0
        raise
    try:
        while done < stop:
            written = os.write(file, data[done:stop])
            done += written - written % _BLOCK_BYTES
            if written % _BLOCK_BYTES:
                break
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(file)
    return done
