"""The change of accuracy with its bounds, against the margin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fusecheck.report.pictures.axis import Axis


@dataclass(frozen=True)
class Interval:
    """A task's change of accuracy in percentage points with its bounds and its margin, as places on the line."""

    name: str
    verdict: str
    low: float
    estimate: float
    high: float
    margin: float
    zero: float
    margin_label: str
    label: str


def intervals(tasks: dict[str, Any]) -> list[Interval]:
    """The tasks' intervals on one common line; tasks without an interval are left out."""
    keys = ("low", "change", "high", "margin")
    known = {n: [float(t[k]) for k in keys] for n, t in tasks.items() if all(_finite(t.get(k)) for k in keys)}
    if not known:
        return []
    least = min(min(low, -margin) for low, _, _, margin in known.values())
    most = max(max(high, 0.0) for _, _, high, _ in known.values())
    room = 0.06 * (most - least) or 1.0
    x = Axis(least - room, most + room)
    return [
        Interval(
            name, str(tasks[name].get("verdict", "inconclusive")),
            x(low), x(change), x(high), x(-margin), x(0.0),
            f"margin {-100 * margin:+.2f}",
            f"{100 * change:+.2f} points, {100 * low:+.2f} to {100 * high:+.2f}, margin {-100 * margin:+.2f}",
        )
        for name, (low, change, high, margin) in known.items()
    ]  # fmt: skip


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
