"""Recipes: everything that can change a bit of a run, as frozen data read from TOML. Nothing names a machine."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from runtime.families import (
    FAMILIES,
    ConvnetConfig,
    FactoryConfig,
    GptConfig,
    LlamaConfig,
    MlpConfig,
    ModelConfig,
)
from runtime.fields import Section, about, place, shown, suggestion
from storage.errors import UsageError
from storage.foreign import parse_json

FORMAT = 1  # of the canonical form

__all__ = [
    "FAMILIES",
    "ArithmeticConfig",
    "ConvnetConfig",
    "DataConfig",
    "FactoryConfig",
    "GptConfig",
    "LlamaConfig",
    "MlpConfig",
    "ModelConfig",
    "OptimiserConfig",
    "Recipe",
    "ScheduleConfig",
    "TrainingConfig",
    "decode_recipe",
    "load_recipe",
    "parse_recipe",
]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The [data] table: exactly one source, and how it becomes examples."""

    table: ClassVar[str] = "data"
    corpus: str = field(default="", metadata=about("a text that comes as a package", choices=("", "kjv")))
    url: str = field(
        default="",
        metadata=about("fsspec URL of a .txt or .parquet file; a relative path starts at the recipe's folder"),
    )
    images: str = field(default="", metadata=about("images with labels", choices=("", "digits")))
    column: str = field(default="text", metadata=about("the text column of a Parquet file"))
    tokeniser: str = field(default="bytes", metadata=about("how text becomes tokens", choices=("bytes", "bpe")))
    vocab: int = field(default=16384, metadata=about("tokens of the BPE", low=257, high=2**31 - 1))
    tokeniser_file: str = field(
        default="",
        metadata=about("a trained BPE, relative to the recipe's folder; without it one is trained on the text"),
    )
    context: int = field(default=128, metadata=about("tokens in a sequence", low=1, high=2**24))
    validation: float = field(default=0.05, metadata=about("share of the data kept for validation", low=0, below=1))

    @property
    def reads(self) -> str:
        """'text' or 'images'."""
        return "images" if self.images else "text"

    def _check(self) -> None:
        given = [key for key in ("corpus", "url", "images") if getattr(self, key)]
        if len(given) != 1:
            raise UsageError(
                f"[data]: expected exactly one of corpus, url, images, got {' and '.join(given) or 'none'}; "
                "write for example corpus = 'kjv'"
            )

    def _unused(self) -> Mapping[str, str]:
        reasons = {key: "with another source" for key in ("corpus", "url", "images") if not getattr(self, key)}
        if self.images:
            keys = ("column", "tokeniser", "vocab", "tokeniser_file", "context")
            return reasons | dict.fromkeys(keys, f"with images = {self.images!r}")
        if not self.url:
            reasons["column"] = "without url"
        if self.tokeniser == "bytes":
            reasons |= dict.fromkeys(("vocab", "tokeniser_file"), "with tokeniser = 'bytes'")
        return reasons


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section):
    """The [training] table: how long, how much a step, how often committed and validated."""

    table: ClassVar[str] = "training"
    steps: int = field(metadata=about("optimiser steps", low=1, high=2**32 - 1))
    batch: int = field(metadata=about("sequences or images a step, over all workers", low=1, high=2**32 - 1))
    micro_batches: int = field(
        default=1, metadata=about("units a batch is cut into; divides batch", low=1, high=2**24 - 1)
    )
    segment: int = field(default=10, metadata=about("steps between committed checkpoints", low=1, high=2**32 - 1))
    validate_every: int = field(default=0, metadata=about("steps between validations; 0 is never", low=0))
    validation_batches: int = field(
        default=1, metadata=about("micro-batches of validation data in one validation", low=1)
    )

    @property
    def micro_batch(self) -> int:
        """Sequences or images in one micro-batch."""
        return self.batch // self.micro_batches

    def _check(self) -> None:
        if self.batch % self.micro_batches:
            expected = f"a multiple of micro_batches = {self.micro_batches}"
            raise self.refusal("batch", expected, self.batch, "change batch or micro_batches")

    def _unused(self) -> Mapping[str, str]:
        return {} if self.validate_every else {"validation_batches": "without validate_every"}


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig(Section):
    """The [optimiser] table."""

    table: ClassVar[str] = "optimiser"
    kind: str = field(default="adamw", metadata=about("the update rule", choices=("adamw", "sgd")))
    learning_rate: float = field(default=1e-3, metadata=about("the peak of the schedule", above=0, high=1e6))
    betas: tuple[float, float] = field(
        default=(0.9, 0.95), metadata=about("AdamW: decay of the two moments", low=0, below=1)
    )
    eps: float = field(default=1e-8, metadata=about("AdamW: added to the denominator", low=2**-126, high=1))
    weight_decay: float = field(
        default=0.1, metadata=about("decoupled decay of matrices; vectors have none", low=0, high=1e6)
    )
    momentum: float = field(default=0.9, metadata=about("SGD: decay of the momentum", low=0, below=1))
    nesterov: bool = field(default=False, metadata=about("SGD: Nesterov's momentum"))
    clip: float = field(default=1.0, metadata=about("largest global gradient norm; 0 is off", low=0, high=1e6))

    def _unused(self) -> Mapping[str, str]:
        keys = ("betas", "eps") if self.kind == "sgd" else ("momentum", "nesterov")
        return dict.fromkeys(keys, f"with kind = {self.kind!r}")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """The [schedule] table: warm-up, then constant, or down to floor by the last step."""

    table: ClassVar[str] = "schedule"
    kind: str = field(default="constant", metadata=about("after warm-up", choices=("constant", "linear", "cosine")))
    warmup: int = field(default=0, metadata=about("steps of linear rise to the peak", low=0))
    floor: float = field(default=0.0, metadata=about("where it ends, as a share of the peak", low=0, high=1))

    def _unused(self) -> Mapping[str, str]:
        return {"floor": "with kind = 'constant'"} if self.kind == "constant" else {}


