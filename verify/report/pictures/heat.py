"""What was covered: cases by input family and hidden size, and in each the stages that judged something."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

STAGES = ("residual", "norm", "quant", "unfused", "again")
"""Those that judge element by element, in their order."""


@dataclass(frozen=True)
class Bit:
    """One stage in one cell: shade 0 to 9 by the elements judged, on a logarithmic scale, and whether it failed."""

    stage: str
    shade: int
    failed: bool


@dataclass(frozen=True)
class Cell:
    """Cases of one family at one hidden size, their shade 0 to 9, the stages that failed, and a bit a stage."""

    cases: int
    shade: int
    failed: list[str]
    bits: list[Bit]


@dataclass(frozen=True)
class HeatMap:
    """Families by hidden sizes; `stages` is empty where the run did not record them."""

    columns: list[int]
    rows: list[tuple[str, list[Cell]]]
    stages: list[str]


def heat_map(coverage: dict[str, Any], of_stages: dict[str, Any], findings: Sequence[dict[str, Any]]) -> HeatMap:
    """The cases by family and hidden size.

    Args:
        coverage: cases by `family/hidden`.
        of_stages: elements judged by `family/hidden/stage`.
        findings: of the run; those whose Problem can be read mark their cell.
    """
    cases = _by_place(coverage)
    judged = {(*place, stage): n for stage in STAGES for place, n in _by_place(of_stages, stage).items()}
    failed: dict[tuple[str, int], list[str]] = {}
    for finding in findings:
        stages = failed.setdefault(_place_of(finding), [])
        stages += [s for s in [str(finding.get("stage", "finding"))] if s not in stages]
    columns = sorted({hidden for _, hidden in cases})
    stages = [stage for stage in STAGES if any(key[2] == stage for key in judged)]
    most, most_judged = max(cases.values(), default=1), max(judged.values(), default=0)

    def cell(family: str, hidden: int) -> Cell:
        number, wrong = cases.get((family, hidden), 0), failed.get((family, hidden), [])
        bits = [
            Bit(s, math.ceil(9 * math.log(n + 1) / math.log(most_judged + 1)) if n else 0, s in wrong)
            for s in stages
            for n in [judged.get((family, hidden, s), 0)]
        ]
        return Cell(number, math.ceil(9 * number / most), wrong, bits if number else [])

    families = sorted({family for family, _ in cases})
    return HeatMap(columns, [(family, [cell(family, h) for h in columns]) for family in families], stages)


def _by_place(counts: dict[str, Any], stage: str = "") -> dict[tuple[str, int], int]:
    """Counts by family and hidden size, of the keys that end in a stage, or of all."""
    found = {}
    for key, number in counts.items():
        place, _, last = key.rpartition("/") if stage else (key, "", "")
        family, _, hidden = place.rpartition("/")
        if last == stage and hidden.isdigit():
            found[family, int(hidden)] = int(number)
    return found


def _place_of(finding: dict[str, Any]) -> tuple[str, int]:
    """Family and hidden size of a finding's Problem; an empty place where it has none."""
    try:
        problem = json.loads(finding["problem"])
        return str(problem["family"]), int(problem["hidden"])
    except (KeyError, TypeError, ValueError):
        return "", 0
