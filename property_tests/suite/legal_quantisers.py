"""Random quantisers that keep a declared flow, in numpy: what every sound bound of a scale or a code must contain.

Each last bit that a flow leaves open is drawn anew for every element. It imports nothing of the verifier but the
declaration, so that it can refute it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusecheck.property_tests.suite.rational_quantisers import Spec
from fusecheck.quantflow import QuantFlow

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]
Generator = np.random.Generator

TOP = {"e4m3": 448.0, "e2m1": 6.0}
_LEAST_NORMAL = np.float32(2.0**-126)


@dataclass(frozen=True)
class Quantised:
    """What one kernel made of groups.

    Attributes:
        scales: [groups, 1]: float32 values, or bytes, as float64.
        values: what the cast read, [groups, size], float32.
        ordinals: the signed index of each code, [groups, size].
    """

    scales: Doubles
    values: Floats
    ordinals: Codes


def _nudged(x: Floats, ulps: int, rng: Generator) -> Floats:
    """Every number moved by up to so many units in the last place; zeros and infinities stay."""
    steps = rng.integers(-ulps, ulps + 1, x.shape, dtype=np.int32) * ((x != 0) & np.isfinite(x))
    moved: Floats = (np.ascontiguousarray(x).view(np.int32) + steps).view(np.float32)
    return np.where(np.isfinite(moved), moved, x)


def _is_power(x: Floats) -> npt.NDArray[np.bool_]:
    mantissa, _ = np.frexp(x)
    found: npt.NDArray[np.bool_] = np.abs(mantissa) == 0.5
    return found


def _divided(x: Floats, y: Floats, flow: QuantFlow, rule: str, rng: Generator) -> Floats:
    """X over y: correctly rounded, or within 2 ulp of that."""
    exact: Floats = x / y
    if rule != "approx":
        return exact
    moved = _nudged(exact, 2, rng)
    return np.where(_is_power(y), exact, moved) if flow.exact_pow2 else moved


def _inverse(x: Floats, flow: QuantFlow, rng: Generator) -> Floats:
    """An approximate reciprocal, within 1 ulp of the correctly rounded one."""
    exact: Floats = np.float32(1) / x
    moved = _nudged(exact, 1, rng)
    return np.where(_is_power(x), exact, moved) if flow.exact_pow2 else moved


def _flushed(x: Floats, flow: QuantFlow) -> Floats:
    return np.where(np.abs(x) < _LEAST_NORMAL, np.float32(0), x) if flow.flush else x


def _rounded(x: Doubles, precision: int, emin: int) -> Doubles:
    """One rounding, ties to even, exponents unbounded above."""
    _, e = np.frexp(x)
    quantum = np.ldexp(1.0, np.maximum(e - 1, emin) - precision + 1)
    rounded: Doubles = np.rint(x / quantum) * quantum
    return rounded


def ordinals(x: Floats, element: str, ties: str = "even") -> Codes:
    """The signed index of the saturating cast of each number."""
    wide = x.astype(np.float64)
    if element == "e2m1":
        middles = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
        left, right = (np.searchsorted(middles, np.abs(wide), side) for side in ("left", "right"))
        below = np.where(left % 2 == 1, right, left) if ties == "even" else (right if ties == "away" else left)
        return (np.sign(wide) * below).astype(np.int64)
    value = np.abs(np.clip(_rounded(wide, 4, -6), -448, 448))
    mantissa, e = np.frexp(value)
    index = np.where(value >= 2.0**-6, (e + 6) * 8 + np.rint(mantissa * 16) - 8, value * 512)
    return (np.sign(wide) * index).astype(np.int64)


def _e4m3_value(code: Codes) -> Floats:
    wide: Doubles = np.where(code >= 8, (8 + code % 8) * np.ldexp(1.0, code // 8 - 10), code * 2.0**-9)
    return wide.astype(np.float32)


def _power(byte: Codes) -> Floats:
    power: Floats = np.ldexp(np.float32(1), byte - 127).astype(np.float32)
    return power


def _bits(x: Floats) -> Codes:
    return np.ascontiguousarray(x).view(np.int32).astype(np.int64)


def _quotient(a: Floats, top: float, flow: QuantFlow, rng: Generator) -> Floats:
    limit = np.full_like(a, top)
    if flow.scale_rule not in ("multiply", "rcp"):
        return _divided(a, limit, flow, flow.scale_rule, rng)
    inverse: Floats = np.float32(1) / limit
    product: Floats = a * (_nudged(inverse, 1, rng) if flow.scale_rule == "rcp" else inverse)
    return product


def _byte(t: Floats, a: Floats, element: str, flow: QuantFlow, rng: Generator) -> Codes:
    """The exponent of a power of two, by bits or by a logarithm, as kernels find it."""
    offset = {"e4m3": 8, "e2m1": 2}[element]
    if flow.scale_rule == "log2":
        with np.errstate(divide="ignore"):
            logarithm = _nudged(np.log2(t.astype(np.float64)).astype(np.float32), 1, rng)
        return np.ceil(np.where(t > 0, logarithm, -127)).astype(np.int64) + 127
    byte: Codes
    if flow.pow2 == "rceil":
        up = np.where(_bits(t) <= 1 << 22, 0, 1)
        byte = (_bits(t) >> 23) + ((_bits(t) & 0x7FFFFF) != 0) * up
    elif flow.pow2 == "ceil":
        byte = (_bits(a) >> 23) + ((_bits(a) & 0x7FFFFF) != 0) - offset
    else:
        half = {"e4m3": 1 << 19, "e2m1": 1 << 21}[element] if flow.pow2 == "even" else 0
        byte = ((_bits(a) + half) >> 23) - offset
    return byte


def _scales(a: Floats, spec: Spec, flow: QuantFlow, given: np.float32, rng: Generator) -> Doubles:
    a = np.maximum(a, np.float32(flow.least)) if flow.least_at == "amax" else a
    t = _flushed(_quotient(a, TOP[spec.element], flow, rng), flow)
    if spec.stored == "e4m3":
        product: Floats = np.divide(t, given) if flow.given == "divides" else np.multiply(t, given)
        value = _flushed(product, flow)
        return ordinals(np.maximum(value, np.float32(flow.least)), "e4m3").astype(np.float64)
    t = np.maximum(t, np.float32(flow.least)) if flow.least_at == "scale" else t
    t = np.where(a == 0, np.float32(1), t) if flow.zero_group == "one" else t
    if flow.pow2 == "no":
        return t.astype(np.float64)
    byte = np.maximum(_byte(t, a, spec.element, flow, rng), 0)
    if spec.stored == "ue8m0":
        return byte.astype(np.float64)
    s = _power(byte)
    return (np.maximum(s, np.float32(flow.least)) if flow.least_at == "after" else s).astype(np.float64)


def _values(y: Floats, s: Doubles, a: Floats, spec: Spec, flow: QuantFlow, given: np.float32, rng: Generator) -> Floats:
    """What the cast reads."""
    if flow.codes_from == "amax":
        a = np.maximum(a, np.float32(flow.least))
        factor = _divided(np.full_like(a, TOP[spec.element]), a, flow, flow.code_rule, rng)
        return y * np.where((a > 1 / _LEAST_NORMAL) & (flow.code_rule == "approx"), np.float32(0), factor)
    if spec.stored == "fp32":
        return _by(y, s.astype(np.float32), flow, rng)
    code = s.astype(np.int64)
    if spec.stored == "ue8m0":
        scaled = _by(y, _power(code), flow, rng)
        dead = (code == 0) | (code == flow.scale_top)
        return np.where(dead, np.float32(0), scaled) if flow.zero_group == "byte0" else scaled
    scale = _e4m3_value(code)
    if flow.given == "divides":
        return _by(y, scale * given, flow, rng)
    safe = np.where(scale == 0, np.float32(1), scale)
    g = np.full_like(safe, given)
    if flow.code_rule == "rcp":
        factor = _inverse(safe * _inverse(g, flow, rng), flow, rng)
    else:
        factor = _divided(g, safe, flow, flow.code_rule, rng)
    return y * np.where(scale == 0, np.float32(0), factor)


def _by(y: Floats, s: Floats, flow: QuantFlow, rng: Generator) -> Floats:
    rules = ("approx", "reciprocal", "rcp", "divide") if flow.code_rule == "either" else (flow.code_rule,)
    rule = str(rng.choice(rules))
    if rule in ("divide", "approx"):
        return _divided(y, np.broadcast_to(s, y.shape), flow, rule, rng)
    return y * (_inverse(s, flow, rng) if rule == "rcp" else np.float32(1) / s)


def run(norm: Floats, spec: Spec, flow: QuantFlow, given: float, rng: Generator) -> Quantised:
    """Quantise groups, [groups, size] float32, by a random kernel that keeps the flow."""
    factor = np.float32(given)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        y = _flushed(norm, flow)
        a = np.abs(y).max(1, keepdims=True)
        s = np.full((len(y), 1), given) if flow.scale_rule == "given" else _scales(a, spec, flow, factor, rng)
        z = _values(y, s, a, spec, flow, factor, rng)
    limit = {"nan": np.nan, "+max": np.inf, "-max": -np.inf}[flow.code_of_nan]
    return Quantised(s, z, ordinals(np.where(np.isnan(z), np.float32(limit), z), spec.element, flow.ties))
