"""Scales: where a number lies on an axis, and which numbers to write beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Mark:
    """A number written beside an axis: where, as what, and whether it is the zero that others are compared with."""

    at: float
    label: str
    zero: bool = False


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high`, drawn from `start` to `stop`.

    Attributes:
        low: the number drawn at `start`.
        high: the number drawn at `stop`; greater than `low`.
        start: in percent or pixels.
        stop: the same.
        logarithmic: whether equal ratios lie equally far apart; needs `low` above 0.
    """

    low: float
    high: float
    start: float = 0.0
    stop: float = 100.0
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Where a number lies."""
        low, high, value = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.stop - self.start), 2)

    def marks(self) -> list[Mark]:
        """Round numbers along the scale: some five of them, or 1, 2 and 5 of each decade."""
        if self.logarithmic:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            numbers = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
        else:
            step = _round_step((self.high - self.low) / 6)
            numbers = [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        inside = [n for n in numbers if self.low <= n <= self.high]
        return [Mark(self(n), f"{n:g}", zero=n == 0) for n in inside]


def _round_step(rough: float) -> float:
    """The least of 1, 2 or 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= rough)
