"""Transcendental functions against binary64: at most 2 ulp of binary32, edges included."""

from __future__ import annotations

import math
from collections.abc import Callable
from hashlib import sha256
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from runtime.program import functions
from runtime.program.builder import Value
from runtime.program.executor import ArithmeticFault

LIMITS = {"normal": 5.0}
"""Ulp, measured in the spacing of binary32 at the exact result; 2 where nothing is said. `normal` makes initial weights
and nothing else; over all its 2^24 inputs it is at most 4.38 ulp off."""


def every(function: Callable[[float], float]) -> Callable[[np.ndarray], np.ndarray]:
    return np.vectorize(function, otypes=[np.float64])


def sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.where(x < 0, np.exp(x) / (1 + np.exp(x)), 1 / (1 + np.exp(-x)))


def wide(count: int, low: float, high: float) -> np.ndarray:
    """Both signs, spread evenly over the exponents from low to high, and evenly over the largest decade."""
    source = np.random.default_rng(1)
    sizes = 10 ** source.uniform(math.log10(low), math.log10(high), count // 2)
    even = source.uniform(-min(high, 20.0), min(high, 20.0), count - 2 * (count // 4))
    return np.concatenate([sizes[::2], -sizes[1::2], even]).astype(np.float32)


def near(*points: float) -> np.ndarray:
    """The 2,001 neighbours of each point, where a function changes its formula."""
    steps = np.arange(-1000, 1001)
    return np.concatenate([(np.float32(p).view(np.int32) + steps).astype(np.int32).view(np.float32) for p in points])


HALVES = np.log(2.0) * (np.arange(-149, 128) + 0.5)
EXP = np.concatenate([wide(120_000, 1e-40, 104), near(-87.33654, 88.72284, -103.9, 1.0), near(*HALVES[::16])])
LOG = np.concatenate([np.abs(wide(120_000, 1e-45, 3.4e38)), near(1.0, 0.70710678, 1.4142135, 2.0**-126, 3.4e38)])
TANH = np.concatenate([wide(80_000, 1e-45, 30), near(0.625, -0.625, 9.0, 10.0)])
ERF = np.concatenate([wide(60_000, 1e-45, 10), near(1.0, -1.0, 2.0, 4.0)])
NORMAL = np.concatenate(
    [
        (2 * np.arange(0, 2**24, 401) + 1 - 2**24) / 2.0**24,
        (2 * np.arange(0, 2000) + 1 - 2**24) / 2.0**24,
        (2 * np.arange(2**23 - 1000, 2**23 + 1000) + 1 - 2**24) / 2.0**24,
        (2 * np.arange(2**24 - 2000, 2**24) + 1 - 2**24) / 2.0**24,
    ]
).astype(np.float32)

CASES: dict[str, tuple[Callable[[Value], Value], Callable[[np.ndarray], np.ndarray], np.ndarray]] = {
    "exp": (functions.exp, np.exp, EXP),
    "log": (functions.log, np.log, LOG),
    "tanh": (functions.tanh, np.tanh, TANH),
    "sigmoid": (functions.sigmoid, sigmoid, np.concatenate([wide(120_000, 1e-40, 100), near(-16.0, 17.0, -87.4)])),
    "erf": (functions.erf, every(math.erf), ERF),
    "normal": (functions.normal, every(lambda x: NormalDist().inv_cdf((1 + x) / 2)), NORMAL),
}


@pytest.mark.parametrize("name", CASES)
def test_at_most_two_ulp(name: str, compute: Any) -> None:
    function, reference, x = CASES[name]
    limit = LIMITS.get(name, 2.0)
    with np.errstate(all="ignore"):
        exact = reference(x.astype(np.float64))
        rounded = exact.astype(np.float32)
        spacing = np.spacing(np.abs(rounded)).astype(np.float64)
    found = compute(function, x)
    finite = np.isfinite(rounded)
    assert (found[~finite] == rounded[~finite]).all(), "overflow"
    off = np.abs(found[finite].astype(np.float64) - exact[finite]) / spacing[finite]
    worst = int(off.argmax())
    at = x[finite][worst]
    print(f"{name}: worst {off[worst]:.3f} ulp at {at!r}")  # noqa: T201
    assert off[worst] <= limit, (
        f"{name}: {off[worst]:.3f} ulp at {at!r} ({(off > limit).sum()} of {off.size} above {limit}): "
        f"expected {exact[finite][worst]!r}, got {found[finite][worst]!r}"
    )


INF, NAN = math.inf, math.nan
EDGES: dict[str, list[tuple[float, float]]] = {
    "exp": [
        (0.0, 1.0),
        (-0.0, 1.0),
        (INF, INF),
        (-INF, 0.0),
        (88.8, INF),
        (-104.5, 0.0),
        (3e38, INF),
        (-3e38, 0.0),
        (1e-45, 1.0),
    ],
    "log": [(1.0, 0.0), (0.0, -INF), (-0.0, -INF), (INF, INF), (-1.0, NAN), (-INF, NAN), (NAN, NAN), (-1e-45, NAN)],
    "tanh": [
        (0.0, 0.0),
        (-0.0, -0.0),
        (INF, 1.0),
        (-INF, -1.0),
        (20.0, 1.0),
        (-3e38, -1.0),
        (1e-45, 1e-45),
        (-1e-45, -1e-45),
    ],
    "sigmoid": [(0.0, 0.5), (-0.0, 0.5), (INF, 1.0), (-INF, 0.0), (-3e38, 0.0), (3e38, 1.0)],
    "erf": [(0.0, 0.0), (-0.0, -0.0), (INF, 1.0), (-INF, -1.0), (5.0, 1.0), (-3e38, -1.0)],
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str, compute: Any) -> None:
    x = np.array([at for at, _ in EDGES[name]], np.float32)
    found = compute(CASES[name][0], x)
    for at, made, expected in zip(x, found, np.array([y for _, y in EDGES[name]], np.float32), strict=True):
        assert (np.isnan(made) and np.isnan(expected)) or made.tobytes() == expected.tobytes(), f"{name}({at}) = {made}"


@pytest.mark.parametrize("name", ["exp", "tanh", "sigmoid", "erf"])
def test_nan_is_a_fault_and_never_silent(name: str, compute: Any) -> None:
    with pytest.raises(ArithmeticFault) as caught:
        compute(CASES[name][0], np.array([0.5, NAN], np.float32))
    assert caught.value.element == 1


@pytest.mark.parametrize("name", ["tanh", "erf", "sigmoid", "exp"])
def test_monotonic_where_the_formula_changes(name: str, compute: Any) -> None:
    """Sorted inputs around every seam give outputs that fall by at most an ulp."""
    x = np.sort(near(0.625, 1.0, 2.0, 4.0))
    found = compute(CASES[name][0], x)
    assert (np.diff(found.view(np.int32)) >= -2).all()


def test_maximum_minimum_and_signs(compute: Any, hard_floats: Any) -> None:
    a, b = hard_floats(500, 2), hard_floats(500, 3)
    keep = ~np.isnan(a) & ~np.isnan(b)
    a, b = a[keep], b[keep]
    assert compute(functions.maximum, a, b).tobytes() == np.where(a < b, b, a).tobytes()
    assert compute(functions.minimum, a, b).tobytes() == np.where(b < a, b, a).tobytes()
    assert compute(functions.absolute, a).tobytes() == np.abs(a).tobytes()
    assert compute(lambda x, y: functions.with_sign_of(functions.absolute(x), y), a, b).tobytes() == (
        np.copysign(np.abs(a), b).tobytes()
    )
    assert np.isnan(compute(functions.maximum, np.full(2, NAN, np.float32), np.ones(2, np.float32))).all()


GOLDEN = {
    "exp": "fb12002cf74e062043bd0f92679c8e2944f2f5dfb56a50321f8ae0316f815897",
    "log": "6405d312e10c911b24172d7e25de4998783e7b056b7fc6b220395785f98676c7",
    "tanh": "7ac72e1023ecf8324f44be851901ea4ad075a13337937b45c7c0e91c085dc7ae",
    "sigmoid": "b69341881c35a7ef8a87d8dc3a0e0b9ab8f56d807a2e2272a4368d4bbc9d7978",
    "erf": "8399c1cabaa3975c102968b034ddd7810ac798179c6827618b4ffcd114949998",
    "normal": "2b21d76f77ad76312f27991ae7e49d27f3f73eba3fc84ec207013c48d81f0549",
}
"""SHA-256 of each function over 65,536 bit patterns: coefficients and their order are part of the arithmetic."""


@pytest.mark.parametrize("name", CASES)
def test_the_bits_never_move(name: str, compute: Any) -> None:
    x = (np.arange(2**16, dtype=np.uint32) << np.uint32(16) | np.uint32(0x1234)).view(np.float32)
    if name == "normal":
        x = ((2 * np.arange(2**16) + 1 - 2**16) / 2.0**16).astype(np.float32)
    x = x[~np.isnan(x)]
    assert sha256(compute(CASES[name][0], x).tobytes()).hexdigest() == GOLDEN[name]
