"""From a recipe and its data to a TrainingProgram. The submitter alone runs this: it imports the model's code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from runtime.models.chain import Chain, build_chain
from runtime.models.initial import Init, decayed, initialisers, local_names, named_parameters
from runtime.models.loss import metric
from runtime.models.shape import DataShape
from runtime.program import functions, optimiser, random
from runtime.program.builder import Builder, Value
from runtime.program.lowering import lower_block, lower_loss, lower_metric
from runtime.program.program import Program
from runtime.program.training import (
    BlockSpec,
    KindRecord,
    Sized,
    TensorSpec,
    TrainingProgram,
    TrainingRecord,
    chunk_lengths,
)
from runtime.recipe import Recipe
from storage import merkle

Progress = Callable[[str, float], None]


class Data(Protocol):
    """What the build needs to know of a dataset (runtime/data.py)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""

    @property
    def vocab(self) -> int:
        """Tokens or classes."""

    @property
    def is_text(self) -> bool:
        """Whether examples are tokens."""


@dataclass
class _Programs:
    """The distinct programs so far, by root."""

    found: list[Program] = field(default_factory=list)
    numbers: dict[bytes, int] = field(default_factory=dict)

    def number(self, program: Program) -> int:
        """The program's number; a new one where no equal program exists."""
        if program.root not in self.numbers:
            self.numbers[program.root] = len(self.found)
            self.found.append(program)
        return self.numbers[program.root]

    def sized(self, lengths: Sequence[int], make: Callable[[int], Program]) -> tuple[Sized, ...]:
        """One program a length."""
        return tuple(Sized(elements=n, program=self.number(make(n))) for n in sorted(set(lengths)))


def silent(what: str, share: float) -> None:
    """Reports nothing."""


def chain_of(recipe: Recipe, data: Data) -> Chain:
    """The recipe's model for this data, in torch."""
    return build_chain(recipe.model, DataShape(example=data.shape, classes=data.vocab))


def build_training_program(recipe: Recipe, data: Data, progress: Progress = silent) -> TrainingProgram:
    """The recipe lowered: every distinct block once, forward and backward, with loss, initial weights and updates.

    UsageError names what cannot be lowered, with its module and source line.
    """
    chain = chain_of(recipe, data)
    programs, names = _Programs(), local_names(chain.blocks)
    uses = Counter(name for block in names for name in block.values())
    example, target = _example(recipe, data)
    kinds, places, output = _lower_chain(recipe, chain, example, programs, max(uses.values()), progress)
    terms = max(recipe.training.micro_batches, recipe.training.validation_batches)
    keywords: dict[str, Any] = {"terms": terms, "slices": recipe.arithmetic.head_slices}
    blocks = tuple(
        BlockSpec(kind=kind, tensors=tuple(local.values())) for kind, local in zip(places, names, strict=True)
    )
    tensors = _tensors(recipe, chain.blocks, programs, progress)
    lengths = [row.elements for spec in tensors for row in spec.update]
    count = recipe.training.micro_batches
    header: dict[str, Any] = {
        "tensors": tensors,
        "blocks": blocks,
        "kinds": tuple(kinds),
        "loss": programs.number(lower_loss(chain.loss, output, target, **keywords)),
        "metric": programs.number(lower_metric(chain.loss, metric, output, target, **keywords)),
        "exponent": programs.sized(lengths, lambda n: optimiser.exponent_program(n, count)),
        "square": programs.sized(lengths, lambda n: optimiser.square_program(n, count)),
        "slots": optimiser.slots_of(recipe.optimiser),
        "micro_batches": count,
    }
    record = TrainingRecord(**header, programs=tuple(p.root for p in programs.found))
    return TrainingProgram(header=record, programs=tuple(programs.found))


def _example(recipe: Recipe, data: Data) -> tuple[Tensor, Tensor]:
    size = recipe.training.micro_batch
    x = torch.zeros(size, *data.shape, dtype=torch.int64 if data.is_text else torch.float32)
    return x, torch.zeros(x.shape if data.is_text else (size,), dtype=torch.int64)


