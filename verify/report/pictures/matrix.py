"""The kill matrix: which stage of Fusecheck caught each fault, and which criteria of other suites noticed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_ORDER = ("alive", "ranks agree", "residual", "norm", "quant", "unfused", "again")


@dataclass(frozen=True)
class Row:
    """A fault.

    Attributes:
        id: of the catalogue.
        title: what is wrong.
        cases: run until it was caught, or in all.
        caught: a cell a stage: `first`, `later` or empty.
        peers: a cell a criterion: `kill`, `hang`, `miss`, or empty where it was not asked.
        killed: whether anything noticed.
    """

    id: str
    title: str
    cases: int
    caught: list[str]
    peers: list[str]
    killed: bool


@dataclass(frozen=True)
class Matrix:
    """The faults of one group, with the stages and criteria that have a column."""

    group: str
    killed: int
    stages: list[str]
    criteria: list[str]
    rows: list[Row]


def matrices(faults: Sequence[dict[str, Any]]) -> list[Matrix]:
    """A matrix for each group of faults, from the rows of `fusecheck faults`."""
    rows = [fault for fault in faults if "id" in fault]
    names = list(dict.fromkeys(str(fault.get("group") or "faults") for fault in rows))
    return [_matrix(name, [f for f in rows if str(f.get("group") or "faults") == name]) for name in names]


def _matrix(group: str, faults: Sequence[dict[str, Any]]) -> Matrix:
    seen = dict.fromkeys(stage for fault in faults for stage in _stages(fault))
    stages = [s for s in _ORDER if s in seen] + [s for s in seen if s not in _ORDER]
    criteria = list(dict.fromkeys(c for fault in faults for c in fault.get("criteria_on_our_inputs") or {}))
    rows = []
    for fault in faults:
        by, asked = _stages(fault), fault.get("criteria_on_our_inputs") or {}
        caught = ["first" if by[:1] == [s] else "later" if s in by else "" for s in stages]
        peers = [str(asked.get(c, "")) for c in criteria]
        killed = bool(fault.get("killed"))
        rows.append(Row(fault["id"], fault.get("title", ""), int(fault.get("cases") or 0), caught, peers, killed))
    return Matrix(group, sum(row.killed for row in rows), stages, criteria, rows)


def _stages(fault: dict[str, Any]) -> list[str]:
    """What noticed, the first one first."""
    return list(fault.get("stages") or ([fault["stage"]] if fault.get("stage") else []))


@dataclass(frozen=True)
class Criterion:
    """A pass criterion of the field, or Fusecheck itself: what it caught and how often it rejected a right kernel."""

    name: str
    project: str
    formula: str
    caught: int
    faults: int
    on_their_inputs: int | None
    false_alarms: int
    legal: int
    own: bool = False


def criteria(summary: dict[str, Any]) -> list[Criterion]:
    """The criteria that were asked, the sharpest first, with Fusecheck on top; empty where none was asked."""
    asked = summary.get("criteria") or []
    if not asked:
        return []
    rows = [fault for fault in summary.get("rows") or [] if fault.get("criteria_on_our_inputs")]
    own = Criterion(
        "Fusecheck", "", "inside the enclosure, admissible codes", sum(bool(r.get("killed")) for r in rows), len(rows),
        None, int(summary.get("false_alarms") or 0), int(summary.get("legal_cases") or 0), own=True,
    )  # fmt: skip
    others = [
        Criterion(
            str(c["name"]), str(c.get("project", "")), str(c.get("formula", "")), int(c["killed_on_our_inputs"]),
            int(c["faults"]), c.get("killed_on_their_inputs"), *(list(c.get("false_alarms") or (0, 0))[:2]),
        )
        for c in asked
    ]  # fmt: skip
    return [own, *sorted(others, key=lambda c: -c.caught)]
