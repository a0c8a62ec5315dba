"""The surroundings of one element on the line of the codes: what was got, what is admissible, and the enclosure."""

from __future__ import annotations

import bisect
import math
import re
import struct
from dataclasses import dataclass, replace

from fusecheck.formats.element import E4M3

_CODE = r"(0x[0-9a-f]{2,4}|nan)(?: \((?!\d+ elements\))([^)]*)\))?"
_GOT = re.compile(rf"\bgot {_CODE} admissible {_CODE}(?:\.\.{_CODE})?")
_REAL = re.compile(r"\by/scale in \[([^,\]]+), ([^\]]+)\]")
_PLACE = re.compile(r"rank (\d+).*?element\[(\d+),(\d+)\] (.*?) got ")
_AROUND = {8: 2, 16: 1}
"""Neighbours on either side, by the width of the format: the values of the wider one need more room."""

_MOST_TICKS = 16
_PHONE = 3.2
"""Pixels of a percent on the narrowest screen; labels are left out where they would touch there."""

_POSITIVE = E4M3.values[: E4M3.largest_code + 1]


@dataclass(frozen=True)
class Tick:
    """A code: where it is, what it is, whether a conforming kernel may return it; which of it is written there."""

    x: float
    code: str
    value: str
    admissible: bool
    got: bool
    named: bool = True
    valued: bool = True


@dataclass(frozen=True)
class NumberLine:
    """The surroundings of one element.

    Attributes:
        kind: `E4M3`, `bf16`, `fp16`, or `16-bit` where the format is not known.
        ticks: from left to right; each step is one code, unless only the ends of a long way are shown.
        band: left and right end of what is admissible; equal where nothing is.
        real: left and right end of the enclosure of y/scale; None where the message does not say.
        label: the same in words.
        whole: whether every code between the first and the last tick has one.
    """

    kind: str
    ticks: list[Tick]
    band: tuple[float, float]
    real: tuple[float, float] | None
    label: str
    whole: bool = True


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


def got_and_admissible(message: str) -> tuple[str, str] | None:
    """What came back and what may, each with its value, as a finding's message says."""
    found = _GOT.search(message)
    if found is None:
        return None
    low, high = (found[3], found[4]), (found[5] or found[3], found[6] or found[4])
    return _said((found[1], found[2])), _said(low) + (f" to {_said(high)}" if high != low else "")


def number_line(message: str, dtype: str = "") -> NumberLine | None:
    """What was got and what is admissible, as a finding's message says; None where it says neither.

    Args:
        message: of a finding.
        dtype: `bf16` or `fp16`, of the Problem's 16-bit outputs.
    """
    found, said = _GOT.search(message), got_and_admissible(message)
    if found is None or said is None:
        return None
    codes = (found[1], found[3], found[5] or found[3])
    values = (found[2], found[4], found[6] or found[4])
    eight = any(len(code) == 4 for code in codes)
    bits = _Bits(8, "E4M3") if eight else _Bits(16, dtype or "16-bit")
    known = dict(zip(codes, values, strict=True))
    at, low, high = (bits.ordinal(code, known[code]) for code in codes)
    if low is None and high is None and at is None:
        return None
    real = _REAL.search(message) if eight else None
    label = f"got {said[0]}, admissible {said[1]}{_away(at, low, high)}"
    return _line(bits, (at, low, high), codes[0], known, label, real.groups() if real else None)


def _said(pair: tuple[str, str | None]) -> str:
    code, value = pair
    if value is None and len(code) == 4:
        value = f"{E4M3.values[int(code, 16)]:g}"
    return f"{code} ({value})" if value else code


@dataclass(frozen=True)
class _Bits:
    """Codes of a sign-magnitude format in the order of their values; the two zeros are neighbours."""

    width: int
    kind: str

    def ordinal(self, code: str, value: str | None) -> int | None:
        """Signed index, -1 for the negative zero; None for a NaN."""
        if code == "nan" or value == "nan":
            return None
        number, sign = int(code, 16), 1 << (self.width - 1)
        if number & (sign - 1) > self.largest:
            return None
        return -(number & (sign - 1)) - 1 if number & sign else number

    @property
    def largest(self) -> int:
        """The magnitude of the largest finite code, or of the infinity where there is one."""
        return {"E4M3": E4M3.largest_code, "bf16": 0x7F80, "fp16": 0x7C00}.get(self.kind, 0x7FFF)

    def code(self, index: int) -> str:
        """As text; the width of the format tells how many digits."""
        number = index if index >= 0 else (1 << (self.width - 1)) | (-index - 1)
        return f"{number:#0{2 + self.width // 4}x}"

    def value(self, code: str, said: str | None) -> str:
        """What a code stands for, short; empty where the format is not known."""
        number = int(code, 16)
        if self.kind == "bf16":
            return f"{struct.unpack('>f', struct.pack('>I', number << 16))[0]:.4g}"
        if self.kind == "fp16":
            return f"{struct.unpack('>e', struct.pack('>H', number))[0]:.4g}"
        return f"{E4M3.values[number]:.4g}" if self.kind == "E4M3" else said or ""