@dataclass(frozen=True, kw_only=True)
class ArithmeticConfig(Section):
    """The [arithmetic] table."""

    table: ClassVar[str] = "arithmetic"
    slices: int = field(
        default=2, metadata=about("7-bit slices of a matrix product's operands: 2 is 13 bits, 3 is 20", choices=(2, 3))
    )
    head_slices: int = field(
        default=3, metadata=about("the same in the last block, whose gradient rows mix sizes most", choices=(2, 3))
    )


@dataclass(frozen=True, kw_only=True)
class Recipe(Section):
    """A whole recipe. Together with the data root it fixes the bits of a run; equal digests mean equal recipes."""

    name: str = field(metadata=about("what runs of it are called: lower-case letters, digits, '.', '_', '-'"))
    seed: int = field(default=1, metadata=about("key of every random word", low=0, high=2**64 - 1))
    faults: bool = field(
        default=False, metadata=about("whether `--inject` may spoil runs, which proves nothing of them")
    )
    model: ModelConfig = field(metadata=about("the model"))
    data: DataConfig = field(metadata=about("the data"))
    training: TrainingConfig = field(metadata=about("the training"))
    optimiser: OptimiserConfig = field(default=OptimiserConfig(), metadata=about("the optimiser"))
    schedule: ScheduleConfig = field(default=ScheduleConfig(), metadata=about("the learning-rate schedule"))
    arithmetic: ArithmeticConfig = field(default=ArithmeticConfig(), metadata=about("precision"))

    def _check(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", self.name):
            raise self.refusal("name", "up to 64 of a-z, 0-9, '.', '_', '-'", self.name, "change name")
        if self.data.reads not in self.model.reads:
            expected = f"a family that reads {self.data.reads} ({', '.join(families_for(self.data.reads))})"
            raise self.model.refusal("family", expected, self.model.family, "change [model] family or [data]")
        if self.schedule.warmup > self.training.steps:
            expected = f"at most [training] steps = {self.training.steps}"
            raise self.schedule.refusal("warmup", expected, self.schedule.warmup, "lower warmup or raise steps")
        if self.training.validate_every and not self.data.validation:
            remedy = "set a share such as 0.05, or validate_every = 0"
            raise self.data.refusal("validation", "a share above 0 with validate_every", 0.0, remedy)
        if isinstance(self.model, GptConfig | LlamaConfig):
            self._check_language(self.model)

    def _check_language(self, model: GptConfig | LlamaConfig) -> None:
        """UsageError where the model is too small for the data's tokens or sequences."""
        tokens = 256 if self.data.tokeniser == "bytes" else self.data.vocab
        if 0 < model.vocab < tokens:
            expected = f"0 or at least the tokeniser's {tokens}"
            raise model.refusal("vocab", expected, model.vocab, "leave vocab out to take the tokeniser's")
        if 0 < model.context < self.data.context:
            expected = f"0 or at least [data] context = {self.data.context}"
            raise model.refusal("context", expected, model.context, "leave context out to take the data's")

    def as_json(self) -> dict[str, Any]:
        """The recipe as JSON values; `faults` only where it is true."""
        made = super().as_json()
        return made if self.faults else {key: value for key, value in made.items() if key != "faults"}

    def canonical(self) -> bytes:
        """The recipe's one encoding: JSON in UTF-8, keys sorted, no spaces.

        Defaults are written out, so a later default changes no committed recipe; keys without a meaning are left out.
        """
        data = {"format": FORMAT, **self.as_json()}
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical form, 32 bytes."""
        return hashlib.sha256(self.canonical()).digest()


TABLES: Mapping[str, type[Section]] = {
    config.table: config
    for config in (ModelConfig, DataConfig, TrainingConfig, OptimiserConfig, ScheduleConfig, ArithmeticConfig)
}


def families_for(reads: str) -> list[str]:
    """Names of the model families that take 'text' or 'images'."""
    return [name for name, config in FAMILIES.items() if reads in config.reads]


def load_recipe(path: str | Path) -> Recipe:
    """The recipe in a TOML file. UsageError: no such file, not UTF-8, or anything `parse_recipe` refuses."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"recipe {path}: expected a readable file, got {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"recipe {path}: expected UTF-8 text, got {error.reason}; save it as UTF-8") from error
    return parse_recipe(text, source=str(path))


def parse_recipe(text: str, source: str = "recipe") -> Recipe:
    """The recipe in TOML. UsageError starting with `source`: bad TOML; keys unknown, missing, mistyped or at odds."""
    try:
        return from_tables(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{source}: expected TOML, got {error}; correct that line") from error
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error


def decode_recipe(data: bytes) -> Recipe:
    """The recipe whose `canonical()` is `data`; UsageError where it is not exactly canonical or of another format."""
    got = shown(data)
    try:
        tables = parse_json(data)
        if not isinstance(tables, dict) or tables.pop("format", None) != FORMAT:
            raise UsageError(f"committed recipe: expected format {FORMAT}, got {got}; use a matching Trueweight")
        recipe = from_tables(tables)
    except ValueError as error:
        raise UsageError(f"committed recipe: expected canonical JSON, got {got}; fetch it again") from error
    if recipe.canonical() != data:
        raise UsageError(f"committed recipe: expected canonical JSON, got {got}; use a matching Trueweight")
    return recipe


def from_tables(given: Mapping[str, object]) -> Recipe:
    """The recipe from the parsed file: top-level keys and one mapping a table."""
    made: dict[str, object] = {}
    for key, value in given.items():
        if key not in TABLES:
            if isinstance(value, Mapping):
                raise UsageError(f"unknown table [{key}]: {suggestion(key, TABLES)}")
            made[key] = value
        elif not isinstance(value, Mapping):
            raise UsageError(f"{key}: expected a table, got {shown(value)}; write [{key}] on a line of its own")
        else:
            made[key] = read_model(value) if key == "model" else TABLES[key].read(value)
    for key in ("model", "data", "training"):
        if key not in made:
            raise UsageError(f"[{key}]: expected a table, got nothing; add [{key}]")
    return Recipe.read(made)


def read_model(given: Mapping[str, object]) -> ModelConfig:
    """The [model] table, by its family."""
    family = given.get("family", "nothing")
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join(map(repr, FAMILIES))
        raise UsageError(
            f"{place('model', 'family')}: expected one of {known}, got {shown(family)}; "
            + (suggestion(family, FAMILIES) if isinstance(family, str) else "write for example family = 'gpt'")
        )
    return FAMILIES[family].read({key: value for key, value in given.items() if key != "family"})
