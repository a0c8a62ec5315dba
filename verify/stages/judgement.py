"""What every stage has in common: its name, how its elements are judged, and the tally that it ends in.

Elements equal to the nominal are inside by construction; the ends are computed for the others only. Every comparison
asks "is inside": NaN is never inside.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fusecheck.numerics.enclosure import Interval
from fusecheck.stages.operands import Where

SHOWN = 3
"""Elements that a stage describes; all are counted."""


class Stage(str, Enum):
    """What is judged, in this order; the first stage that fails names the culprit."""

    ALIVE = "alive"
    AGREE = "ranks agree"
    EXPERTS = "experts"
    RESIDUAL = "residual"
    NORM = "norm"
    SCALE = "scale"
    QUANT = "quant"
    CODE = "code"
    LAYOUT = "layout"
    SPECIAL = "special"
    UNFUSED = "unfused"
    AGAIN = "again"
    PROPERTY = "property"


@dataclass(frozen=True)
class Element:
    """One element outside its enclosure; or, in row -1, what is wrong with a whole output or operand."""

    row: int
    column: int
    got: str
    admissible: str
    context: str


def whole(got: str, expected: str) -> Element:
    """What is wrong with a whole output or operand."""
    return Element(-1, -1, got, expected, "")


@dataclass
class Tally:
    """How many elements a stage saw, how many were not the nominal, and how many lay outside."""

    stage: Stage
    elements: int = 0
    off_nominal: int = 0
    outside: int = 0
    shown: list[Element] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Merge another tally of the same stage."""
        self.elements += other.elements
        self.off_nominal += other.off_nominal
        self.outside += other.outside
        self.shown = (self.shown + other.shown)[:SHOWN]

    def to_record(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {
            "stage": self.stage.value,
            "elements": self.elements,
            "off_nominal": self.off_nominal,
            "outside": self.outside,
            "shown": [asdict(element) for element in self.shown],
        }


class Judgement(Protocol):
    """One stage over some rows, given what the kernel returned before it."""

    @property
    def stage(self) -> Stage:
        """Which stage a finding names."""
        ...

    def nominal(self) -> Tensor:
        """The nominal output, [rows, columns], of the dtype that the kernel returns."""
        ...

    def ends(self, where: Where) -> Interval:
        """The least and the greatest admissible value, or ordinal of a code, at some elements, [n] each."""
        ...

    def admits(self, got: Tensor, nominal: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """Which of the observed elements [n] are inside."""
        ...

    def told(self, row: int, column: int, got: Tensor, nominal: Tensor, ends: tuple[Tensor, Tensor]) -> Element:
        """One element outside, in words; `got`, `nominal` and the ends are its own, [] each."""
        ...


def raw(x: Tensor) -> Tensor:
    """The bits of a tensor, as int32, int16 or uint8."""
    return x.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.element_size()])


def differing(got: Tensor, nominal: Tensor) -> Where | None:
    """Where two tensors of one dtype differ in bits; None when nowhere."""
    left, right = raw(got), raw(nominal)
    if left.device.type == "cpu":  # numpy compares and finds several times faster than torch
        places = np.flatnonzero(left.numpy() != right.numpy())
        rows, columns = (torch.from_numpy(index) for index in np.divmod(places, max(1, left.shape[-1])))
        return (rows, columns) if len(places) else None
    if torch.equal(left, right):
        return None
    rows, columns = torch.nonzero(left != right, as_tuple=True)
    return rows, columns


def judge(judgement: Judgement, got: Tensor, first_row: int, apart: Tensor | None = None) -> list[Tally]:
    """Tally what the kernel returned at one stage.

    Args:
        judgement: of exactly these rows.
        got: what was returned, [rows, columns].
        first_row: the place of the rows in the whole, for the report.
        apart: elements that count for stage `special`, [rows, columns], bool.

    Returns:
        the stage's tally, and that of `special` where there are such elements.
    """
    tallies = [Tally(judgement.stage, elements=got.numel())]
    if apart is not None and (count := int(apart.sum())):
        tallies[0].elements -= count
        tallies.append(Tally(Stage.SPECIAL, elements=count))
    nominal = judgement.nominal()
    where = differing(got, nominal)
    if where is None:
        return tallies
    lo, hi = judgement.ends(where)
    outside = ~judgement.admits(got[where], nominal[where], lo, hi)
    sides = [torch.ones_like(outside)] if len(tallies) == 1 or apart is None else [~apart[where], apart[where]]
    for tally, mine in zip(tallies, sides, strict=True):
        bad = torch.nonzero(outside & mine)[:, 0]
        tally.off_nominal, tally.outside = int(mine.sum()), len(bad)
        for index in bad[:SHOWN].tolist():
            row, column = int(where[0][index]), int(where[1][index])
            told = judgement.told(row, column, got[row, column], nominal[row, column], (lo[index], hi[index]))
            other = whose(raw(got)[row], raw(nominal), row)
            hint = "" if other is None else f"  the row is what row {first_row + other} should be"
            tally.shown.append(replace(told, row=first_row + told.row, context=told.context + hint))
    return tallies


def whose(row: Tensor, nominal: Tensor, own: int) -> int | None:
    """Which other row of the nominal output a row is that is not its own: shifted, stale, or written twice.

    Args:
        row: as returned, [columns], its bits.
        nominal: [rows, columns], bits.
        own: its place among them.
    """
    alike = (nominal == row).sum(-1)
    alike[own] *= 2  # most of it must be another's
    best = int(alike.argmax())
    # One scale of four bytes is hardly another row's by chance; a few exponents of one byte may be.
    enough = row.numel() * row.element_size() >= (4 if row.element_size() == 4 else 16)
    return best if best != own and enough and 10 * int(alike[best]) >= 9 * row.numel() else None
