"""The geometry of the report's pictures, from numbers in `result.json`; the template draws them.

Lengths are in units of the picture's view box.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from verify.float8 import NAN_CODE, SIGN, VALUES, code_at

WIDTH = 640
"""Of every picture."""

_CODE = r"(0x[0-9a-f]{2,4}|nan)(?: \(([^)]*)\))?"
_GOT = re.compile(rf"\bgot {_CODE} admissible {_CODE}(?:\.\.{_CODE})?")
_PLACE = re.compile(r"rank (\d+).*?element\[(\d+),(\d+)\] (.*?) got ")
_AROUND = 3
_MOST_TICKS = 24
_LEFT, _RIGHT = 30.0, WIDTH - 30.0


@dataclass(frozen=True)
class Tick:
    """A code, or a value: where it is, what it is, and whether a conforming kernel may return it."""

    x: float
    code: str
    value: str
    admissible: bool
    got: bool


@dataclass(frozen=True)
class NumberLine:
    """The surroundings of one element.

    Attributes:
        kind: `E4M3`, or `16-bit` for a residual or a norm.
        ticks: from left to right.
        band: left and right end of what is admissible.
        label: the same in words.
    """

    kind: str
    ticks: list[Tick]
    band: tuple[float, float]
    label: str


@dataclass(frozen=True)
class Place:
    """Where an element lies, and what went in."""

    rank: str
    row: str
    column: str
    operands: str


def place(message: str) -> Place | None:
    """The element that a finding's message names, if it names one."""
    found = _PLACE.search(message)
    return Place(*found.groups()) if found else None


def number_line(message: str) -> NumberLine | None:
    """What was got and what is admissible, as a finding's message says; None where it says neither."""
    found = _GOT.search(message)
    if found is None:
        return None
    got, low, high = (found[1], found[2]), (found[3], found[4]), (found[5] or found[3], found[6] or found[4])
    label = f"got {_said(got)}, admissible {_said(low)}" + (f" to {_said(high)}" if high != low else "")
    if any(len(code) == 4 for code, _ in (got, low, high)):
        return _of_codes(got[0], low[0], high[0], label)
    return _of_values(got, low, high, label)


def _said(pair: tuple[str, str | None]) -> str:
    return f"{pair[0]} ({pair[1]})" if pair[1] else pair[0]


def ordinal(code: str) -> int | None:
    """The signed index by value of a code such as `0x3f`; None for a NaN."""
    if code == "nan" or int(code, 16) & NAN_CODE == NAN_CODE:
        return None
    number = int(code, 16)
    return -(number & NAN_CODE) if number & SIGN else number


def _of_codes(got: str, low: str, high: str, label: str) -> NumberLine | None:
    """Neighbouring codes at equal distances, so that each step is one code; wide gaps keep only the ends."""
    at, lo, hi = ordinal(got), ordinal(low), ordinal(high)
    marked = [index for index in (at, lo, hi) if index is not None]
    if not marked:
        return None
    first, last = max(min(marked) - _AROUND, -126), min(max(marked) + _AROUND, 126)
    shown = range(first, last + 1) if last - first < _MOST_TICKS else sorted(set(marked))

    def x(index: float) -> float:
        return round(_LEFT + (index - first + 0.5) / (last - first + 1) * (_RIGHT - _LEFT), 1)

    def inside(index: int) -> bool:
        return lo is not None and hi is not None and lo <= index <= hi

    ticks = [Tick(x(i), f"{code_at(i):#04x}", f"{VALUES[code_at(i)]:g}", inside(i), i == at) for i in shown]
    if at is None:
        ticks.append(Tick(WIDTH - 14, got, "nan", admissible=False, got=True))
    band = (x(lo - 0.4), x(hi + 0.4)) if lo is not None and hi is not None else (0.0, 0.0)
    return NumberLine("E4M3", ticks, band, label)


