"""A whole training run as Programs: initial weights, every block, loss, norm and update, with who uses which tensor.

Calling conventions (inputs -> outputs); `rng` is i64[6], see `random.py`; E is a largest biased exponent, i32[]:

    forward   parameters..., x, rng      -> y
    backward  parameters..., x, rng, dy  -> [dx, unless x is integers], an i64 gradient a parameter
    evaluate  parameters..., x           -> y
    loss      y, target                  -> mean loss on the grid i64[], dy
    metric    y, target                  -> mean loss on the grid i64[], hits i64[], count i64[]
    initial   rng                        -> f32[n], elements from rng's last word on
    exponent  G i64[n]                   -> E of the mean gradient
    square    G, E                       -> sum of its squares on the grid of E, i64[]
    update    w f32[n], slots f32[n]..., G, total square i64[], E, step i64[] -> w, slots...

Tensors are flat in the last four and cut into chunks of CHUNK elements, so one Program serves every chunk of a length.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from runtime.program.program import Program, decode_program, encode_program
from runtime.program.types import MAX_AXES
from storage import merkle
from storage.codec import U32, U64, Digest, decode, encode, record
from storage.errors import IntegrityError

CHUNK = 2**18
"""Elements in a chunk: 256 leaves of 4 KiB in f32 and 512 in i64, powers of two, so that chunk roots compose."""


MOST_PARTS = 2**14
"""Tensors, blocks or programs of a training, which plans go through in pairs: a Llama of 80 layers has 700 tensors."""
MOST_WEIGHTS = 2**36
"""Elements of all tensors together: layouts list every chunk of them, whatever a TensorSpec claims."""
MOST_OPERATORS = 2**19
"""Operators of all programs together: decoding goes through some 15,000 a second."""


@record(kind=80)
class Sized:
    """The number of a program for chunks of n elements."""

    elements: U64
    program: U32


@record(kind=81)
class TensorSpec:
    """A trained f32 tensor: its shape, whether weight decay acts on it, its initial and update programs by length."""

    name: str
    shape: tuple[U64, ...]
    decay: bool
    initial: tuple[Sized, ...]
    update: tuple[Sized, ...]


@record(kind=82)
class BlockSpec:
    """One place in the chain: which kind of block, and the tensors that are its parameters in order."""

    kind: U32
    tensors: tuple[str, ...]


@record(kind=83)
class KindRecord:
    """Program numbers of one distinct block."""

    forward: U32
    backward: U32
    evaluate: U32


@record(kind=84)
class TrainingRecord:
    """How programs, given by their roots, make up the training; a TrainingProgram's root is this record's leaf hash."""

    tensors: tuple[TensorSpec, ...]
    blocks: tuple[BlockSpec, ...]
    kinds: tuple[KindRecord, ...]
    loss: U32
    metric: U32
    exponent: tuple[Sized, ...]
    square: tuple[Sized, ...]
    slots: tuple[str, ...]
    micro_batches: U32
    programs: tuple[Digest, ...]


@record(kind=85)
class TrainingFile:
    """A TrainingProgram's bytes: the record and the programs in its order."""

    header: TrainingRecord
    programs: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class KindSpec:
    """The programs of one distinct block."""

    forward: Program
    backward: Program
    evaluate: Program

    @cached_property
    def gradient_bounds(self) -> tuple[int | None, ...]:
        """For each parameter what its gradient's magnitudes cannot exceed, None where the Program does not say."""
        program = self.backward
        first = len(program.inputs)
        made = [program.ops[v - first] if v >= first else None for v in program.outputs]
        bounds = [2 ** op.attributes["bound"] - 1 if op is not None and op.name == "rint" else None for op in made]
        parameters = len(program.inputs) - 3  # the others are x, rng and dy
        return tuple(bounds[len(bounds) - parameters :])


def rng_input(seed: int, *, step: int, micro_batch: int, place: int, offset: int = 0) -> np.ndarray:
    """The `rng` input of a Program, i64[6] (`random.py`): `place` is a block or tensor, `offset` an element."""
    return np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, step, micro_batch, place, offset], np.int64)


def chunk_lengths(elements: int) -> Iterator[int]:
    """Lengths of the chunks that a tensor of so many elements is cut into, in order."""
    for start in range(0, elements, CHUNK):
        yield min(CHUNK, elements - start)


