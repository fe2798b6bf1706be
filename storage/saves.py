"""Saves behind the back of whoever trains: one at a time, in order, with one copy of a state in memory."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from storage.checkpoints import WORKERS
from storage.errors import FailureError
from storage.saving import save_state
from storage.store import Store
from storage.tensors import Array


class Saver:
    """Stores states in a thread. Training waits for `copy` alone, and for the save before where it is not done."""

    def __init__(self, store: Store) -> None:
        self.base: bytes | None = None
        """Root of a checkpoint whose frames need not be stored again: the last one saved, or loaded."""
        self._store = store
        self._copies: dict[str, Array] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._last: Future[bytes] | None = None

    def copy(self, state: Mapping[str, Sequence[Array]], shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Array]:
        """Copies of a state's tensors, each given as flat pieces in order, in memory that the next call uses again.

        Waits for the save before to end: its state is in that memory.
        """
        if self._last:
            self._last.exception()

        def copy(name: str) -> None:
            pieces, shape = state[name], shapes[name]
            known = self._copies.get(name)
            if known is None or (known.shape, known.dtype) != (shape, pieces[0].dtype):
                known = self._copies[name] = np.empty(shape, pieces[0].dtype)
            np.concatenate(pieces, out=known.reshape(-1))

        for name in self._copies.keys() - state.keys():
            del self._copies[name]
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(copy, state))
        return self._copies

    def save(self, copies: Mapping[str, Array], expected: bytes) -> "Future[bytes]":
        """The root, once the state that `copy` returned is in the store, or what went wrong.

        FailureError unless the root is `expected`.
        """
        self._last = self._thread.submit(self._save, copies, expected)
        return self._last

    def close(self) -> None:
        """Waits for the last save and ends the thread."""
        self._thread.shutdown()

    def _save(self, copies: Mapping[str, Array], expected: bytes) -> bytes:
        root = save_state(self._store, copies, base=self.base)
        if root != expected:
            raise FailureError(
                f"checkpoint: expected state root {expected.hex()}, got {root.hex()}; a worker's memory changed under "
                f"it: resume the run, on other hosts if it happens again"
            )
        self.base = root
        return root
