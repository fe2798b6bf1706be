"""A script: digit products by a kernel whose one special instruction is spelled out, for a number of lanes.

So the code for processors that are not here runs on any; against int64 sums by numpy and the reference executor.
"""

import sys
from collections.abc import Sequence

import numpy as np
from llvmlite import ir

from runtime.program import sums
from runtime.program.builder import Builder
from runtime.program.compiler import pairs, products, quads
from runtime.program.compiler.executor import CompiledExecutor
from runtime.program.reference import ReferenceExecutor
from storage.native import I32, Function

SIZES = [1, 2, 5, 7, 13, 63, 65, 129]


def products_of(f: Function, x: ir.Value, y: ir.Value, bits: int, unsigned: bool) -> ir.Value:
    """In each lane of i32 the sum of the products of its parts of so many bits, those of x unsigned if told so."""
    b, parts = f.builder, x.type.count * 32 // bits
    narrow, wide = (ir.VectorType(kind, parts) for kind in (ir.IntType(bits), I32))
    extend = b.zext if unsigned else b.sext
    made = b.mul(extend(b.bitcast(x, narrow), wide), b.sext(b.bitcast(y, narrow), wide))
    total = ir.Constant(x.type, [0] * x.type.count)
    for part in range(32 // bits):
        chosen = ir.Constant(x.type, [lane * (32 // bits) + part for lane in range(x.type.count)])
        total = b.add(total, b.shuffle_vector(made, ir.Constant(wide, ir.Undefined), chosen))
    return total


def digits(random: np.random.Generator, shape: Sequence[int], extreme: bool) -> np.ndarray:
    """Digits within +-64, or all of them at an end of that."""
    made = random.integers(-64, 65, tuple(shape))
    return np.where(made < 0, -64, 64).astype(np.int32) if extreme else made.astype(np.int32)


def main(kind: str, lanes: int) -> None:
    """Products of one, two and three digits, on odd sizes and layouts."""
    other = {"quads": pairs, "pairs": quads}[kind]
    own = {"quads": quads, "pairs": pairs}[kind]
    for module, name, spelled in (
        (own, "lanes", lambda: lanes),
        (other, "lanes", lambda: 0),
        (quads, "dot", lambda f, total, x, y: f.builder.add(total, products_of(f, x, y, 8, quads.biased()))),
        (pairs, "madd", lambda f, x, y: products_of(f, x, y, 16, False)),
    ):
        setattr(module, name, spelled)
    executor, reference = CompiledExecutor(2, cache=False), ReferenceExecutor("cpu")
    assert executor.path == {"quads": products.VNNI if lanes > 4 else products.SDOT, "pairs": products.PAIRS}[kind]
    random = np.random.default_rng(lanes)
    for number in range(8):
        batch, m, n, k = int(random.choice([1, 3])), *(int(random.choice(SIZES)) for _ in range(3))
        a, b = (digits(random, shape, number % 3 == 0) for shape in ((batch, m, k), (batch, k, n)))
        a = np.tril(a) if number % 4 == 1 else a
        build, swapped = Builder(), random.integers(0, 2, 2)
        given = [np.ascontiguousarray(x.swapaxes(1, 2)) if s else x for x, s in zip((a, b), swapped, strict=True)]
        ends = np.nextafter(np.float32(1), np.float32(0))  # rounds up to a top digit of 64
        floats = [random.standard_normal(x.shape).astype(np.float32) for x in given]
        given += [np.where(x < 0, -ends, ends) for x in floats] if number % 3 == 0 else floats
        dtypes = ("i32", "i32", "f32", "f32")
        values = [build.input(f"{i}", dtypes[i], *x.shape) for i, x in enumerate(given)]
        x, y, u, v = (value.swap() if swapped[i % 2] else value for i, value in enumerate(values))
        made = [build.dot(x.digit(), y.digit()), sums.matmul(u, v, 2), sums.matmul(u, v, 3)]
        program = build.finish(made)
        got, want = (list(map(e.get, e.run(program, list(map(e.put, given))))) for e in (executor, reference))
        assert np.array_equal(got[0], a.astype(np.int64) @ b.astype(np.int64)), (batch, m, n, k)
        assert [one.tobytes() for one in got] == [one.tobytes() for one in want], (batch, m, n, k)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
