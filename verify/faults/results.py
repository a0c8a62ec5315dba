"""What a run of the catalogue showed: one result a fault, and the figures of all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from fusecheck.faults.catalogue import Fault, LeftOut
from fusecheck.faults.peers import EVERY, Columns
from fusecheck.report import Verdict


@dataclass
class Result:
    """One fault.

    Attributes:
        fault: the entry.
        cases: run until it was caught, or in all.
        stages: what noticed in the catching case, the first one first; empty when it survived.
        message: the first finding in one line.
        case: the catching case as JSON, or its name.
        shrunk: the smallest case found, as JSON.
        checks: further checks that the case makes.
        seconds: until it was caught.
        false_alarms: findings on a right subject, in the course of this hunt.
        columns: what the field's criteria made of it, where they were asked.
    """

    fault: Fault
    cases: int = 0
    stages: list[str] = field(default_factory=list)
    message: str = ""
    case: str | None = None
    shrunk: str | None = None
    checks: list[str] = field(default_factory=list)
    seconds: float = 0.0
    false_alarms: list[str] = field(default_factory=list)
    columns: Columns | None = None

    @property
    def killed(self) -> bool:
        """Whether something noticed."""
        return bool(self.stages)

    def to_record(self) -> dict[str, Any]:
        """As JSON-ready values."""
        record: dict[str, Any] = {
            "id": self.fault.id,
            "group": self.fault.group,
            "title": self.fault.title,
            "links": list(self.fault.links),
            "killed": self.killed,
            "cases": self.cases,
            "stage": self.stages[0] if self.stages else None,
            "stages": self.stages,
            "expected_stage": self.fault.stage,
            "seconds": round(self.seconds, 2),
            "message": self.message,
            "case": self.case,
            "checks": self.checks,
            "shrunk": self.shrunk,
            "note": self.fault.note,
        }
        if self.columns is not None:
            record["criteria_on_our_inputs"] = self.columns.ours
            record["criteria_on_their_inputs"] = self.columns.own
        return record


@dataclass(frozen=True)
class Alarm:
    """A right kernel that was rejected.

    Attributes:
        subject: the backend.
        seed: of the plan.
        line: the finding, with its replay line.
    """

    subject: str
    seed: int
    line: str


@dataclass
class Report:
    """A run of the catalogue.

    Attributes:
        results: by seed and fault, in the order of the run.
        seeds: of the plan.
        alarms: right kernels rejected by Fusecheck.
        legal: cases of right kernels, by subject and seed.
        peer_alarms: by criterion: rejected right kernels, and cases.
        left_out: what is not re-created.
        seconds: wall time.
        interrupted: whether it was ended before all was run.
    """

    seeds: tuple[int, ...]
    results: dict[int, list[Result]] = field(default_factory=dict)
    alarms: list[Alarm] = field(default_factory=list)
    legal: Counter[tuple[str, int]] = field(default_factory=Counter)
    peer_alarms: dict[str, tuple[int, int]] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def all(self) -> list[Result]:
        """Every result of every seed."""
        return [result for results in self.results.values() for result in results]

    @property
    def survivors(self) -> list[tuple[int, Result]]:
        """Seed and result of each fault that nothing noticed."""
        return [(seed, r) for seed, results in self.results.items() for r in results if not r.killed]

    @property
    def verdict(self) -> Verdict:
        """Fail with a survivor or a false alarm; inconclusive when nothing was run, or not to the end."""
        failed = bool(self.survivors or self.alarms or any(result.false_alarms for result in self.all))
        return Verdict.of(failed=failed, complete=bool(self.all) and not self.interrupted)

    def summary(self) -> dict[str, Any]:
        """The figures of `result.json`; the rows are those of the first seed, with a line for each further one."""
        groups: dict[str, list[Result]] = {}
        for result in self.all:
            groups.setdefault(result.fault.group, []).append(result)
        caught = [result.cases for result in self.all if result.killed]
        first = self.results.get(self.seeds[0], [])
        return {
            "faults": len(self.all),
            "killed": len(caught),
            "false_alarms": len(self.alarms) + sum(len(result.false_alarms) for result in self.all),
            "legal_cases": self.legal.total(),
            "seeds": list(self.seeds),
            "median_cases_until_caught": median(caught) if caught else None,
            "most_cases_until_caught": max(caught, default=None),
            "seconds": round(self.seconds, 1),
            "interrupted": self.interrupted,
            "groups": {
                name: {"faults": len(results), "killed": sum(r.killed for r in results)}
                for name, results in groups.items()
            },
            "stages": dict(Counter(result.stages[0] for result in self.all if result.stages)),
            "criteria": self._criteria(first),
            "rows": [result.to_record() for result in first],
            "further_seeds": {
                str(seed): {r.fault.id: [r.cases, r.stages[0] if r.stages else None] for r in self.results[seed]}
                for seed in self.seeds[1:]
                if seed in self.results
            },
            "left_out": [
                {"id": entry.id, "title": entry.title, "links": list(entry.links), "reason": entry.reason}
                for entry in self.left_out
            ],
        }

    def _criteria(self, results: list[Result]) -> list[dict[str, Any]]:
        """Each criterion's source, formula, kill rates and false alarms; empty where they were not asked."""
        every = [result.columns for result in results if result.columns is not None]
        made = []
        for c in EVERY:
            asked = [columns for columns in every if c.name in columns.ours]
            own = [columns.own[c.name] for columns in asked if c.name in columns.own]
            if not asked:
                continue
            entry = {name: getattr(c, name) for name in ("name", "project", "source", "formula", "note")}
            counts = {
                "faults": len(asked),
                "killed_on_our_inputs": sum(columns.ours[c.name] != "miss" for columns in asked),
                "killed_on_their_inputs": sum(mark != "miss" for mark in own) if own else None,
                "hangs": sum(columns.ours[c.name] == "hang" for columns in asked),
                "false_alarms": list(self.peer_alarms.get(c.name, (0, 0))),
            }
            made.append(entry | counts)
        return made

    def findings(self) -> list[dict[str, Any]]:
        """Survivors and false alarms as JSON-ready records."""
        records: list[dict[str, Any]] = [
            {"kind": "survivor", "fault": r.fault.id, "seed": seed, "cases": r.cases, "message": r.fault.does}
            for seed, r in self.survivors
        ]
        records += [
            {"kind": "false alarm", "fault": r.fault.id, "seed": seed, "message": line}
            for seed, results in self.results.items()
            for r in results
            for line in r.false_alarms
        ]
        return records + [
            {"kind": "false alarm", "subject": a.subject, "seed": a.seed, "message": a.line} for a in self.alarms
        ]
