"""What was covered: the cells of the coverage table, and by input family and kernel the stages that judged."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FAMILIES = "family x kernel"
"""The dimension that is drawn as a table; every other one is a row of cells."""

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
    """Cases of one cell, their shade 0 to 9, the stages that failed, and a bit a stage."""

    cases: int
    shade: int
    failed: list[str]
    bits: list[Bit]


@dataclass(frozen=True)
class HeatMap:
    """Families by kernels; `stages` is empty where the run did not record them."""

    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    stages: list[str]


@dataclass(frozen=True)
class Strip:
    """One dimension of the coverage table: its cells by name, and how many of them were reached."""

    dimension: str
    cells: list[tuple[str, Cell]]
    reached: int


def strips(coverage: dict[str, Any]) -> list[Strip]:
    """The cells of every dimension but families by kernels.

    Args:
        coverage: cases by dimension and cell.
    """
    return [_strip(name, cells) for name, cells in coverage.items() if name != FAMILIES and isinstance(cells, dict)]


def _strip(name: str, counts: dict[str, int]) -> Strip:
    most = max(counts.values(), default=0)
    cells = [(value, Cell(number, _shade(number, most), [], [])) for value, number in counts.items()]
    return Strip(name, cells, sum(number > 0 for number in counts.values()))


def _shade(number: int, most: int) -> int:
    """0 to 9, on a logarithmic scale."""
    return math.ceil(9 * math.log(number + 1) / math.log(most + 1)) if number else 0


def heat_map(coverage: dict[str, Any], of_stages: dict[str, Any], findings: Sequence[dict[str, Any]]) -> HeatMap:
    """The cases by family and kernel.

    Args:
        coverage: cases by dimension and cell; the cells of `FAMILIES` are `family/kernel`.
        of_stages: elements judged by `family/kernel/stage`.
        findings: of the run; those whose Problem can be read mark their cell.
    """
    cases = _by_place(coverage.get(FAMILIES) or {})
    judged = {(*place, stage): n for stage in STAGES for place, n in _by_place(of_stages, stage).items()}
    failed: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        stages = failed.setdefault(_place_of(finding), [])
        stages += [s for s in [str(finding.get("stage", "finding"))] if s not in stages]
    columns = sorted({kernel for _, kernel in cases})
    stages = [stage for stage in STAGES if any(key[2] == stage for key in judged)]
    most, most_judged = max(cases.values(), default=0) or 1, max(judged.values(), default=0)

    def cell(family: str, kernel: str) -> Cell:
        number, wrong = cases.get((family, kernel), 0), failed.get((family, kernel), [])
        bits = [
            Bit(s, _shade(n, most_judged), s in wrong) for s in stages for n in [judged.get((family, kernel, s), 0)]
        ]
        return Cell(number, math.ceil(9 * number / most), wrong, bits if number else [])

    families = sorted({family for family, _ in cases})
    return HeatMap(columns, [(family, [cell(family, each) for each in columns]) for family in families], stages)


def _by_place(counts: dict[str, Any], stage: str = "") -> dict[tuple[str, str], int]:
    """Counts by family and kernel, of the keys that end in a stage, or of all."""
    found = {}
    for key, number in counts.items():
        place, _, last = key.rpartition("/") if stage else (key, "", "")
        family, _, kernel = place.partition("/")
        if last == stage and kernel:
            found[family, kernel] = int(number)
    return found


def _place_of(finding: dict[str, Any]) -> tuple[str, str]:
    """Family and kernel of a finding's Problem; an empty place where it has none."""
    try:
        problem = json.loads(finding["problem"])
        return str(problem["family"]), f"{problem['dtype']} {problem['op']} {problem['strategy']}"
    except (KeyError, TypeError, ValueError):
        return "", ""