def _of_values(
    got: tuple[str, str | None], low: tuple[str, str | None], high: tuple[str, str | None], label: str
) -> NumberLine | None:
    """Got and the ends of the interval, at true distances."""
    values = [_number(pair[1]) for pair in (got, low, high)]
    if any(not math.isfinite(value) for value in values):
        return None
    at, lo, hi = values
    least, most = min(values), max(values)
    span = (most - least) or abs(most) or 1.0

    def x(value: float) -> float:
        return round(_LEFT + 70 + (value - least) / span * (_RIGHT - _LEFT - 140), 1)

    ticks = [Tick(x(at), got[0], str(got[1]), lo <= at <= hi, got=True)]
    for pair, value in dict.fromkeys(((low, lo), (high, hi))):
        ticks.append(Tick(x(value), pair[0], str(pair[1]), admissible=True, got=False))
    return NumberLine("16-bit", sorted(ticks, key=lambda tick: tick.x), (x(lo) - 4, x(hi) + 4), label)


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


@dataclass(frozen=True)
class Bar:
    """One bar of the histogram; its length is on a logarithmic scale."""

    label: str
    count: int
    share: float
    y: int
    width: float


_BINS = ((0, 0), (1, 1), (2, 2), (3, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 252))


def histogram(differences: dict[str, int]) -> list[Bar]:
    """Bars of how many codes apart fused and unfused are; empty where nothing was compared."""
    total = sum(differences.values())
    counts = []
    for first, last in _BINS:
        inside = sum(n for distance, n in differences.items() if first <= abs(int(distance)) <= last)
        counts.append((f"{first}" if first == last else f"{first} to {last}", inside))
    while counts and not counts[-1][1]:
        counts.pop()
    most = max((math.log10(n + 1) for _, n in counts), default=0.0)
    return [
        Bar(label, n, n / total, 26 * i, round(math.log10(n + 1) / most * 330, 1))
        for i, (label, n) in enumerate(counts)
    ]


@dataclass(frozen=True)
class HeatMap:
    """Counts of cases by input family and hidden size; each cell has its count and its shade, 0 to 9."""

    columns: list[int]
    rows: list[tuple[str, list[tuple[int, int]]]]


def heat_map(coverage: dict[str, Any]) -> HeatMap:
    """The cases by family and hidden size, from keys such as `gaussian/4096`."""
    cells = {}
    for key, number in coverage.items():
        family, _, hidden = key.rpartition("/")
        if hidden.isdigit():
            cells[family, int(hidden)] = int(number)
    columns = sorted({hidden for _, hidden in cells})
    most = max(cells.values(), default=1)

    def cell(family: str, hidden: int) -> tuple[int, int]:
        number = cells.get((family, hidden), 0)
        return number, math.ceil(9 * number / most)

    families = sorted({family for family, _ in cells})
    return HeatMap(columns, [(family, [cell(family, hidden) for hidden in columns]) for family in families])


@dataclass(frozen=True)
class Interval:
    """A task's change of accuracy in percentage points with its bounds and its margin, as places on the line."""

    name: str
    low: float
    estimate: float
    high: float
    margin: float
    zero: float
    label: str


def intervals(tasks: dict[str, Any]) -> list[Interval]:
    """The tasks' intervals on one common line; tasks without an interval are left out."""
    keys = ("low", "change", "high", "margin")
    known = {n: [float(t[k]) for k in keys] for n, t in tasks.items() if all(_finite(t.get(k)) for k in keys)}
    if not known:
        return []
    least = min(min(low, -margin) for low, _, _, margin in known.values())
    most = max(max(high, 0.0) for _, _, high, _ in known.values())
    span = (most - least) or 1.0

    def x(value: float) -> float:
        return round(40 + (value - least) / span * (WIDTH - 80), 1)

    return [
        Interval(
            name, x(low), x(change), x(high), x(-margin), x(0.0),
            f"{100 * change:+.2f} points, {100 * low:+.2f} to {100 * high:+.2f}, margin {-100 * margin:+.2f}",
        )
        for name, (low, change, high, margin) in known.items()
    ]  # fmt: skip


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
