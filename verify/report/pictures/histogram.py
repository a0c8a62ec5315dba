"""How many codes apart fused and unfused are."""

from __future__ import annotations

import math
from dataclasses import dataclass

_BINS = ((0, 0), (1, 1), (2, 2), (3, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 252))


@dataclass(frozen=True)
class Bar:
    """One bar; `length` is in percent of the longest, on a logarithmic scale."""

    label: str
    count: int
    share: float
    length: float


def histogram(differences: dict[str, int]) -> list[Bar]:
    """Bars from counts of elements by signed distance of their codes; empty where nothing was compared."""
    total = sum(differences.values())
    counts = []
    for first, last in _BINS:
        inside = sum(n for distance, n in differences.items() if first <= abs(int(distance)) <= last)
        counts.append((f"{first}" if first == last else f"{first} to {last}", inside))
    while counts and not counts[-1][1]:
        counts.pop()
    most = max((math.log10(n + 1) for _, n in counts), default=0.0)
    return [Bar(label, n, n / total, round(math.log10(n + 1) / most * 100, 1)) for label, n in counts]
