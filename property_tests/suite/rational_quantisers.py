"""The second oracle's quantisers, in exact rationals: what scale a group may have, and what codes go with it.

Written from the rules of the declaration alone (a = amax, L = the element's largest value, u = 2^-24). It shares no
code with `fusecheck.quantisers` or `fusecheck.formats`. Infinities and NaN are outside its scope.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from fusecheck.property_tests.suite.rational_numbers import FP32, half_ulp, nearest
from fusecheck.quantflow import QuantFlow

U = Fraction(1, 1 << 24)
LEAST_NORMAL = Fraction(1, 1 << 126)
Pair = tuple[Fraction, Fraction]


def _values(mantissa: int, exponents: int, bias: int, unused: int) -> list[Fraction]:
    """The non-negative values of a small format in order: subnormals, normals, without the last `unused` codes."""
    steps = 1 << mantissa
    tiny = [Fraction(m, steps) * Fraction(2) ** (1 - bias) for m in range(steps)]
    binades = [Fraction(2) ** (e - bias) for e in range(1, 1 << exponents)]
    rest = [(1 + Fraction(m, steps)) * binade for binade in binades for m in range(steps)]
    return [*tiny, *rest[: len(rest) - unused]]


ELEMENTS = {"e4m3": _values(3, 4, 7, 1), "e2m1": _values(1, 2, 1, 0)}
"""The magnitudes of each element, by code."""
OFFSET = {"e4m3": 8, "e2m1": 2}
"""The exponent of the largest value."""
MANTISSA = {"e4m3": 3, "e2m1": 1}


_MIDDLES = {name: [(a + b) / 2 for a, b in pairwise(table)] for name, table in ELEMENTS.items()}


def ordinal(x: Fraction, element: str, ties: str = "even") -> int:
    """The signed index of the saturating cast."""
    middles, magnitude = _MIDDLES[element], abs(x)
    code = bisect_left(middles, magnitude)  # the code below the first middle that is not below |x|
    tie = code < len(middles) and middles[code] == magnitude
    if tie and {"even": code % 2 == 1, "away": True, "toward_zero": False}[ties]:
        code += 1
    return code if x > 0 else -code


@dataclass(frozen=True)
class Spec:
    """A quantiser: its element, and how scales are stored (`fp32`, `ue8m0` or `e4m3`)."""

    element: str
    stored: str

    @property
    def top(self) -> Fraction:
        """The largest value of the element."""
        return ELEMENTS[self.element][-1]


def _flushed(x: Fraction, flow: QuantFlow) -> Fraction:
    return Fraction(0) if flow.flush and abs(x) < LEAST_NORMAL else x


def _is_power(x: Fraction) -> bool:
    return abs(x.numerator * x.denominator).bit_count() == 1 and 1 in (abs(x.numerator), x.denominator)


def _near(x: Fraction, flow: QuantFlow) -> list[Fraction]:
    """Float32 values within one unit in the last place of fl(x); fl(x) alone where it is declared exact."""
    middle = nearest(x, FP32)
    if flow.exact_pow2 and _is_power(x):
        return [middle]
    unit = 2 * half_ulp(middle, FP32)
    return [nearest(middle - unit, FP32), middle, nearest(middle + unit, FP32)]


def _round(x: Fraction) -> Fraction:
    return nearest(x, FP32)


def quotients(a: Fraction, spec: Spec, flow: QuantFlow) -> Pair:
    """The ends of a over L by the declared rule, float32 values."""
    rule = flow.scale_rule
    if rule in ("multiply", "rcp"):
        factors = _near(1 / spec.top, flow) if rule == "rcp" else [_round(1 / spec.top)]
        return _round(a * min(factors)), _round(a * max(factors))
    slack = {"divide": Fraction(0), "approx": 5 * U, "log2": Fraction(1, 1 << 16)}[rule]
    return _round(a / spec.top * (1 - slack)), _round(a / spec.top * (1 + slack))


def _floor_log2(x: Fraction) -> int:
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if Fraction(2) ** e <= x else e - 1


def _ceil_log2(x: Fraction) -> int:
    e = _floor_log2(x)
    return e if Fraction(2) ** e == x else e + 1


def _exponent(q: Fraction, a: Fraction, spec: Spec, flow: QuantFlow) -> int:
    """The unbounded exponent of a positive quotient's power of two."""
    if flow.pow2 == "rceil":
        return _ceil_log2(q)
    if flow.pow2 == "ceil":
        return _ceil_log2(a) - OFFSET[spec.element]
    if flow.pow2 == "even":
        e = _floor_log2(a)
        half = Fraction(2) ** (e - MANTISSA[spec.element] - 1)
        a += half
    return _floor_log2(a) - OFFSET[spec.element]


