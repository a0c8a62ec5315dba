"""Checks of protocols, JSON-ready: one model at one size, or the museum with all repaired forms."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from fusecheck.interrupts import Interruption
from fusecheck.protocol.explorer import MEMORIES, Exploration, Explorer
from fusecheck.protocol.language import Model, Size
from fusecheck.protocol.museum import Exhibit
from fusecheck.protocol.schedule import schedule


@dataclass(frozen=True)
class Outcome:
    """What exploring a model at one size in one memory found.

    Attributes:
        size: explored; of a failure, the smallest that has it.
        memory: `sc` or `relaxed`.
        exploration: with the failure, if any.
    """

    size: Size
    memory: str
    exploration: Exploration

    @property
    def verdict(self) -> str:
        """`pass` only of a complete exploration."""
        if self.exploration.failure is not None:
            return "fail"
        return "pass" if self.exploration.complete else "inconclusive"

    def to_record(self) -> dict[str, Any]:
        """With the schedule of a failure."""
        found = self.exploration
        record: dict[str, Any] = {
            "size": str(self.size),
            "memory": self.memory,
            "verdict": self.verdict,
            "states": found.states,
            "transitions": found.transitions,
            "seconds": round(found.seconds, 3),
            "peak_mb": round(found.peak_mb),
        }
        if found.failure is not None:
            shown = schedule(found)
            steps = [
                {"rank": s.rank, "block": s.block, "call": s.call, "kernel": s.kernel, "does": list(s.does)}
                for s in shown.steps
            ]
            record |= {"kind": shown.kind, "steps": steps, "outcome": list(shown.outcome)}
        return record


def explore(model: Model, size: Size, memory: str, limit: int | None = None) -> Outcome:
    """One exploration; a wrong read or a hang, if there is one, rather than the unclear slot that comes before it."""
    found = Explorer(model.launches(size), memory, limit=limit).explore()
    if found.failure is not None and found.failure.kind == "not clear":
        further = Explorer(model.launches(size), memory, limit=limit, clears=False).explore()
        found = further if further.failure is not None else found
    return Outcome(size, memory, found)


def smallest(model: Model, size: Size, memory: str, limit: int | None = None) -> Outcome:
    """The outcome at `size`; if it fails, at the fewest calls and blocks that fail too.

    What goes wrong under sequential consistency goes wrong in the relaxed memory too, often by a longer schedule.
    """
    whole = explore(model, size, memory, limit)
    if whole.exploration.failure is None:
        return whole
    found = _smallest_failing(model, whole, limit)
    if memory != MEMORIES[0]:
        simpler = explore(model, found.size, MEMORIES[0], limit)
        if simpler.exploration.failure is not None and _length(simpler) < _length(found):
            return replace(found, exploration=simpler.exploration)
    return found


def _length(found: Outcome) -> int:
    return len(schedule(found.exploration).steps)


def _smallest_failing(model: Model, whole: Outcome, limit: int | None) -> Outcome:
    size, memory = whole.size, whole.memory
    for calls, blocks in itertools.product(range(1, size.calls + 1), range(1, size.blocks + 1)):
        less = replace(size, calls=calls, blocks=blocks)
        if less != size and (found := explore(model, less, memory, limit)).exploration.failure is not None:
            return found
    return whole


Known: TypeAlias = "dict[tuple[str, str, str], dict[str, Any]]"
"""Records of repaired forms, which faults share, by model, size and memory."""


def check_exhibit(
    exhibit: Exhibit, sizes: Sequence[Size], memories: Sequence[str] = MEMORIES, known: Known | None = None
) -> dict[str, Any]:
    """Whether the fault shows, in the strongest memory that shows it, and whether its repaired form is right."""
    known = {} if known is None else known
    faulty = [explore(exhibit.faulty, exhibit.size, memory) for memory in memories]
    shown = next((found for found in faulty if found.verdict == "fail"), faulty[-1])
    keys = [(repr(exhibit.repaired), str(size), memory) for size in sizes for memory in memories]
    for key, (size, memory) in zip(keys, itertools.product(sizes, memories), strict=True):
        if key not in known:
            known[key] = explore(exhibit.repaired, size, memory).to_record()
    return {
        "id": exhibit.name,
        "title": exhibit.title,
        "link": exhibit.link,
        "killed": shown.verdict == "fail",
        "faulty": shown.to_record(),
        "repaired": [known[key] for key in keys],
    }


def check_museum(
    exhibits: Sequence[Exhibit],
    size: Size | None,
    memories: Sequence[str],
    seen: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The summary of the whole museum, or of what is done by Ctrl-C; `seen` is told of each exhibit.

    Args:
        exhibits: to check.
        size: of the repaired forms; None for those that each exhibit names.
        memories: to explore in.
        seen: called with each record.
    """
    rows: list[dict[str, Any]] = []
    known: Known = {}
    with Interruption() as stop:
        for exhibit in exhibits:
            sizes = exhibit.sizes if size is None else (replace(size, ranks=max(size.ranks, exhibit.size.ranks)),)
            rows.append(check_exhibit(exhibit, sizes, memories, known))
            seen(rows[-1])
    alarms = [record for record in known.values() if record["verdict"] != "pass"]
    return {
        "faults": len(rows),
        "killed": sum(row["killed"] for row in rows),
        "false_alarms": len(alarms),
        "exhibits": rows,
        "interrupted": stop.happened,
    }
