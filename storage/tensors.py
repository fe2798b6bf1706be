"""A tensor's bytes: its elements in C order, little-endian, every NaN written as 0x7fc00000."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage import merkle
from storage.manifest import DTYPES
from storage.records import TensorEntry

Array = NDArray[Any]

_NAMES = {np.dtype(form): name for name, form in DTYPES.items()}


def dtype_name(array: Array) -> str:
    """The name under which records know the array's dtype: a key of `DTYPES`; ValueError for any other dtype."""
    name = _NAMES.get(array.dtype.newbyteorder("<"))
    if name is None:
        raise ValueError(f"array: expected a dtype of {', '.join(DTYPES)}, got {array.dtype}; convert it first")
    return name


def canonical(array: Array) -> Array:
    """The array as its bytes are hashed: C-contiguous, little-endian, NaN as 0x7fc00000; -0 stays -0.

    Shares memory with the argument where nothing had to change.
    """
    ready = np.asarray(array, dtype=DTYPES[dtype_name(array)], order="C")
    return _without_nans(ready.reshape(-1)).reshape(ready.shape) if ready.dtype.kind == "f" else ready


def _without_nans(flat: Array) -> Array:
    if not flat.size or not np.isnan(flat.min()):  # which is NaN where any element is
        return flat
    return np.where(np.isnan(flat), np.uint32(0x7FC00000), flat.view("<u4")).astype("<u4", copy=False).view("<f4")


def entry_for(name: str, array: Array) -> TensorEntry:
    """The entry that commits to the array's name, dtype, shape and bytes."""
    ready = canonical(array)
    return TensorEntry(name=name, dtype=dtype_name(ready), shape=ready.shape, root=merkle.bytes_root(ready.data))
