"""Tensors in files that others read and write: safetensors and torch.

What is written is whole or absent, replaces nothing, and depends on the state alone: the same state gives the same
bytes. What is read never runs: a pickle that asks for more than tensors is refused.
"""

import errno
import json
import math
import os
import re
import secrets
import shutil
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.checkpoints import Checkpoint
from storage.errors import FailureError, UsageError
from storage.files import TEMPORARY, file_failure, sync_folder
from storage.manifest import DTYPES
from storage.tensors import dtype_name

Array = NDArray[Any]

SAFETENSORS, TORCH = "safetensors", "torch"
METADATA_KEY = "__metadata__"
"""In a safetensors header, where no tensor can have the name."""

_SUFFIXES = {".safetensors": SAFETENSORS, ".pt": TORCH, ".pth": TORCH, ".bin": TORCH}
_CODES = {"f32": "F32", "i8": "I8", "i32": "I32", "i64": "I64", "bool": "BOOL"}
_READ_BYTES = 256 << 20  # of the state in memory at a time
_SAVE = "save its tensors with safetensors, or with torch.save(model.state_dict(), FILE)"


class Piece(NamedTuple):
    """A tensor of a file: `shape` is the one in the file, `source` its name in the state, where None stands for 0."""

    name: str
    source: str | None
    dtype: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return np.dtype(DTYPES[self.dtype]).itemsize

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.itemsize


# ------------------------------------------------------------------------------------------------- whole or absent


def check_target(out: Path) -> None:
    """UsageError unless nothing is at `out` and its folder is there."""
    if os.path.lexists(out):
        raise _taken(out)
    if not out.parent.is_dir():
        got = "a file" if out.parent.exists() else "nothing there"
        raise UsageError(f"{out}: expected a folder {out.parent}, got {got}; make it first, or choose another path")


def _taken(out: Path) -> UsageError:
    got = "a folder" if out.is_dir() else "a file"
    return UsageError(f"{out}: expected a path where nothing is, got {got}; remove it, or choose another path")


@contextmanager
def whole(out: Path, *, folder: bool) -> Iterator[Path]:
    """Where to make a file or folder, which is at `out`, durably, once this ends; nothing is left where it fails."""
    temporary = out.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
    try:
        if folder:
            temporary.mkdir()
        yield temporary
        if folder:
            sync_folder(temporary)
        _give_name(temporary, out, folder=folder)
        sync_folder(out.parent)
    except OSError as error:
        raise file_failure("writing", out, error) from error
    finally:
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _give_name(temporary: Path, out: Path, *, folder: bool) -> None:
    """What was made is at `out`; UsageError where something got there in the meantime."""
    try:
        if folder:
            temporary.rename(out)
        else:
            os.link(temporary, out)  # unlike a rename, refuses to replace
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise _taken(out) from error
        if folder:
            raise
        temporary.replace(out)  # a file system without links, such as FAT


@contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """A new file, on the disk once this ends."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------------------- writing


def _arrays(checkpoint: Checkpoint, pieces: Iterable[Piece]) -> Iterator[Array]:
    """The pieces' values in order, in C order; a batch of them is read, and every byte checked, at a time."""
    for batch in groups(pieces, _READ_BYTES):
        sources = {piece.source for piece in batch}
        found = checkpoint.load(sources.__contains__)
        for piece in batch:
            if piece.source is None:
                yield np.zeros(piece.shape, DTYPES[piece.dtype])
            else:
                array = found.pop(piece.source)
                yield np.ascontiguousarray(array.T) if piece.transposed else array