def _away(at: int | None, low: int | None, high: int | None) -> str:
    """How far outside, in codes."""
    if at is None or low is None or high is None or low <= at <= high:
        return ""
    steps = min(abs(_by_value(at) - _by_value(end)) for end in (low, high))
    return f": {steps:,} code{'' if steps == 1 else 's'} away" if steps else ": the zero of the other sign"


def _by_value(index: int) -> int:
    return index if index >= 0 else index + 1


def _line(
    bits: _Bits,
    marked: tuple[int | None, int | None, int | None],
    got: str,
    known: dict[str, str | None],
    label: str,
    real: tuple[str, ...] | None,
) -> NumberLine:
    at, low, high = marked
    present = sorted({index for index in marked if index is not None})
    around = _AROUND[bits.width]
    # Beyond the largest code nothing is drawn, but the room stays: the label of an end needs it.
    first, last = present[0] - around, present[-1] + around
    whole = last - first < _MOST_TICKS
    if not whole:
        room = (last - first) // 6
        first, last = first - room, last + room
    right = 100.0 if at is not None else 86.0

    def x(index: float) -> float:
        return round((index - first + 0.5) / (last - first + 1) * right, 2)

    every = range(max(first, -bits.largest - 1), min(last, bits.largest) + 1)
    ticks = []
    for index in every if whole else present:
        inside = low is not None and high is not None and low <= index <= high
        code = bits.code(index)
        ticks.append(Tick(x(index), code, bits.value(code, known.get(code)), inside, index == at))
    if at is None:
        ticks.append(Tick(94.0, got, "NaN", admissible=low is None, got=True))
    outside = [abs(at - end) for end in (low, high) if at is not None and end is not None and at != end]
    near = 0.4 if whole else min([0.012 * (last - first + 1), *(0.4 * steps for steps in outside)])
    band = (x(low - near), x(high + near)) if low is not None and high is not None else (0.0, 0.0)
    ends = _real_ends(real, first, last) if real else None
    return NumberLine(bits.kind, _named(ticks), band, ends and (x(ends[0]), x(ends[1])), label, whole)


def _real_ends(real: tuple[str, ...], first: int, last: int) -> tuple[float, float] | None:
    """Where the enclosure of y/scale lies among the codes of E4M3; None where it is no pair of numbers."""
    try:
        low, high = (float(end) for end in real)
    except ValueError:
        return None
    if math.isnan(low) or math.isnan(high):
        return None
    return max(_between(low), first - 0.5), min(_between(high), last + 0.5)


def _between(value: float) -> float:
    """The place of a real number among the ordinals of E4M3; beyond the largest code no farther than half a step."""
    if value < 0:
        return -1 - _between(-value)
    index = bisect.bisect_right(_POSITIVE, value) - 1
    if index >= E4M3.largest_code:
        return E4M3.largest_code + min((value - _POSITIVE[-1]) / 64, 0.5)
    return index + (value - _POSITIVE[index]) / (_POSITIVE[index + 1] - _POSITIVE[index])


def _named(ticks: list[Tick]) -> list[Tick]:
    """Which ticks have their code and value written: those that matter first, then what still has room on a phone."""
    codes = _fitting(ticks, [7.4 * len(tick.code) for tick in ticks])
    values = _fitting(ticks, [6.4 * len(tick.value) for tick in ticks])
    return [replace(t, named=i in codes, valued=i in codes & values) for i, t in enumerate(ticks)]


def _fitting(ticks: list[Tick], widths: list[float]) -> set[int]:
    """The ticks whose text, so many pixels wide, has room beside those that matter more."""
    order = sorted(range(len(ticks)), key=lambda i: (not ticks[i].got, not ticks[i].admissible, i))
    taken: list[tuple[float, float]] = []
    fitting = set()
    for i in order:
        half = widths[i] / 2 / _PHONE
        span = ticks[i].x - half, ticks[i].x + half
        if span[0] >= -1 and span[1] <= 101 and all(span[1] < left or span[0] > right for left, right in taken):
            taken.append(span)
            fitting.add(i)
    return fitting
