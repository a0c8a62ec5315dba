"""What a run reached of the coverage table: cells asked for, reached, refused, and those still missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fusecheck.kernel.table import Cell

NAMED = 40
"""Cells that a record names one by one, where something was not reached."""


@dataclass
class Coverage:
    """The cells of one kernel at one world size.

    Attributes:
        wanted: what its core plan reaches when every case of it runs.
        reached: cases run, by cell; also of cells that no core plan asks for.
        refused: the cells of cases that the kernel refused.
        cases: of the core plan.
        done: of those, how many were run or refused.
        turned_away: of those, how many were refused.
    """

    wanted: set[Cell] = field(default_factory=set)
    reached: Counter[Cell] = field(default_factory=Counter)
    refused: set[Cell] = field(default_factory=set)
    cases: int = 0
    done: int = 0
    turned_away: int = 0

    @property
    def lost(self) -> set[Cell]:
        """Cells that no case reached, since the kernel refused each that would have."""
        return (self.wanted & self.refused) - self.reached.keys()

    @property
    def missing(self) -> set[Cell]:
        """Cells that were not come to."""
        return self.wanted - self.reached.keys() - self.refused

    @property
    def finished(self) -> bool:
        """Whether every case of the core plan was run or refused."""
        return self.done >= self.cases

    @property
    def mostly_refused(self) -> bool:
        """Whether more of the cases, or of the cells, were refused than run."""
        return 2 * self.turned_away > self.cases or 2 * len(self.lost) > len(self.wanted)


def counts(coverages: Iterable[Coverage]) -> dict[str, dict[str, int]]:
    """Cases by dimension and value over several kernels, 0 where a cell was asked for and not reached."""
    total: Counter[Cell] = Counter()
    for coverage in coverages:
        total.update(dict.fromkeys(coverage.wanted, 0))
        total.update(coverage.reached)
    found: dict[str, dict[str, int]] = {}
    for (dimension, value), number in sorted(total.items(), key=lambda item: _order(item[0])):
        found.setdefault(dimension, {})[value] = number
    return found


def core_record(coverages: Iterable[Coverage]) -> dict[str, Any]:
    """The core plan's figures for a record."""
    every = list(coverages)
    lost = sorted({cell for coverage in every for cell in coverage.lost}, key=_order)
    missing = sorted({cell for coverage in every for cell in coverage.missing}, key=_order)
    return {
        "cases": sum(coverage.cases for coverage in every),
        "done": sum(coverage.done for coverage in every),
        "cells": sum(len(coverage.wanted) for coverage in every),
        "reached": sum(len(coverage.wanted & coverage.reached.keys()) for coverage in every),
        "refused": sum(len(coverage.lost) for coverage in every),
        "refused_cells": [": ".join(cell) for cell in lost[:NAMED]],
        "missing_cells": [": ".join(cell) for cell in missing[:NAMED]],
    }


def _order(cell: Cell) -> tuple[str, bool, int, str]:
    """Numbers by size, before words."""
    dimension, value = cell
    first = value.split()[0]
    return dimension, not first.isdigit(), int(first) if first.isdigit() else 0, value