def _stored(q: Fraction, a: Fraction, spec: Spec, flow: QuantFlow, given: Fraction) -> Fraction:
    q = _flushed(q, flow)
    if spec.stored == "e4m3":
        value = _round(q / given if flow.given == "divides" else q * given)
        return Fraction(ordinal(max(_flushed(value, flow), Fraction(flow.least)), "e4m3"))
    if flow.least_at == "scale":
        q = max(q, Fraction(flow.least))
    if a == 0 and flow.zero_group == "one":
        q = Fraction(1)
    if flow.pow2 == "no":
        return q
    byte = max(_exponent(q, a, spec, flow) + 127, 0) if q > 0 and (a > 0 or flow.pow2 == "rceil") else 0
    if spec.stored == "ue8m0":
        return Fraction(byte)
    power = Fraction(2) ** (byte - 127)
    return max(power, Fraction(flow.least)) if flow.least_at == "after" else power


def amax_of(group: list[Fraction], flow: QuantFlow) -> Fraction:
    """The amax as the quotient reads it."""
    a = _flushed(max(abs(y) for y in group), flow)
    return max(a, Fraction(flow.least)) if flow.least_at == "amax" else a


def scale_ends(group: list[Fraction], spec: Spec, flow: QuantFlow, given: Fraction) -> Pair:
    """The least and greatest scale of a group as stored: a float32 value, or a byte."""
    a = amax_of(group, flow)
    low, high = quotients(a, spec, flow)
    return _stored(low, a, spec, flow, given), _stored(high, a, spec, flow, given)


def _scale_value(stored: Fraction, spec: Spec) -> Fraction:
    if spec.stored == "fp32":
        return stored
    return Fraction(2) ** int(stored - 127) if spec.stored == "ue8m0" else ELEMENTS["e4m3"][int(stored)]


def _slack(divisor: Fraction, flow: QuantFlow) -> Fraction:
    """The relative error of a division beyond its rounding."""
    approximate = flow.code_rule in ("approx", "either") and not (flow.exact_pow2 and _is_power(divisor))
    return 5 * U if approximate else Fraction(0)


def _by_division(y: Fraction, s: Fraction, slack: Fraction) -> list[Fraction]:
    return [_round(y / s * (1 - slack)), _round(y / s * (1 + slack))]


def _by_factor(y: Fraction, factors: list[Fraction]) -> list[Fraction]:
    return [_round(y * factor) for factor in factors]


def _nested(s: Fraction, given: Fraction, flow: QuantFlow) -> list[Fraction]:
    return [o for inverse in _near(1 / given, flow) for o in _near(1 / _round(s * inverse), flow)]


def quotient_ends(
    y: Fraction, stored: Fraction, spec: Spec, flow: QuantFlow, given: Fraction, a: Fraction | None = None
) -> Pair:
    """What the cast may read for one element, given the scale as stored (or the amax, where codes come from that)."""
    y, s = _flushed(y, flow), _scale_value(stored, spec)
    if a is not None and flow.codes_from == "amax":
        lost = flow.code_rule == "approx" and a > 1 / LEAST_NORMAL
        reach = [Fraction(0)] if lost else _by_factor(y, _by_division(spec.top, a, _slack(a, flow)))
    elif flow.zero_group == "byte0" and stored in (0, flow.scale_top):
        reach = [Fraction(0)]
    elif spec.stored == "e4m3" and flow.given == "multiplies":
        if s == 0:
            reach = [Fraction(0)]
        elif flow.code_rule == "rcp":
            reach = _by_factor(y, _nested(s, given, flow))
        else:
            reach = _by_factor(y, _by_division(given, s, _slack(s, flow)))
    else:
        reach = _plain(y, _flushed(_round(s * given) if flow.given == "divides" else s, flow), flow)
    return min(reach), max(reach)


def _plain(y: Fraction, s: Fraction, flow: QuantFlow) -> list[Fraction]:
    if flow.code_rule in ("divide", "approx", "either"):
        return _by_division(y, s, _slack(s, flow))
    factors = _near(1 / s, flow) if flow.code_rule == "rcp" else [_round(1 / s)]
    return _by_factor(y, factors)