@dataclass(frozen=True, kw_only=True)
class TrainingProgram:
    """Everything that a worker or a verifier runs; made by `build.py`, and otherwise read from its bytes."""

    header: TrainingRecord
    programs: tuple[Program, ...] = field(repr=False)

    def __post_init__(self) -> None:
        _check(self.header, self.programs)

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Trained tensors, sorted by name; a tensor's index is its place here."""
        return self.header.tensors

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """The chain."""
        return self.header.blocks

    @property
    def slots(self) -> tuple[str, ...]:
        """What the optimiser keeps for every weight."""
        return self.header.slots

    @property
    def micro_batches(self) -> int:
        """Micro-batches in a step; the mean gradient is the sum divided by it."""
        return self.header.micro_batches

    @cached_property
    def kinds(self) -> tuple[KindSpec, ...]:
        """The distinct blocks."""
        at = self.programs
        return tuple(
            KindSpec(forward=at[k.forward], backward=at[k.backward], evaluate=at[k.evaluate]) for k in self.header.kinds
        )

    def kind_of(self, block: int) -> KindSpec:
        """The programs of a block of the chain."""
        return self.kinds[self.blocks[block].kind]

    @property
    def loss(self) -> Program:
        """The loss and its gradient."""
        return self.programs[self.header.loss]

    @property
    def metric(self) -> Program:
        """Loss and hits, for validation."""
        return self.programs[self.header.metric]

    def _sized(self, table: tuple[Sized, ...], elements: int) -> Program:
        return self.programs[next(row.program for row in table if row.elements == elements)]

    def init_program(self, tensor: int, elements: int) -> Program:
        """Initial values of a chunk of so many elements of a tensor."""
        return self._sized(self.tensors[tensor].initial, elements)

    def update_program(self, tensor: int, elements: int) -> Program:
        """The optimiser's step for such a chunk."""
        return self._sized(self.tensors[tensor].update, elements)

    def exponent_program(self, elements: int) -> Program:
        """The largest biased exponent of the mean gradient in a chunk."""
        return self._sized(self.header.exponent, elements)

    def square_program(self, elements: int) -> Program:
        """The exact sum of squares of the mean gradient in a chunk."""
        return self._sized(self.header.square, elements)

    @cached_property
    def root(self) -> bytes:
        """The digest (32 bytes) of the record, which covers the root of every program."""
        return merkle.leaf_hash(encode(self.header))

    def encode(self) -> bytes:
        """The canonical bytes."""
        return encode(TrainingFile(header=self.header, programs=tuple(map(encode_program, self.programs))))

    @classmethod
    def decode(cls, data: bytes) -> "TrainingProgram":
        """The TrainingProgram with these bytes; IntegrityError or OperatorError where they are not ones.

        The last two are kept: the workers of a process have one Program between them.
        """
        return _decoded(bytes(data))


@lru_cache(maxsize=2)
def _decoded(data: bytes) -> TrainingProgram:
    file = decode(TrainingFile, data)
    _check_size(file)
    programs: list[Program] = []
    operators = 0
    for part in file.programs:
        programs.append(decode_program(part))
        operators += len(programs[-1].ops)
        if operators > MOST_OPERATORS:
            raise _too_large("operators", operators, MOST_OPERATORS)
    if tuple(p.root for p in programs) != file.header.programs:
        raise IntegrityError("a training program's parts do not have the roots it states: fetch it again", digest="")
    return TrainingProgram(header=file.header, programs=tuple(programs))


def _check_size(file: TrainingFile) -> None:
    """IntegrityError where a file has more parts than a training has; it may be anybody's, so this comes first."""
    header = file.header
    axes = max((len(spec.shape) for spec in header.tensors), default=0)
    if axes > MAX_AXES:
        raise _too_large("axes of a tensor", axes, MAX_AXES)
    for what, found, most in (
        ("programs", len(file.programs), MOST_PARTS),
        ("tensors", len(header.tensors), MOST_PARTS),
        ("blocks", len(header.blocks), MOST_PARTS),
        ("rows of a table", max(map(len, _tables(header))), MOST_PARTS),
        ("weights", sum(math.prod(spec.shape) for spec in header.tensors), MOST_WEIGHTS),
    ):
        if found > most:
            raise _too_large(what, found, most)


def _too_large(what: str, found: int, most: int) -> IntegrityError:
    return IntegrityError(
        f"a training program: expected at most {most} {what}, got {found}; audit it with a version that takes more",
        digest="",
    )


def _tables(header: TrainingRecord) -> list[tuple[Sized, ...]]:
    return [header.exponent, header.square, *(t for spec in header.tensors for t in (spec.initial, spec.update))]


def _check(header: TrainingRecord, programs: tuple[Program, ...]) -> None:
    """IntegrityError where the record does not describe a training that can run: numbers, names and chunk lengths."""
    numbers = [header.loss, header.metric, *(n for k in header.kinds for n in (k.forward, k.backward, k.evaluate))]
    numbers += [row.program for table in _tables(header) for row in table]
    names = [spec.name for spec in header.tensors]
    known = set(names)
    problems = {
        "a program number out of range": max(numbers) >= len(programs),
        "tensors that are not sorted by name": names != sorted(known),
        "a block of an unknown kind": any(b.kind >= len(header.kinds) for b in header.blocks),
        "a block with an unknown tensor": any(not set(b.tensors) <= known for b in header.blocks),
        "no blocks or no micro-batches": not header.blocks or header.micro_batches == 0,
    }
    shared = [{row.elements for row in table} for table in (header.exponent, header.square)]
    for spec in header.tensors:
        elements = math.prod(spec.shape)
        lengths = {n for n in (min(elements, CHUNK), elements % CHUNK) if n}  # of chunk_lengths, whatever the size
        tables = [*shared, *({row.elements for row in table} for table in (spec.initial, spec.update))]
        problems[f"no program for a chunk of {spec.name}"] = any(not lengths <= table for table in tables)
    for problem, found in problems.items():
        if found:
            raise IntegrityError(f"a training program with {problem}: made by another version?", digest="")
