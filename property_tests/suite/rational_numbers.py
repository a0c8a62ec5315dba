"""Exact numbers for the rational oracle: fractions, square roots of fractions, and their rounding to a format.

A `Root` is a sign and the exact square of a magnitude, so that what lies behind a reciprocal root can be
compared and rounded with integer square roots only: nothing here is ever approximate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import total_ordering


@dataclass(frozen=True)
class Grid:
    """A binary format: significand bits, and the exponent of its least normal number."""

    precision: int
    emin: int


BF16 = Grid(8, -126)
FP16 = Grid(11, -14)
FP32 = Grid(24, -126)


@total_ordering
@dataclass(frozen=True, eq=False)
class Root:
    """The real number sign * sqrt(square)."""

    sign: int
    square: Fraction

    @classmethod
    def of(cls, x: Fraction | Root) -> Root:
        """A rational as a root; a root as it is."""
        return x if isinstance(x, Root) else cls((x > 0) - (x < 0), x * x)

    def times(self, factor: Fraction) -> Root:
        """The product with a rational."""
        sign = self.sign * ((factor > 0) - (factor < 0))
        return Root(sign, self.square * factor * factor)

    def _key(self) -> Fraction:
        return self.sign * self.square

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Root | Fraction) and self._key() == Root.of(other)._key()

    def __lt__(self, other: Root | Fraction) -> bool:
        return self._key() < Root.of(other)._key()

    def __hash__(self) -> int:
        return hash(self._key())


Real = Fraction | Root
Ends = tuple[Real, Real]


def _exponent(square: Fraction) -> int:
    """The e with 2^e <= sqrt(square) < 2^(e+1), for a positive square."""
    e = (square.numerator.bit_length() - square.denominator.bit_length()) // 2
    while Fraction(4) ** e > square:
        e -= 1
    while Fraction(4) ** (e + 1) <= square:
        e += 1
    return e


def _truncated(root: Root, grid: Grid) -> tuple[Fraction, Fraction, int]:
    """The spacing of the format at a root, the root's square in units of it, and the whole units in the root."""
    exponent = _exponent(root.square) if root.sign else grid.emin
    quantum = Fraction(2) ** (max(exponent, grid.emin) - grid.precision + 1)
    scaled = root.square / (quantum * quantum)
    return quantum, scaled, math.isqrt(scaled.numerator // scaled.denominator)


def nearest(x: Real, grid: Grid) -> Fraction:
    """Round once to a format, ties to even; no overflow."""
    root = Root.of(x)
    quantum, scaled, below = _truncated(root, grid)
    middle = (Fraction(2 * below + 1) / 2) ** 2
    up = scaled > middle or (scaled == middle and below % 2 == 1)
    return root.sign * (below + up) * quantum


def toward_zero(x: Real, grid: Grid) -> Fraction:
    """Round once to a format, toward zero."""
    root = Root.of(x)
    quantum, _, below = _truncated(root, grid)
    return root.sign * below * quantum


def half_ulp(x: Fraction, grid: Grid) -> Fraction:
    """Half the spacing of the format in the binade that holds |x|."""
    exponent = _exponent(x * x) if x else grid.emin
    return Fraction(2) ** (max(exponent, grid.emin) - grid.precision)


def last_place(x: Fraction) -> Fraction:
    """The weight of the last set bit of a dyadic rational that is not zero."""
    numerator = abs(x.numerator)
    return Fraction(numerator & -numerator, x.denominator)


_CODES = [Fraction(m, 512) for m in range(8)] + [
    Fraction(8 + m) * Fraction(2) ** (e - 10) for e in range(1, 16) for m in range(8)
][:-1]


def ordinal(x: Real) -> int:
    """The signed index, by value, of the saturating E4M3 cast of a real number: one rounding, ties to even."""
    root = Root.of(x)
    low, high = 0, len(_CODES) - 1
    while low < high:  # the least code whose upper turning point is not below |x|
        middle = (low + high) // 2
        turn = (_CODES[middle] + _CODES[middle + 1]) / 2
        if root.square < turn * turn or (root.square == turn * turn and middle % 2 == 0):
            high = middle
        else:
            low = middle + 1
    return root.sign * low


def preimage(t: Fraction, grid: Grid) -> tuple[Fraction, Fraction]:
    """The ends of what rounds to t, a value of the format; below a power of two the spacing is half as wide."""
    outward = half_ulp(t, grid)
    inward = outward / 2 if abs(t) > Fraction(2) ** grid.emin and last_place(t) == abs(t) else outward
    return (t - outward, t + inward) if t < 0 else (t - inward, t + outward)
