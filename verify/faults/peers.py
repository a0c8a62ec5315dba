"""Would the field's criteria notice: each fault's outputs, on our inputs and on the peers' own, under every criterion.

A criterion is credited where it rejects the faulty kernel and accepts the right one on the same inputs; a rejection
of the right kernel is a false alarm. A hang or a crash is credited to everybody, as their CI has timeouts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusecheck.faults.catalogue import Fault
from fusecheck.faults.criteria import CRITERIA, Criterion
from fusecheck.faults.format_criteria import FORMAT_CRITERIA
from fusecheck.faults.hunt import Catch, Hunter
from fusecheck.faults.peer_tests import PROFILES
from fusecheck.kernel.table import Case
from fusecheck.operations import GIVEN_SCALE
from fusecheck.ranks import Pool

CASES = 8
"""Of the plan, for each fault, on which the criteria are asked; the case that caught it comes on top."""

MOST_ELEMENTS = 2**13
"""Of such a case: some thirty criteria are asked on every rank and call."""

RUN_TIMEOUT = 20.0
"""Seconds for one call by a right kernel."""

HANG = "hang"
HANGS_TRIED = 2
"""Own tests that hang before the others of the same fault are taken to hang as well."""

Verdicts = dict[str, bool]

EVERY: tuple[Criterion[Any], ...] = (*CRITERIA, *FORMAT_CRITERIA)
"""In the order of the columns."""


def asked_about(quantiser: str) -> tuple[Criterion[Any], ...]:
    """The criteria that have a test of this quantiser; empty or a given scale: of the first op."""
    if quantiser in ("", "none", GIVEN_SCALE):
        return CRITERIA
    return tuple(criterion for criterion in FORMAT_CRITERIA if criterion.takes(quantiser))


@dataclass
class Columns:
    """What the criteria made of one fault: `ours` on our inputs, `own` on their own; `kill`, `miss` or `hang`.

    `ours` has an entry for every criterion that is asked about such a format, `own` for those whose test's data are
    known; for formats that make their scales there are none.
    """

    ours: dict[str, str] = field(default_factory=dict)
    own: dict[str, str] = field(default_factory=dict)


class Peers:
    """Asks the criteria; what the right kernels give is kept, since it is the same for many faults.

    Args:
        hunter: lends its pools and its stream of cases.
    """

    def __init__(self, hunter: Hunter) -> None:
        self._hunter = hunter
        self._right: dict[tuple[str, ...], Verdicts | None] = {}

    def judge(self, fault: Fault, catch: Catch, seed: int) -> Columns:
        """All criteria on one kernel fault."""
        columns = Columns()
        faulty, right = catch.backend, fault.right
        columns.ours = self._on_ours(fault, faulty, right, self._cases(right, catch, seed))
        hangs = 0
        if fault.quantiser:
            return columns
        for profile in PROFILES:
            marks = self._on_profile(faulty, right, profile, seed, hung=hangs >= HANGS_TRIED)
            columns.own.update(marks)
            hangs += HANG in marks.values()
        return columns

    def _cases(self, right: str, catch: Catch, seed: int) -> list[Case]:
        stream = self._hunter.stream(seed, right, MOST_ELEMENTS)
        cases = [next(stream) for _ in range(CASES)]
        return cases if catch.case is None else [*cases, catch.case]

    def _on_ours(self, fault: Fault, faulty: str, right: str, cases: Iterable[Case]) -> dict[str, str]:
        marks = dict.fromkeys((c.name for c in asked_about(fault.quantiser)), "miss")
        known = f"{fault.dataflow} {fault.quantiser} {fault.rules}" if fault.quantiser else right
        for case in cases:
            line, pool = case.problem.to_json(), self._hunter.pools[case.problem.world_size]
            good = self._right_verdicts((known, line), pool, "criteria", line, right)
            bad = _asked(pool, "criteria", line, faulty, timeout=self._hunter.budget.timeout)
            _credit(marks, good, bad)
            if bad is None or "miss" not in marks.values():
                break
        return marks

    def _on_profile(self, faulty: str, right: str, name: str, seed: int, *, hung: bool) -> dict[str, str]:
        """One profile; where others have hung it is taken to hang too, since each wait costs the whole deadline."""
        marks = dict.fromkeys((c.name for c in CRITERIA if c.profile == name), HANG if hung else "miss")
        if hung:
            return marks
        for shape in PROFILES[name].shapes():
            if shape[0] not in self._hunter.pools:
                continue
            pool, arguments = self._hunter.pools[shape[0]], (name, shape, seed)
            key = (right, name, *map(str, shape), str(seed))
            good = self._right_verdicts(key, pool, "own_test", *arguments, right)
            bad = _asked(pool, "own_test", *arguments, faulty, timeout=self._hunter.budget.timeout)
            _credit(marks, good, bad)
            if bad is None or "miss" not in marks.values():
                break
        return marks

    def _right_verdicts(self, key: tuple[str, ...], pool: Pool, method: str, *arguments: Any) -> Verdicts | None:
        if key not in self._right:
            self._right[key] = _asked(pool, method, *arguments, timeout=RUN_TIMEOUT)
        return self._right[key]

    def false_alarms(self, flows: Sequence[str], seeds: Sequence[int]) -> Mapping[str, tuple[int, int]]:
        """Over right kernels of these dataflows: how often each criterion rejected one, and of how many cases."""
        rejected: Counter[str] = Counter()
        cases = 0
        for flow in flows:
            right = f"emulated:{flow}"
            for seed in seeds:
                stream = self._hunter.stream(seed, right, MOST_ELEMENTS)
                for _ in range(CASES):
                    case = next(stream)
                    line, pool = case.problem.to_json(), self._hunter.pools[case.problem.world_size]
                    verdicts = self._right_verdicts((right, line), pool, "criteria", line, right) or {}
                    rejected.update(name for name, passed in verdicts.items() if not passed)
                    cases += 1
        of_formats = self._alarms_of_formats()
        return {criterion.name: (rejected[criterion.name], cases) for criterion in CRITERIA} | of_formats

    def _alarms_of_formats(self) -> dict[str, tuple[int, int]]:
        """The same over the right kernels that quantiser faults were compared with, on the same cases."""
        asked = [verdicts for verdicts in self._right.values() if verdicts is not None]
        counted = {c.name: [verdicts[c.name] for verdicts in asked if c.name in verdicts] for c in FORMAT_CRITERIA}
        return {name: (passed.count(False), len(passed)) for name, passed in counted.items()}


def _asked(pool: Pool, method: str, *arguments: Any, timeout: float) -> Verdicts | None:
    """Whether each criterion passes on all ranks and calls; None after a hang or a crash."""
    replies = pool.call(method, *arguments, timeout=timeout)
    if not all(reply.ok for reply in replies):
        return None
    passed: Verdicts = {}
    for records in zip(*(reply.value for reply in replies), strict=True):
        agree = len({str(record["residual"]) for record in records}) == 1
        for criterion in (c for c in EVERY if c.name in records[0]["passed"]):
            ok = all(record["passed"][criterion.name] for record in records)
            ok = ok and (agree or not criterion.ranks_equal)
            passed[criterion.name] = passed.get(criterion.name, True) and ok
    return passed


def _credit(marks: dict[str, str], good: Verdicts | None, bad: Verdicts | None) -> None:
    if good is None:
        return
    if bad is None:
        for name in marks:
            marks[name] = HANG if marks[name] == "miss" else marks[name]
        return
    for name, passed in bad.items():
        if good[name] and not passed:
            marks[name] = "kill"
