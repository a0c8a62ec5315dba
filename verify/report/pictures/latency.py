"""Times over token counts, what fusing the quantiser gains at a site, and a model's step beside what was published."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusecheck.report.pictures.axis import Axis, Mark

HEIGHT = 220.0
"""Of a plot, in pixels, without its labels."""

_LEFT, _RIGHT = 3.0, 97.0


@dataclass(frozen=True)
class Line:
    """One line of a plot: `x` in percent, `y` in pixels; `band` goes there and back around the spread."""

    name: str
    look: str
    dots: list[tuple[float, float]]
    path: str
    band: str


@dataclass(frozen=True)
class Plot:
    """Lines over token counts, with what is written along both axes; `label` says it in words."""

    lines: list[Line]
    across: list[Mark]
    up: list[Mark]
    zero: float | None
    label: str


@dataclass(frozen=True)
class Step:
    """The predicted and the published change of a decode step, with a bar each in percent of the common line."""

    concurrency: int
    sites: int
    gain: float
    predicted: float
    published: float | None
    zero: float
    bars: list[tuple[str, float, float]]


def gains(timings: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Microseconds that fusing the quantiser saves by token count: the best separate path less the best fused one."""
    found = {}
    for tokens in sorted({int(t["tokens"]) for t in timings}):
        here = {str(t["path"]): float(t["median_us"]) for t in timings if int(t["tokens"]) == tokens}
        fused = [time for path, time in here.items() if path.startswith("fused ")]
        separate = [time for path, time in here.items() if path.startswith("norm ")]
        if fused and separate:
            found[tokens] = min(separate) - min(fused)
    return found


def times(timings: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Microseconds per call by token count, both logarithmic, a line a path; None where nothing was timed."""
    spreads = [t.get("spread_us") or [t["median_us"]] * 2 for t in timings]
    ends = [float(end) for spread in spreads for end in spread] + [float(t["median_us"]) for t in timings]
    if not ends or min(ends) <= 0:
        return None
    across = _tokens([int(t["tokens"]) for t in timings])
    up = Axis(min(ends) / 1.1, max(ends) * 1.1, HEIGHT, 0.0, logarithmic=True)
    lines = []
    for path in dict.fromkeys(str(t["path"]) for t in timings):
        mine = sorted((t for t in timings if t["path"] == path), key=lambda t: int(t["tokens"]))
        dots = [(across(int(t["tokens"])), up(float(t["median_us"]))) for t in mine]
        spread = [t.get("spread_us") or [t["median_us"]] * 2 for t in mine]
        there = [(x, up(float(s[1]))) for (x, _), s in zip(dots, spread, strict=True)]
        back = [(x, up(float(s[0]))) for (x, _), s in zip(dots, spread, strict=True)]
        lines.append(Line(path, _look(path), dots, _points(dots), _points(there + back[::-1])))
    label = "Microseconds per call by tokens, both axes logarithmic: " + "; ".join(
        _ends(timings, n.name) for n in lines
    )
    return Plot(lines, _token_marks(timings, across), up.marks(), None, label)


def gain_plot(timings: Sequence[Mapping[str, Any]]) -> Plot | None:
    """What fusing the quantiser saves at a site by token count; below zero it costs. None without both paths."""
    found = gains(timings)
    if not found:
        return None
    least, most = min(0.0, *found.values()), max(0.0, *found.values())
    room = 0.12 * (most - least) or 1.0
    across, up = _tokens(list(found)), Axis(least - room, most + room, HEIGHT, 0.0)
    dots = [(across(tokens), up(gain)) for tokens, gain in found.items()]
    label = "Microseconds saved at a site by tokens: " + ", ".join(f"{gain:+.2f} at {t}" for t, gain in found.items())
    line = Line("gain", "fused-one", dots, _points(dots), "")
    kept = [{"tokens": tokens} for tokens in found]
    return Plot([line], _token_marks(kept, across), up.marks(), up(0.0), label)


def steps(rows: Sequence[Mapping[str, Any]]) -> list[Step]:
    """The change of a decode step at each concurrency, all on one line with zero in it."""
    known = [v for row in rows for v in (row["predicted_ms"], row.get("published_ms")) if v is not None]
    if not known or not any(known):
        return []
    x = Axis(min(0.0, *known), max(0.0, *known))
    return [
        Step(
            int(row["concurrency"]), int(row["sites"]), float(row["gain_us"]), float(row["predicted_ms"]),
            row.get("published_ms"), x(0.0),
            [
                (who, min(x(0.0), x(float(v))), abs(x(float(v)) - x(0.0)))
                for who, v in (("predicted", row["predicted_ms"]), ("published", row.get("published_ms")))
                if v is not None
            ],
        )
        for row in rows
    ]  # fmt: skip


def _tokens(counts: Sequence[int]) -> Axis:
    low, high = min(counts), max(counts)
    return Axis(low, high if high > low else 2 * low, _LEFT, _RIGHT, logarithmic=True)


def _token_marks(timings: Sequence[Mapping[str, Any]], across: Axis) -> list[Mark]:
    """The measured token counts, less those whose text would touch the one before."""
    marks: list[Mark] = []
    for tokens in sorted({int(t["tokens"]) for t in timings}):
        if not marks or across(tokens) - marks[-1].at >= 2.6 * len(str(tokens)):
            marks.append(Mark(across(tokens), str(tokens)))
    return marks


def _look(path: str) -> str:
    """The style of a line: colour and dashes by what is fused, its dots by the strategy."""
    way = "fused" if path.startswith("fused ") else "norm" if path.startswith("norm ") else "unfused"
    return f"{way}-{'two' if 'twoshot' in path else 'one'}"


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


def _ends(timings: Sequence[Mapping[str, Any]], path: str) -> str:
    mine = sorted((int(t["tokens"]), float(t["median_us"])) for t in timings if t["path"] == path)
    return f"{path} {mine[0][1]:.4g} at {mine[0][0]} to {mine[-1][1]:.4g} at {mine[-1][0]}"


def largest_gain(timings: Sequence[Mapping[str, Any]]) -> tuple[int, float, int, float] | None:
    """Token count and gain where fusing pays least, then where most; None without both paths."""
    found = {tokens: gain for tokens, gain in gains(timings).items() if math.isfinite(gain)}
    if not found:
        return None
    least, most = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
    return least, found[least], most, found[most]
