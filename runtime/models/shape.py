"""What a model must fit: the form of one example and the number of classes."""

from __future__ import annotations

from dataclasses import dataclass

from storage.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class DataShape:
    """One example without the batch axis: [context] tokens (int64), or [channels, height, width] pixels (float32)."""

    example: tuple[int, ...]
    classes: int  # tokens of the vocabulary, or labels

    @property
    def is_text(self) -> bool:
        """Whether examples are sequences of tokens."""
        return len(self.example) == 1

    @property
    def features(self) -> int:
        """Elements of one example."""
        product = 1
        for size in self.example:
            product *= size
        return product

    def vocabulary(self, vocab: int) -> int:
        """Rows of an embedding: `vocab`, or the data's own where 0. UsageError: fewer rows than the data has tokens."""
        if 0 < vocab < self.classes:
            raise UsageError(
                f"[model] vocab: expected 0 or at least {self.classes}, got {vocab}; change vocab or the tokeniser"
            )
        return vocab or self.classes

    def positions(self, context: int) -> int:
        """Positions a model knows: `context`, or the data's own where 0. UsageError: fewer than a sequence has."""
        (length,) = self.example
        if 0 < context < length:
            raise UsageError(
                f"[model] context: expected 0 or at least [data] context = {length}, got {context}; change one of them"
            )
        return context or length