def groups(pieces: Iterable[Piece], limit: int) -> Iterator[list[Piece]]:
    """The pieces in order, cut before those that would make a group larger than `limit` bytes."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + piece.size > limit:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.size
    if group:
        yield group


def write_safetensors(
    file: BinaryIO, checkpoint: Checkpoint, pieces: Iterable[Piece], metadata: Mapping[str, str]
) -> None:
    """Write the format of https://huggingface.co/docs/safetensors, wide elements first, so that all are aligned.

    Not by the safetensors library: it orders the metadata anew each time, so that equal states would give different
    files, and takes all tensors at once.
    """
    ordered = sorted(pieces, key=lambda piece: -piece.itemsize)
    header: dict[str, Any] = {METADATA_KEY: dict(sorted(metadata.items()))}
    at = 0
    for piece in ordered:
        offsets = [at, at + piece.size]
        header[piece.name] = {"dtype": _CODES[piece.dtype], "shape": piece.shape, "data_offsets": offsets}
        at += piece.size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for array in _arrays(checkpoint, ordered):
        file.write(array.reshape(-1).view(np.uint8).data)


def write_torch(file: BinaryIO, out: Path, checkpoint: Checkpoint, pieces: Sequence[Piece]) -> None:
    """Write a dictionary of tensors with torch.save, for torch.load(weights_only=True)."""
    import torch

    arrays = _arrays(checkpoint, pieces)
    tensors = {piece.name: torch.from_numpy(array) for piece, array in zip(pieces, arrays, strict=True)}
    try:
        torch.save(tensors, file)
    except RuntimeError as error:  # torch closes its archive after a failed write, and says only what that ran into
        if isinstance(error.__context__, OSError):
            raise file_failure("writing", out, error.__context__) from error
        raise FailureError(f"writing {out}: {error}; check that disk, then run the command again") from error


# ---------------------------------------------------------------------------------------------------------- reading


def guess_form(path: Path) -> str:
    """The form that a file's suffix says it has; UsageError where it says none."""
    if path.suffix not in _SUFFIXES:
        raise UsageError(
            f"{path}: expected a name that ends in {', '.join(_SUFFIXES)}, got {path.suffix or 'no suffix'!r}; "
            f"say --format {SAFETENSORS} or --format {TORCH}"
        )
    return _SUFFIXES[path.suffix]


def load_file(path: Path, form: str) -> dict[str, Array]:
    """The file's arrays by name, of dtypes that a store has a name for. Nothing in the file is run.

    UsageError: no such file, not of that form, or something else than such arrays in it.
    """
    if form not in (SAFETENSORS, TORCH):
        raise UsageError(f"{path}: expected a file in the format {SAFETENSORS} or {TORCH}, got {form!r}; choose one")
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise UsageError(f"{path}: expected a readable file, got {error.strerror}; check the path") from error
    return _load_safetensors(path) if form == SAFETENSORS else _load_torch(path)


def _load_safetensors(path: Path) -> dict[str, Array]:
    from safetensors import SafetensorError, safe_open

    codes = {code: name for name, code in _CODES.items()}
    found: dict[str, Array] = {}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                code = file.get_slice(name).get_dtype()
                if code not in codes:
                    raise _unnamed(path, name, code)
                found[name] = file.get_tensor(name)
    except SafetensorError as error:
        raise UsageError(
            f"{path}: expected a safetensors file, got {error}; fetch it again, or say --format {TORCH}"
        ) from error
    return found


def _load_torch(path: Path) -> dict[str, Array]:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles' versions and TorchScript: what matters is refused below
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle can raise anything
        raise UsageError(
            f"{path}: expected a dictionary of tensors by torch.save, got {_refused(error)}; {_SAVE}"
        ) from error
    if not isinstance(loaded, dict):
        raise UsageError(f"{path}: expected a dictionary of tensors, got {type(loaded).__name__}; {_SAVE}")
    return {_name(path, name): _array(path, name, value) for name, value in loaded.items()}


def _refused(error: Exception) -> str:
    """What torch.load found, without its advice to run the pickle."""
    asked = re.search(r"GLOBAL ([\w.]+)", str(error))
    if asked or type(error).__name__ == "UnpicklingError":
        return f"a pickle that asks for {asked[1] if asked else 'more than tensors'}, which was not run"
    said = " ".join(str(error).partition("In PyTorch")[0].split())
    return f"something else ({type(error).__name__}: {said[:200]})"


def _name(path: Path, name: object) -> str:
    if not isinstance(name, str):
        raise UsageError(f"{path}: expected tensors by name, got the key {name!r}; {_SAVE}")
    return name


def _array(path: Path, name: str, value: object) -> Array:
    """The values of a dense tensor."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise UsageError(
            f"{path}: expected {name!r} to be a tensor, got {type(value).__name__}; save a dictionary of tensors "
            "alone, such as model.state_dict()"
        )
    tensor = value.detach()
    if tensor.is_nested or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        got = f"one with layout {tensor.layout} on {tensor.device}"
        raise UsageError(f"{path}: expected {name!r} to be a dense tensor with values, got {got}; convert it first")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UsageError(
            f"{path}: expected {name!r} to have a value for each element, got one that repeats them (expand); "
            "call .contiguous() on it before saving"
        )
    dtype = str(tensor.dtype).removeprefix("torch.")
    try:
        array: Array = tensor.resolve_neg().contiguous().numpy()
        dtype_name(array)
    except (TypeError, ValueError) as error:
        raise _unnamed(path, name, dtype) from error
    return array


def _unnamed(path: Path, name: str, dtype: str) -> UsageError:
    return UsageError(
        f"{path}: expected {name!r} as {', '.join(_CODES)}, got {dtype}; convert it first, real numbers to float32"
    )
