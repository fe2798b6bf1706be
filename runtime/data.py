"""Data: prepared once into Arrow shards in a store, then read as batches that are pure functions of (root, seed, step).

The data root is the digest of the DatasetRecord, which names the shards, the tokeniser and the version of the order.
Order `windows-1`, with n training tokens and a context of c: an epoch has W = n // c - 1 windows of c + 1 tokens, c
apart, from a start of `word % c`; images are W windows of one image. Step t (from 0) with a batch of b takes samples
t b to t b + b - 1, and sample i is window p[i % W] of epoch i // W, where p is the stable argsort of W random words.
The words are Philox's with purpose 2 and the epoch as the step: operator 0 for p, operator 1 for the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from runtime import corpora, memory, philox, tokenisers
from runtime.recipe import DataConfig
from storage.codec import U32, U64, Link, decode, encode, record
from storage.errors import IntegrityError, UsageError
from storage.manifest import state_root
from storage.store import Store
from storage.tensors import entry_for

ORDER = "windows-1"
SHARD_ITEMS = 1 << 22  # tokens or images in a shard
SPLIT_SEED = 0  # images are cut into training and validation by one fixed permutation, whatever the recipe's seed

Batch = tuple[NDArray[Any], NDArray[np.int64]]
Progress = Callable[[str, float], None]


@record(kind=64)
class Shard:
    """One Arrow IPC stream in the store: `count` tokens (column token) or images (columns pixels, label)."""

    object: Link
    count: U64


@record(kind=65)
class DatasetRecord:
    """A prepared dataset; its digest is the data root.

    `vocab` is the number of tokens or of classes, `shape` that of one input, `peak` the pixel value that stands for 1.0
    (0 for text).
    """

    kind: str
    vocab: U32
    shape: tuple[U64, ...]
    peak: U32
    tokeniser: Link | None
    order: str
    training: tuple[Shard, ...]
    validation: tuple[Shard, ...]


def silent(_what: str, _share: float) -> None:
    """Progress that nobody watches."""


def prepare(config: DataConfig, store: Store, *, folder: Path = Path(), progress: Progress = silent) -> bytes:
    """The data root, 32 bytes: shards, tokeniser and record are in the store. The same for the same source anywhere.

    Relative paths start at `folder`, the recipe's. `progress` is told what is being done and the share that is done.
    Raises UsageError where the source is missing, malformed or too small; FailureError where reading or storing fails.
    """
    made = prepare_images(config, store) if config.images else prepare_text(config, store, folder, progress)
    progress("data prepared", 1.0)
    return store.put(encode(made))


def prepare_text(config: DataConfig, store: Store, folder: Path, progress: Progress) -> DatasetRecord:
    """The record of a text: the last share is for validation, the rest trains the model and, if need be, the BPE."""
    progress("reading text", 0.0)
    text = corpora.read_text(config, folder)
    kept = training_part(text, config)
    progress("tokenising", 0.2)
    tokeniser = make_tokeniser(config, kept, folder)
    training, validation = tokeniser.encode(kept), tokeniser.encode(text[len(kept) :])
    check_length("training", len(training), 2 * config.context, config)
    if config.validation:
        check_length("validation", len(validation), config.context + 1, config)
    progress("writing shards", 0.8)
    width = pa.uint16() if tokeniser.vocab <= 1 << 16 else pa.int32()
    return DatasetRecord(
        kind="tokens",
        vocab=tokeniser.vocab,
        shape=(config.context,),
        peak=0,
        tokeniser=store.put(tokeniser.to_bytes()),
        order=ORDER,
        training=write_shards(store, {"token": pa.array(training, type=width)}),
        validation=write_shards(store, {"token": pa.array(validation, type=width)}),
    )


def training_part(text: str, config: DataConfig) -> str:
    """The text without its held-out end."""
    return text[: len(text) - int(len(text) * config.validation)]


def make_tokeniser(config: DataConfig, text: str, folder: Path) -> tokenisers.Tokeniser:
    """The tokeniser that the recipe names, trained on `text` where it names no file."""
    if config.tokeniser == "bytes":
        return tokenisers.ByteTokeniser()
    if not config.tokeniser_file:
        return tokenisers.train_bpe(text, config.vocab)
    tokeniser = tokenisers.load_tokeniser(folder / config.tokeniser_file)
    if tokeniser.vocab != config.vocab:
        raise UsageError(
            f"[data] tokeniser_file {config.tokeniser_file!r}: expected {config.vocab} tokens (vocab), "
            f"got {tokeniser.vocab}; set vocab = {tokeniser.vocab}"
        )
    return tokeniser


def check_length(part: str, found: int, needed: int, config: DataConfig) -> None:
    """UsageError unless the part has the tokens that its shortest use takes."""
    if found < needed:
        raise UsageError(
            f"[data] context = {config.context}: expected at least {needed} {part} tokens, got {found}; "
            "lower context, change validation or use more text"
        )


def prepare_images(config: DataConfig, store: Store) -> DatasetRecord:
    """The record of labelled images, the validation share drawn by a fixed permutation."""
    images = corpora.digits()
    order = permutation(SPLIT_SEED, 0, len(images.labels))
    held = int(len(order) * config.validation)

    def shards(chosen: NDArray[np.int64]) -> tuple[Shard, ...]:
        flat = pa.array(images.pixels[chosen].reshape(-1))
        size = images.pixels[0].size
        pixels = pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(pa.field("item", pa.uint8(), False), size))
        return write_shards(store, {"pixels": pixels, "label": pa.array(images.labels[chosen])})

    return DatasetRecord(
        kind="images",
        vocab=images.classes,
        shape=tuple(images.pixels.shape[1:]),
        peak=images.peak,
        tokeniser=None,
        order=ORDER,
        training=shards(order[: len(order) - held]),
        validation=shards(order[len(order) - held :]),
    )


def write_shards(store: Store, columns: dict[str, pa.Array]) -> tuple[Shard, ...]:
    """The columns in shards, each one Arrow stream of one batch: uncompressed, because codecs change by version."""
    schema = pa.schema([pa.field(name, column.type, nullable=False) for name, column in columns.items()])
    options = pa.ipc.IpcWriteOptions(metadata_version=pa.ipc.MetadataVersion.V5, compression=None)
    whole = pa.record_batch(list(columns.values()), schema=schema)

    def shard(start: int) -> Shard:
        part = whole.slice(start, SHARD_ITEMS)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema, options=options) as writer:
            writer.write_batch(part)
        return Shard(object=store.put(sink.getvalue().to_pybytes()), count=part.num_rows)

    return tuple(shard(start) for start in range(0, whole.num_rows, SHARD_ITEMS))


def open_dataset(store: Store, root: bytes) -> Dataset:
    """The dataset of a data root. MissingObject or IntegrityError; UsageError for an order that this version lacks."""
    made = decode(DatasetRecord, store.get(root))
    if made.order != ORDER or made.kind not in ("tokens", "images"):
        raise UsageError(
            f"dataset {root.hex()}: expected order {ORDER!r} of tokens or images, got {made.order!r} of "
            f"{made.kind!r}; use the Trueweight that prepared it"
        )
    if len(made.shape) != (1 if made.kind == "tokens" else 3) or 0 in (*made.shape, made.vocab):
        raise damaged(root, f"expected the shape of one input, got {made.shape} of {made.vocab}")
    dataset = Dataset(store, root, made)
    if any(shard.count > SHARD_ITEMS for shard in (*made.training, *made.validation)):
        raise damaged(root, f"expected at most {SHARD_ITEMS} tokens or images in a shard, got more")
    if dataset.training_examples < 1 or (made.kind == "images" and made.peak < 1):
        raise damaged(root, f"expected examples, got {dataset.training_examples} with a peak of {made.peak}")
    return dataset


class Dataset:
    """Batches of a prepared dataset. Shards are read when they are first needed, hashed and checked, then kept."""

    def __init__(self, store: Store, root: bytes, made: DatasetRecord) -> None:
        self.root = root
        self.record = made
        self._store = store
        self._columns: dict[bytes, tuple[NDArray[Any], ...]] = {}
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}

    @property
    def is_text(self) -> bool:
        """Whether inputs are tokens, i64; else they are images, f32."""
        return self.record.kind == "tokens"

    @property
    def vocab(self) -> int:
        """Tokens, or classes of images: targets are below it."""
        return self.record.vocab

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input: (context,), or (channels, height, width)."""
        return self.record.shape

    @property
    def context(self) -> int:
        """Tokens in a sequence; 1 for images."""
        return self.record.shape[0] if self.is_text else 1

    @property
    def training_examples(self) -> int:
        """Sequences or images in an epoch."""
        count = total(self.record.training)
        return count // self.context - 1 if self.is_text else count

    @property
    def validation_examples(self) -> int:
        """Sequences or images for validation."""
        count = total(self.record.validation)
        return max(count - 1, 0) // self.context if self.is_text else count

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """The inputs and targets of a step (from 0): a pure function of root, seed, step and size.

        Text: i64 [size, context] and the same one token on, i64 [size, context]. Images: f32 [size, channels, height,
        width] of 0 to 1, and labels i64 [size].
        """
        self.require_memory(size)
        samples = range(step * size, (step + 1) * size)
        return self._gather(self.record.training, [self._start(seed, sample) for sample in samples])

    def validation_batch(self, index: int, size: int) -> Batch:
        """The index-th batch of the validation data in order, from the beginning again where it ends; as `batch`."""
        count = self.validation_examples
        if not count:
            raise UsageError("validation: expected held-out data, got none; set [data] validation, such as 0.05")
        self.require_memory(size)
        samples = range(index * size, (index + 1) * size)
        return self._gather(self.record.validation, [sample % count * self.context for sample in samples])

    def require_memory(self, examples: int) -> None:
        """Returns where this host can hold a batch of so many examples; FailureError otherwise."""
        memory.require(32 * examples * (1 + math.prod(self.shape)), f"a batch of {examples} examples")

    def _start(self, seed: int, sample: int) -> int:
        """Where the sample's window starts in the training data."""
        epoch, position = divmod(sample, self.training_examples)
        if (seed, epoch) not in self._orders:
            while len(self._orders) > 1:  # a batch reaches into two epochs at most, unless they are tiny
                del self._orders[next(iter(self._orders))]
            self._orders[seed, epoch] = window_starts(seed, epoch, self.training_examples, self.context)
        return int(self._orders[seed, epoch][position])

    def _gather(self, shards: tuple[Shard, ...], starts: list[int]) -> Batch:
        if self.is_text:
            windows = np.stack([self._read(shards, start, self.context + 1)[0] for start in starts]).astype(np.int64)
            return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])
        rows = [self._read(shards, start, 1) for start in starts]
        pixels = np.concatenate([pixels for pixels, _ in rows]).reshape(-1, *self.shape).astype(np.float32)
        return pixels / np.float32(self.record.peak), np.concatenate([labels for _, labels in rows]).astype(np.int64)

    def _read(self, shards: tuple[Shard, ...], start: int, count: int) -> tuple[NDArray[Any], ...]:
        """Each column from `start` on for `count` rows, which may lie in several shards."""
        parts = []
        for shard in shards:
            if start < shard.count and count > 0:
                part = tuple(column[start : start + count] for column in self._load(shard))
                parts.append(part)
                count -= len(part[0])
            start = max(start - shard.count, 0)
        return parts[0] if len(parts) == 1 else tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def _load(self, shard: Shard) -> tuple[NDArray[Any], ...]:
        if shard.object not in self._columns:
            self._columns[shard.object] = read_shard(self._store, shard, self.record)
        return self._columns[shard.object]


