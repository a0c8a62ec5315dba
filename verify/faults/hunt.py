"""Run the kernel question's normal plan against a faulty kernel until it is caught, then shrink the case."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fusecheck import backends
from fusecheck.case.finding import Finding
from fusecheck.case.run import Outcome, request, run_case
from fusecheck.faults.shrink import Shrinker
from fusecheck.interface import STATIC_OPS
from fusecheck.kernel.core import stream
from fusecheck.kernel.plan import Plan
from fusecheck.kernel.table import Case
from fusecheck.problem import Problem
from fusecheck.ranks import Pool
from fusecheck.verdict import Stage

WORLD_SIZES = (2, 4, 2)
"""Of successive cases: mostly the smallest group, with enough of four ranks for what two cannot show."""

MOST_ELEMENTS = 2**17
"""Of the largest case: a fault that needs more is no fault of shapes that are run every day."""


PATIENCE = 60.0
"""Seconds for one case of a right kernel: a busy machine is no hang."""


@dataclass(frozen=True)
class Budget:
    """How long a fault may survive.

    Attributes:
        cases: of the plan.
        seconds: of the plan; the case in flight is finished.
        timeout: seconds for one case; one that takes longer hangs.
        shrink_runs: cases that shrinking may run.
        shrink_seconds: and how long it may take.
    """

    cases: int = 400
    seconds: float = 90.0
    timeout: float = 5.0
    shrink_runs: int = 60
    shrink_seconds: float = 5.0


@dataclass
class Catch:
    """What became of one faulty kernel.

    Attributes:
        backend: how the kernel is loaded.
        cases: run until it was caught, or in all.
        stages: every stage that noticed in the catching case, the first one first; empty when it survived.
        case: the catching case.
        shrunk: the smallest case found that is still caught.
        message: the finding in one line.
        seconds: until it was caught.
        false_alarms: findings that the right kernel gives on the same case; such a case catches nothing.
    """

    backend: str
    cases: int = 0
    stages: list[str] = field(default_factory=list)
    case: Case | None = None
    shrunk: Problem | None = None
    message: str = ""
    seconds: float = 0.0
    false_alarms: list[str] = field(default_factory=list)

    @property
    def killed(self) -> bool:
        """Whether some stage noticed."""
        return bool(self.stages)


class Hunter:
    """Runs cases on pools that it is lent, one for each world size.

    Args:
        pools: by world size, with workers of `fusecheck.case.run.WORKER`'s interface.
        budget: for each fault.
    """

    def __init__(self, pools: Mapping[int, Pool], budget: Budget) -> None:
        self.pools, self.budget = pools, budget

    def stream(self, seed: int, backend: str, most_elements: int = MOST_ELEMENTS) -> Iterator[Case]:
        """The normal plan's cases for this backend, world sizes in turn; what it refuses is left out."""
        known = backends.backend(backend)
        plan = Plan(seed=seed, most_elements=most_elements, ops=getattr(known, "ops", STATIC_OPS))
        sizes = [size for size in WORLD_SIZES if size in self.pools]

        def takes(problem: Problem) -> bool:
            return known.supports(problem).ok

        streams = {size: stream(plan.about(known), size, takes) for size in sizes}
        while True:
            for size in sizes:
                case = next(streams[size])
                if all(takes(step) for _, step in case.problem.calls()):
                    yield case

    def hunt(self, backend: str, seed: int, *, right: str = "", shrink: bool = True) -> Catch:
        """Run the plan until a case fails that a right kernel passes, or until the budget is spent.

        Args:
            backend: the faulty kernel.
            seed: of the plan.
            right: a kernel without the fault, which must pass the catching case; empty for none.
            shrink: whether to look for a smaller case.
        """
        self.refresh()
        caught, began = Catch(backend), time.monotonic()
        for case in self.stream(seed, backend):
            outcome = self.judge(case, backend)
            caught.cases += 1
            if not outcome.passed and self._counts(caught, case, outcome.findings, right):
                self._note(caught, case, outcome.findings)
                break
            if caught.cases >= self.budget.cases or time.monotonic() - began > self.budget.seconds:
                break
        caught.seconds = time.monotonic() - began
        if caught.case is not None and shrink:
            caught.shrunk = self._shrink(caught.case, backend, Stage(caught.stages[0]))
        return caught

    def refresh(self) -> None:
        """Begin with new rank processes, whose memory no other kernel has touched."""
        for pool in self.pools.values():
            pool.cancel()

    def judge(self, case: Case, backend: str, *, timeout: float | None = None) -> Outcome:
        """One case to its verdict."""
        pool, asked = self.pools[case.problem.world_size], request(case.problem, backend, checks=case.checks)
        return run_case(pool, asked, timeout=timeout or self.budget.timeout)

    def _counts(self, caught: Catch, case: Case, findings: Sequence[Finding], right: str) -> bool:
        """Whether the right kernel passes the case; where the faulty one hung, it must answer in the same time."""
        if not right:
            return True
        self.pools[case.problem.world_size].cancel()
        began = time.monotonic()
        outcome = self.judge(case, right, timeout=PATIENCE)
        caught.false_alarms += [finding.line() for finding in outcome.findings[:1]]
        busy = time.monotonic() - began > self.budget.timeout
        return outcome.passed and not (busy and findings[0].message.startswith("hang"))

    def _note(self, caught: Catch, case: Case, findings: Sequence[Finding]) -> None:
        caught.case = case
        caught.stages = list(dict.fromkeys(finding.stage.value for finding in findings))
        caught.message = findings[0].message

    def _shrink(self, case: Case, backend: str, stage: Stage) -> Problem:
        """A smaller case that the same stage notices; a hang is tried a few times only, since each try waits it out."""
        hangs = stage is Stage.ALIVE

        def fails(problem: Problem) -> bool:
            outcome = self.judge(replace(case, problem=problem), backend)
            return any(finding.stage is stage for finding in outcome.findings)

        known = backends.backend(backend)

        def taken(problem: Problem) -> bool:
            steps = [step for _, step in problem.calls()]
            return problem.world_size in self.pools and all(known.supports(step).ok for step in steps)

        runs = min(self.budget.shrink_runs, 2) if hangs else self.budget.shrink_runs
        return Shrinker(fails, taken, runs, self.budget.shrink_seconds).shrink(case.problem)
