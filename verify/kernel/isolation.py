"""What a failing case needs to fail again: nothing, the cases before it on one workspace, or fewer of its calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from fusecheck.case.run import Outcome, run_case
from fusecheck.kernel.table import PERIODS
from fusecheck.problem import Call, Problem
from fusecheck.ranks import FailureKind, Reply

T = TypeVar("T")

SECONDS = 20.0
"""How long one failing case may be made smaller; one that hangs is tried once, alone: each try waits it out."""

ALL_SECONDS = 60.0
"""And all of a run; what comes later keeps everything that came before it."""

LONG = 12
"""Calls of a schedule that are few enough to read."""


class Restartable(Protocol):
    """A pool whose processes can be replaced by new ones."""

    def call(self, method: str, *arguments: Any, timeout: float) -> list[Reply]:
        """One reply per rank, in rank order."""
        ...

    def close(self) -> None:
        """End the processes; the next call starts new ones."""
        ...


@dataclass
class Isolation:
    """Finds for each failing case the least that shows it again, in processes of its own.

    Attributes:
        timeout: seconds for one case.
        spent: so far, of `ALL_SECONDS`.
    """

    timeout: float
    spent: float = 0.0
    _deadline: float = field(default=0.0, init=False)

    def isolate(
        self, pool: Restartable, case: dict[str, Any], history: Sequence[dict[str, Any]], outcome: Outcome
    ) -> tuple[dict[str, Any], Outcome, bool]:
        """The request that shows a finding again, what it shows, and whether it did.

        Args:
            pool: where the case failed; its processes are replaced.
            case: the request that failed.
            history: the requests before it in the same processes, the oldest first.
            outcome: what it showed.
        """
        began = time.monotonic()
        self._deadline = began + min(SECONDS, ALL_SECONDS - self.spent)
        try:
            hangs, trial = _hangs(outcome), _Trial(self, pool, outcome)
            if self.spent >= ALL_SECONDS or (hangs and not (trial.fails(case) and _hangs(trial.outcome))):
                pool.close()
                return behind(case, history), outcome, True
            return (case, outcome, True) if hangs else self._isolate(pool, case, history, outcome)
        finally:
            self.spent += time.monotonic() - began

    def _isolate(
        self, pool: Restartable, case: dict[str, Any], history: Sequence[dict[str, Any]], outcome: Outcome
    ) -> tuple[dict[str, Any], Outcome, bool]:
        trial = _Trial(self, pool, outcome)
        if trial.fails(case):
            return self._shorter(trial, case)
        count = 1
        while history and self._in_time():
            if trial.fails(behind(case, history[-count:])):
                least = self._least(list(history[-count:]), lambda some: trial.fails(behind(case, some)))
                return behind(case, least), trial.outcome, True
            if count >= len(history):
                break
            count *= 2
        pool.close()
        return case, outcome, False

    def _shorter(self, trial: _Trial, case: dict[str, Any]) -> tuple[dict[str, Any], Outcome, bool]:
        """The same with fewer calls in its schedule, as far as time allows."""
        problem = Problem.from_json(case["problem"])
        if len(problem.schedule) > LONG:

            def of(calls: Sequence[Call]) -> dict[str, Any]:
                return case | {"problem": replace(problem, schedule=tuple(calls)).to_json()}

            plain = _plain(problem)
            calls = list(problem.schedule)
            for candidate in plain:
                if self._in_time() and trial.fails(of(candidate)):
                    calls = candidate
                    break
            if len(calls) > LONG:
                calls = self._least(calls, lambda some: trial.fails(of(some)))
            case = of(calls)
        return case, trial.outcome, True

    def _least(self, things: list[T], fails: Callable[[list[T]], bool]) -> list[T]:
        """Leave out ever smaller pieces while what is left still fails."""
        size = max(1, len(things) // 2)
        while self._in_time():
            start, before = 0, len(things)
            while start < len(things) and self._in_time():
                fewer = things[:start] + things[start + size :]
                if (fewer or len(things) == 1) and fails(fewer):
                    things = fewer
                else:
                    start += size
            if size == 1 and len(things) == before:
                break
            size = max(1, size // 2)
        return things

    def _in_time(self) -> bool:
        return time.monotonic() < self._deadline


class _Trial:
    """Runs a request in new processes, and remembers the last outcome that failed at the same stage."""

    def __init__(self, owner: Isolation, pool: Restartable, outcome: Outcome) -> None:
        self._owner, self._pool = owner, pool
        self.outcome, self._stage = outcome, outcome.findings[0].stage

    def fails(self, case: dict[str, Any]) -> bool:
        self._pool.close()
        found = run_case(self._pool, case, timeout=self._owner.timeout)
        failed = bool(found.findings) and found.findings[0].stage is self._stage
        if failed:
            self.outcome = found
        return failed


def _hangs(outcome: Outcome) -> bool:
    return outcome.findings[0].message.startswith(FailureKind.HANG.value)


def behind(case: dict[str, Any], before: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The request with others before it, on the same workspaces."""
    if not before:
        return case
    return case | {"before": [{"problem": earlier["problem"], "checks": earlier["checks"]} for earlier in before]}


def _plain(problem: Problem) -> list[list[Call]]:
    """Schedules of like calls, without and with a rank that comes late in front of each 64th, short to write down."""
    calls, last = problem.schedule, problem.schedule[-1]
    alike = Call(problem.tokens, times=len(calls))
    late = replace(next((call for call in calls if call.delayed is not None), last), tokens=problem.tokens)
    late = Call(problem.tokens, delayed=late.delayed, delay_ms=late.delay_ms, times=2)
    found = [[replace(alike, times=count)] for count in (16, *PERIODS) if count <= len(calls)] + [[alike]]
    return found + [[replace(alike, times=period - 2), late, late] for period in PERIODS]