def read_shard(store: Store, shard: Shard, made: DatasetRecord) -> tuple[NDArray[Any], ...]:
    """The columns of a shard: (tokens [n],), or (pixels [n, size], labels [n]); IntegrityError where they differ."""
    names = ["token"] if made.kind == "tokens" else ["pixels", "label"]
    try:
        table = pa.ipc.open_stream(pa.py_buffer(store.get(shard.object))).read_all()
        if table.column_names != names or table.num_rows != shard.count:
            raise ValueError(f"expected {shard.count} rows of {names}, got {table.num_rows} of {table.column_names}")
        columns = [table.column(name).combine_chunks() for name in names]
        values = columns[-1].to_numpy(zero_copy_only=True)
        if values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= made.vocab:
            raise ValueError(f"expected integers below {made.vocab} in {names[-1]}, got others")
        if made.kind == "tokens":
            return (values,)
        pixels = columns[0].flatten().to_numpy(zero_copy_only=True)
        return pixels.reshape(shard.count, int(np.prod(made.shape))), values
    except (pa.ArrowException, ValueError, TypeError, AttributeError) as error:
        raise damaged(shard.object, str(error)) from error


def damaged(digest: bytes, reason: str) -> IntegrityError:
    """The error for an object that is not what its record says."""
    name = digest.hex()
    return IntegrityError(f"data object {name}: {reason}; prepare the data again", digest=name)


def total(shards: tuple[Shard, ...]) -> int:
    """Tokens or images in the shards."""
    return sum(shard.count for shard in shards)


def permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """A permutation of 0 to count - 1, i64: the stable argsort of Philox words, so that no shuffle has to be agreed."""
    memory.require(32 * count, f"an order of {count} examples")
    words = philox.words(seed, count, purpose=philox.DATA_ORDER, step=epoch)
    return np.argsort(words, kind="stable").astype(np.int64)


def window_starts(seed: int, epoch: int, count: int, context: int) -> NDArray[np.int64]:
    """Where the windows of an epoch start, in the order in which they are taken, i64 [count]."""
    start = int(philox.words(seed, 1, purpose=philox.DATA_ORDER, step=epoch, operator=1)[0]) % context
    return permutation(seed, epoch, count) * context + start


def batch_root(inputs: NDArray[Any], targets: NDArray[Any]) -> bytes:
    """The digest of a batch, 32 bytes: the root over both arrays' names, types, shapes and bytes."""
    return state_root([entry_for("inputs", inputs), entry_for("targets", targets)])
