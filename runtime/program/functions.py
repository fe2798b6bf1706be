"""Transcendental functions as straight lines of binary32 operations (docs/arithmetic.md, rule R1).

At most 2 ulp off (`normal`: 5), the same bits everywhere, no call of a platform's mathematical library. Coefficients
and argument reductions: Cephes Mathematical Library 2.2, single precision (S. Moshier); `normal`: M. Giles,
"Approximating the erfinv function" (GPU Computing Gems 2, 2012), table 5. Changed from Cephes: `exp` carries the
rounding errors of r and of 1 + r along (Fast2Sum: Dekker 1971), and `erf` keeps the leading 1 of its series apart,
which halves their errors.
"""

from __future__ import annotations

from collections.abc import Sequence

from runtime.program.builder import Value

LOG2_E = 1.44269504088896341
LN2_HIGH = 0.693359375
LN2_LOW = -2.12194440e-4

_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
_ERF = (
    7.853861353153693e-5, -8.010193625184903e-4, 5.188327685732524e-3, -2.685381193529856e-2,
    1.128358514861418e-1, -3.761262582423300e-1, 1.28379165726710e-1,
)  # fmt: skip
_ERFC_BELOW_2 = (
    2.326819970068386e-2, -1.387039388740657e-1, 3.687424674597105e-1, -5.824733027278666e-1, 6.210004621745983e-1,
    -4.944515323274145e-1, 3.404879937665872e-1, -2.741127028184656e-1, 5.638259427386472e-1,
)  # fmt: skip
_ERFC_ABOVE_2 = (
    -1.047766399936249e1, 1.297719955372516e1, -7.495518717768503e0, 2.921019019210786e0,
    -1.015265279202700e0, 4.218463358204948e-1, -2.820767439740514e-1, 5.641895067754075e-1,
)  # fmt: skip
_NORMAL_CENTRE = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
    -0.00125372503, -0.00417768164, 0.246640727, 1.50140941,
)  # fmt: skip
_NORMAL_TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
    -0.0076224613, 0.00943887047, 1.00167406, 2.83297682,
)  # fmt: skip


def polynomial(x: Value, coefficients: Sequence[float]) -> Value:
    """Horner's scheme, highest power first, a multiplication and an addition a step, each rounded."""
    y = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        y = y * x + c
    return y


def absolute(x: Value) -> Value:
    """|x| by clearing the sign bit."""
    return (x.bits() & 0x7FFFFFFF).from_bits()


def with_sign_of(x: Value, sign: Value) -> Value:
    """x >= 0 with the sign bit of `sign`."""
    return (x.bits() | (sign.bits() & -(2**31))).from_bits()


def maximum(a: Value, b: Value | float) -> Value:
    """b where a < b, otherwise a (a NaN in a stays)."""
    return a.builder.select(a < b, b, a)


def minimum(a: Value, b: Value | float) -> Value:
    """b where b < a, otherwise a (a NaN in a stays)."""
    return a.builder.select(a > b, b, a)


def exp(x: Value) -> Value:
    """e^x; 0 below -104, infinity above 89; a fault on NaN."""
    x = minimum(maximum(x, -104.0), 89.0)
    n = (x * LOG2_E).rint("i32")
    high = x - n.float() * LN2_HIGH
    low = n.float() * LN2_LOW
    r = high - low
    one_r = r + 1.0
    lost = ((high - r) - low) + (r - (one_r - 1.0))
    return (one_r + (polynomial(r, _EXP) * (r * r) + lost)).scale(n)


def log(x: Value) -> Value:
    """The natural logarithm; -infinity at 0, NaN below, infinity and NaN stay."""
    select = x.builder.select
    small = x < 2.0**-126
    bits = select(small, x * 2.0**24, x).bits()
    e = (bits >> 23) - select(small, x.builder.literal("i32", 150), 126)
    m = ((bits & 0x7FFFFF) | 0x3F000000).from_bits()
    low = m < 0.707106781186547524
    e = (e - low.cast("i32")).float()
    m = select(low, m + m, m) - 1.0
    z = m * m
    y = polynomial(m, _LOG) * m * z + e * LN2_LOW - z * 0.5
    y = (m + y) + e * LN2_HIGH
    y = select(x.equals(0.0), float("-inf"), select(x < 0.0, float("nan"), y))
    return select(x < float("inf"), y, x)


def tanh(x: Value) -> Value:
    """The hyperbolic tangent; a fault on NaN."""
    a = absolute(x)
    far = 1.0 - 2.0 / (exp(minimum(a, 10.0) * 2.0) + 1.0)
    z = a * a
    near = polynomial(z, _TANH) * z * a + a
    return with_sign_of(x.builder.select(a < 0.625, near, far), x)


def sigmoid(x: Value) -> Value:
    """1 / (1 + e^-x) without overflow; a fault on NaN."""
    e = exp(-absolute(x))
    q = e / (e + 1.0)
    return x.builder.select(x < 0.0, e - e * q, 1.0 - q)


def erf(x: Value) -> Value:
    """The error function; a fault on NaN."""
    a = absolute(x)
    near = polynomial(x * x, _ERF) * x + x
    b = minimum(maximum(a, 1.0), 4.0)
    q = 1.0 / b
    y = q * q
    tail = x.builder.select(b < 2.0, polynomial(y, _ERFC_BELOW_2), polynomial(y, _ERFC_ABOVE_2))
    far = 1.0 - exp(-(b * b)) * q * tail
    return x.builder.select(a < 1.0, near, with_sign_of(far, x))


def normal(x: Value) -> Value:
    """The standard normal quantile of (1 + x) / 2 for x in (-1, 1), at most 5 ulp off: for initial weights only."""
    w = -log((1.0 - x) * (x + 1.0))
    centre = polynomial(w - 2.5, _NORMAL_CENTRE)
    tail = polynomial(maximum(w, 5.0).sqrt() - 3.0, _NORMAL_TAIL)
    return x.builder.select(w < 5.0, centre, tail) * x * 1.4142135623730951
