"""Findings as the page shows them: one entry a case and stage, with every rank that saw it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fusecheck.report.pictures.number_line import NumberLine, Place, got_and_admissible, number_line, place
from fusecheck.report.replays import head, replay, told

SHOWN = 25
"""Entries of a part on the page; result.json has all."""

OPEN = 4
"""Entries that are open from the start."""

_RANKS = 16

FILTERS = ("stage", "family", "backend")


@dataclass(frozen=True)
class Element:
    """What one finding of a case says: which element of which rank, what came back, and how many more there are."""

    rank: str
    row: str
    column: str
    got: str
    admissible: str
    count: int


@dataclass(frozen=True)
class Entry:
    """The findings of one case at one stage.

    Attributes:
        head: the stage, or the name of the check.
        like: the known dataflows that explain every element; may be empty.
        varies: whether the same call came out the same when it was repeated; may be empty.
        place: the element of the first finding; None where it names none.
        where: subject and shape.
        message: of the first finding.
        line: its picture.
        elements: every finding of the entry that names an element, where there is more than one.
        count: elements outside of the first finding, as the console counts them; 0 where unknown.
        total: the same over all ranks and calls.
        keys: stage, family and backend, by which a reader filters.
        replay: the command that shows it again.
        traceback: of the exception, where one was raised.
        output: the end of what the rank had printed.
    """

    head: str
    like: str
    varies: str
    place: Place | None
    where: str
    message: str
    line: NumberLine | None
    elements: list[Element]
    count: int
    total: int
    keys: dict[str, str]
    replay: str
    traceback: str
    output: str


def entries(findings: list[dict[str, Any]]) -> list[Entry]:
    """The entries of a part's findings: the first of each stage in front, so that none of them is overlooked."""
    together: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for number, finding in enumerate(findings):
        own = str(finding["problem"]) if "problem" in finding else str(number)
        key = (head(finding), own, str(finding.get("backend", "")), str(finding.get("judged_by", "")))
        together.setdefault(key, []).append(finding)
    seen: set[str] = set()
    first: list[list[dict[str, Any]]] = []
    later: list[list[dict[str, Any]]] = []
    for (stage, *_), mine in together.items():
        (later if stage in seen else first).append(mine)
        seen.add(stage)
    return [_entry(mine) for mine in first + later]


def _entry(mine: list[dict[str, Any]]) -> Entry:
    finding = mine[0]
    message = str(finding.get("message") or finding.get("detail") or "")
    problem = _problem(finding)
    traceback, output = told(finding)
    found = [element for each in mine[:_RANKS] for element in _element(each)]
    return Entry(
        head=head(finding),
        like=", ".join(map(str, finding.get("computes_like") or ())),
        varies=str(finding.get("varies") or ""),
        place=place(message),
        where=_where(finding, problem),
        message=message,
        line=number_line(message, str(problem.get("dtype", ""))),
        elements=found if len(found) > 1 else [],
        count=_count(finding),
        total=sum(map(_count, mine)),
        keys={key: value for key in FILTERS if (value := str({**problem, **finding}.get(key) or ""))},
        replay=replay(finding),
        traceback=traceback,
        output=output,
    )


def _count(finding: dict[str, Any]) -> int:
    return finding["count"] if isinstance(finding.get("count"), int) else 0


def filters(found: list[Entry]) -> dict[str, list[str]]:
    """What the entries can be filtered by: of each key its values, where they differ."""
    values = {key: sorted({entry.keys[key] for entry in found if key in entry.keys}) for key in FILTERS}
    return {key: each for key, each in values.items() if len(each) > 1}


def _element(finding: dict[str, Any]) -> list[Element]:
    message = str(finding.get("message") or "")
    at, codes = place(message), got_and_admissible(message)
    if at is None or codes is None:
        return []
    return [Element(at.rank, at.row, at.column, *codes, count=_count(finding))]


def _problem(finding: dict[str, Any]) -> dict[str, Any]:
    """The Problem of a finding; empty where it has none that can be read."""
    try:
        found = json.loads(finding["problem"])
    except (KeyError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _where(finding: dict[str, Any], problem: dict[str, Any]) -> str:
    """Whose kernel, by what it was judged, and the shape, in one line."""
    words = [str(finding[k]) for k in ("case", "fault", "subject", "backend") if finding.get(k)]
    if finding.get("judged_by"):
        words.append(f"judged as {finding['judged_by']}")
    elif finding.get("dataflow"):
        words.append(str(finding["dataflow"]))
    if problem:
        words.append(f"{problem.get('tokens')} × {problem.get('hidden')} {problem.get('dtype')}")
        words.append(f"{problem.get('world_size')} ranks")
        words += [str(problem[k]) for k in ("strategy", "family") if problem.get(k)]
    return " · ".join(dict.fromkeys(words))