def _lower_chain(
    recipe: Recipe, chain: Chain, example: Tensor, programs: _Programs, uses: int, progress: Progress
) -> tuple[list[KindRecord], list[int], Tensor]:
    """The distinct kinds, the kind of each block, and an example of the last block's output."""
    kinds: list[KindRecord] = []
    places: list[int] = []
    known: dict[Any, tuple[int, Tensor]] = {}
    for index, block in enumerate(chain.blocks):
        progress("lowering", index / len(chain.blocks))
        slices = recipe.arithmetic.head_slices if index == len(chain.blocks) - 1 else recipe.arithmetic.slices
        key = (structure(block, example), slices)
        if key not in known:
            made, output = lower_block(
                block,
                example,
                slices=slices,
                terms=recipe.training.micro_batches * uses,
                name=f"block {index} ({type(block).__name__})",
            )
            numbers = {k: programs.number(getattr(made, k)) for k in ("forward", "backward", "evaluate")}
            kinds.append(KindRecord(**numbers))
            known[key] = (len(kinds) - 1, output.detach())
        place, example = known[key]
        places.append(place)
    return kinds, places, example


def structure(block: nn.Module, example: Tensor) -> Any:
    """A key that is equal for blocks which lower to the same programs: classes, settings, shapes and buffers."""
    base = set(vars(nn.Module()))
    modules = tuple(
        (name, type(module), tuple(sorted((k, repr(v)) for k, v in vars(module).items() if k not in base)))
        for name, module in block.named_modules()
    )
    parameters = tuple((name, tuple(p.shape)) for name, p in block.named_parameters(remove_duplicate=False))
    buffers = tuple(
        (name, b.dtype, tuple(b.shape), merkle.bytes_root(np.ascontiguousarray(b.numpy()).data))
        for name, b in block.named_buffers()
    )
    opaque = tuple(
        id(v) for m in block.modules() for k, v in vars(m).items() if k not in base and isinstance(v, Tensor)
    )
    return modules, parameters, buffers, opaque, tuple(example.shape), example.dtype


def _tensors(
    recipe: Recipe, blocks: Sequence[nn.Module], programs: _Programs, progress: Progress
) -> tuple[TensorSpec, ...]:
    parameters, decay, initial = named_parameters(blocks), decayed(blocks), initialisers(blocks)

    @cache
    def drawn(kind: Init, n: int) -> Program:
        return initial_program(n, kind, np.empty(0, np.float32))

    @cache
    def update(decays: bool, n: int) -> Program:
        return optimiser.update_program(
            n,
            micro_batches=recipe.training.micro_batches,
            steps=recipe.training.steps,
            decay=decays,
            optimiser=recipe.optimiser,
            schedule=recipe.schedule,
        )

    specs = []
    for index, name in enumerate(sorted(parameters)):
        progress("lowering the update", index / len(parameters))
        kind, values = initial[name], parameters[name].detach().numpy()
        given = partial(initial_program, initial=kind, values=values)
        lengths = list(chunk_lengths(values.size))
        specs.append(
            TensorSpec(
                name=name,
                shape=values.shape,
                decay=decay[name],
                initial=programs.sized(lengths, given if kind.kind == "given" else partial(drawn, kind)),
                update=programs.sized(lengths, partial(update, decay[name])),
            )
        )
    return tuple(specs)


def initial_program(elements: int, initial: Init, values: np.ndarray) -> Program:
    """rng -> f32[elements], the tensor's initial values from element rng[5] on; `values` is used for kind "given"."""
    b = Builder()
    rng = b.input("rng", "i64", random.RNG_WORDS)
    return b.finish([_initial(b, rng, elements, initial, values)])


def _initial(b: Builder, rng: Value, elements: int, initial: Init, values: np.ndarray) -> Value:
    if initial.kind in ("zeros", "ones"):
        return b.full("f32", (elements,), 1.0 if initial.kind == "ones" else 0.0)
    if initial.kind == "given":
        first = rng.slice(0, random.RNG_WORDS - 1, random.RNG_WORDS)
        return b.take(b.constant(values.reshape(-1).astype(np.float32)), b.iota(elements) + first)
    x = random.symmetric(random.words(rng, elements, purpose=random.PURPOSE_WEIGHTS, operator=0))
    return (functions.normal(x) if initial.kind == "normal" else x) * initial.scale
