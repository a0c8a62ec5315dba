"""Schedules of `fusecheck protocol` as lanes: a column for each block, a row for each step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Lanes:
    """A schedule.

    Attributes:
        title: what it shows, at which size and in which memory.
        link: where the fault was published; empty without.
        lanes: the blocks, by rank.
        rows: for each step a text in the lane of its block, and empty ones in the others.
        outcome: what goes wrong at the end, a line each.
        open: whether it is shown without a click.
    """

    title: str
    link: str
    lanes: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    outcome: tuple[str, ...]
    open: bool


def lanes(summary: dict[str, Any]) -> list[Lanes]:
    """Every schedule of a record: the kernels first, then the faults of the museum."""
    return [_lanes(*schedule, first=not number) for number, schedule in enumerate(_schedules(summary))]


def _schedules(summary: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for row in summary.get("kernels") or []:
        for outcome in row["outcomes"]:
            if outcome.get("steps"):
                yield row["title"], "", outcome
                break
    for row in summary.get("exhibits") or []:
        if row["faulty"].get("steps"):
            yield row["title"], row["link"], row["faulty"]


def _lanes(title: str, link: str, found: dict[str, Any], *, first: bool) -> Lanes:
    steps = found["steps"]
    blocks = sorted({(step["rank"], step["block"]) for step in steps})
    rows = []
    for step in steps:
        text = f"call {step['call']}, {step['kernel']}: {'; '.join(step['does'])}"
        rows.append(tuple(text if (step["rank"], step["block"]) == block else "" for block in blocks))
    named = tuple(f"rank {rank} block {block}" for rank, block in blocks)
    about = f"{title} ({found['size']}, {found['memory']} memory)"
    return Lanes(about, link, named, tuple(rows), tuple(found["outcome"]), open=first)
