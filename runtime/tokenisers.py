"""Text to tokens and back: bytes, and a byte-level byte-pair encoding (BPE) whose trained form is data.

A tokeniser's bytes are JSON: `{"kind":"bytes"}`, or `{"kind":"bpe","merges":["Ġ t", ...]}` with the merges in order of
rank. Nothing else is kept, because the rest follows: tokens 0 to 255 are the bytes in the order of GPT-2's printable
alphabet, and each merge that makes a new string adds a token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from storage.errors import UsageError
from storage.foreign import parse_json

PIECE = 1 << 16  # characters encoded at a time; a part of the definition, because no merge spans two pieces


class Tokeniser(Protocol):
    """Text to tokens and back."""

    vocab: int

    def encode(self, text: str) -> NDArray[np.int32]:
        """The tokens, i32 [n], each below `vocab`."""

    def decode(self, tokens: NDArray[np.int32]) -> str:
        """The text; bytes that are not UTF-8 become the replacement character."""

    def to_bytes(self) -> bytes:
        """What `open_tokeniser` reads."""


class ByteTokeniser:
    """The bytes of the text in UTF-8, 256 tokens."""

    vocab = 256

    def encode(self, text: str) -> NDArray[np.int32]:
        """See Tokeniser."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)

    def decode(self, tokens: NDArray[np.int32]) -> str:
        """See Tokeniser."""
        return bytes(tokens.tolist()).decode("utf-8", errors="replace")

    def to_bytes(self) -> bytes:
        """See Tokeniser."""
        return dump({"kind": "bytes"})


class BpeTokeniser:
    """A byte-level BPE: GPT-2's splitting into words, then the merges in order of rank."""

    def __init__(self, merges: list[tuple[str, str]]) -> None:
        self.merges = merges
        tokens = {text: index for index, text in enumerate(alphabet())}
        for left, right in merges:
            if left not in tokens or right not in tokens:
                raise ValueError(f"merge {left!r} {right!r} of a token that no earlier merge makes")
            tokens.setdefault(left + right, len(tokens))
        self.vocab = len(tokens)
        self._model = tokenizers.Tokenizer(models.BPE(vocab=tokens, merges=merges))
        self._model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._model.decoder = decoders.ByteLevel()

    def encode(self, text: str) -> NDArray[np.int32]:
        """See Tokeniser."""
        parts = [np.array(self._model.encode(piece).ids, dtype=np.int32) for piece in pieces(text)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    def decode(self, tokens: NDArray[np.int32]) -> str:
        """See Tokeniser."""
        return str(self._model.decode(tokens.tolist()))

    def to_bytes(self) -> bytes:
        """See Tokeniser."""
        return dump({"kind": "bpe", "merges": [f"{left} {right}" for left, right in self.merges]})


def train_bpe(text: str, vocab: int) -> BpeTokeniser:
    """A BPE of at most `vocab` tokens, fewer where the text has no more pairs; the same for the same text."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet(), show_progress=False)
    model.train_from_iterator(pieces(text), trainer)
    merges = json.loads(model.to_str())["model"]["merges"]
    return BpeTokeniser([(left, right) for left, right in merges])


def open_tokeniser(data: bytes, source: str) -> Tokeniser:
    """The tokeniser whose `to_bytes()` is `data`; UsageError naming `source` where it is none."""
    try:
        given = parse_json(data)
        if given == {"kind": "bytes"}:
            return ByteTokeniser()
        if isinstance(given, dict) and given.keys() == {"kind", "merges"} and given["kind"] == "bpe":
            return BpeTokeniser([split(merge) for merge in given["merges"]])
        got = "another JSON value"
    except (ValueError, TypeError, AttributeError) as error:
        got = str(error)
    raise UsageError(
        f"tokeniser {source}: expected JSON with kind 'bytes', or kind 'bpe' and merges, got {got}; "
        "name a file that Trueweight's tokenisers.train_bpe wrote"
    )


def load_tokeniser(path: Path) -> Tokeniser:
    """The tokeniser in a file; UsageError where it cannot be read or is none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"[data] tokeniser_file {path}: expected a readable file, got {error.strerror}; check the path"
        ) from error
    return open_tokeniser(data, str(path))


def split(merge: str) -> tuple[str, str]:
    """The two parts of a merge; ValueError for more or fewer."""
    left, right = merge.split(" ")
    return left, right


def alphabet() -> list[str]:
    """The 256 printable characters that stand for the bytes, ascending."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def pieces(text: str) -> Iterator[str]:
    """The text in parts of PIECE characters or more, cut after a line end."""
    cuts = [0]
    while cuts[-1] < len(text):
        cuts.append(text.find("\n", cuts[-1] + PIECE - 1) + 1 or len(text))
    return (text[start:stop] for start, stop in pairwise(cuts))


def dump(value: object) -> bytes:
    """JSON in UTF-8 without spaces."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
