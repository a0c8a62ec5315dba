"""One subject's turn: its cases spread over the pools, each noted before it starts, each failure isolated."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusecheck import backends
from fusecheck.case.question import Question
from fusecheck.case.run import Outcome, explain, request, run_case
from fusecheck.errors import BreachError
from fusecheck.interface import Backend, Support
from fusecheck.interrupts import Interruption
from fusecheck.journal import Journal
from fusecheck.kernel.gpu_checks import GpuChecks
from fusecheck.kernel.isolation import Isolation, Restartable, behind
from fusecheck.kernel.plan import Plan
from fusecheck.kernel.report import KernelReport, Subject
from fusecheck.kernel.shares import Share
from fusecheck.kernel.table import Case, Cell
from fusecheck.kernel.virtual import residency
from fusecheck.problem import Problem
from fusecheck.verdict import Stage

MOST_FINDINGS = 50
"""After so many failing cases the run stops: more say nothing new."""

INTERRUPT_SECONDS = 5.0
"""How long the cases in flight may take after Ctrl-C."""

ONCE = " (did not fail again in new processes, neither alone nor behind the cases before it)"


@dataclass(frozen=True)
class Budget:
    """When a subject has had enough: cases, seconds, or both (whichever comes first); neither: at its core's end.

    Attributes:
        cases: in all, of the core plan and drawn.
        drawn: behind the core plan.
        seconds: from the end of its first case; the core plan is run whatever they are.
    """

    cases: int | None = None
    drawn: int | None = None
    seconds: float | None = None

    def spent(self, given: int, core: int, seconds: float) -> bool:
        """Whether no further case is run after `given` ones, of which the first `core` are the core plan."""
        if self.cases is not None and given >= self.cases:
            return True
        if given < core:
            return False
        if self.drawn is not None and given - core >= self.drawn:
            return True
        if self.seconds is not None:
            return seconds >= self.seconds
        return self.cases is None and self.drawn is None


@dataclass(frozen=True)
class Conditions:
    """What is run, and how.

    Attributes:
        subjects: what to test.
        plan: where the cases come from.
        budget: for each subject.
        device: `cpu` or `cuda`.
        virtual: all ranks of a case in one process on one GPU.
        timeout: seconds for one case.
        journal: where each case is noted before it starts.
        logs: the folder for what the ranks print.
        skip: cases that passed in an earlier run.
        joint: the subjects of a world size are variants of one kernel, and run one core plan together.
        given: the cases of each subject, instead of a plan; each runs in processes of its own.
        accept_refusals: a core plan of which most is refused may pass.
        diagnose: whether failing cases are explained and made smaller, which takes seconds each.
        progress: called after each case with the report so far.
    """

    subjects: Sequence[Subject]
    plan: Plan
    budget: Budget
    device: str = "cpu"
    virtual: bool = False
    timeout: float = 60.0
    journal: Journal | None = None
    logs: Path | None = None
    skip: frozenset[str] = frozenset()
    joint: bool = False
    given: Mapping[Subject, Sequence[Case]] | None = None
    accept_refusals: bool = False
    diagnose: bool = True
    progress: Callable[[KernelReport, Subject], None] = lambda _report, _subject: None

    @property
    def apart(self) -> bool:
        """Whether each case runs in processes of its own."""
        return self.given is not None

    def supports(self, backend: Backend, problem: Problem) -> Support:
        """Whether the backend takes every call of the Problem, and the device holds its virtual ranks."""
        if self.virtual and not (held := residency(problem)).ok:
            return held
        refused = (s for _, p in problem.calls() if not (s := backend.supports(p)).ok)
        return next(refused, backend.supports(problem))


class Turn:
    """Runs the cases of one subject.

    Args:
        how: of the run that it is part of.
        share: whose cases, and which.
        report: where they are counted.
        isolation: what makes failing cases smaller; shared by all subjects of a run.
        stop: Ctrl-C.
    """

    def __init__(
        self, how: Conditions, share: Share, report: KernelReport, isolation: Isolation, stop: Interruption
    ) -> None:
        self._how, self._share, self._report = how, share, report
        self._isolation, self._stop = isolation, stop
        self._subject, self._group = share.subject, report.groups[share.subject]
        self._backend = backends.backend(share.subject.backend)
        self._began, self._first_end = time.monotonic(), 0.0
        self._source = Shared(self._cases())
        self._histories: dict[int, list[dict[str, Any]]] = {}
        self._open: dict[int, tuple[str, Outcome, Outcome, set[Cell]]] = {}
        """By pool, the case that is being made smaller, as it is told if the run ends first."""
        self._gpu_checks = GpuChecks(pdl=getattr(self._backend, "pdl", False))

    def run(self, pools: Sequence[Restartable]) -> None:
        """Spread the cases over the pools, a thread each; the threads only wait for ranks."""
        errors: list[BaseException] = []

        def serve(pool: Restartable) -> None:
            try:
                for case, cells in self._source:
                    self._run_one(pool, case, cells)
            except BaseException as error:
                errors.append(error)
                self._source.stop()

        try:
            if len(pools) == 1:
                serve(pools[0])
            else:
                _serve_all(pools, serve, self._source)
        finally:
            with self._source.lock:
                for found in self._open.values():
                    self._note(*found)
                self._open.clear()
            ready = self._first_end or time.monotonic()
            self._group.starting = ready - self._began
            self._group.seconds = time.monotonic() - ready
        if errors:
            raise errors[0]

    def _cases(self) -> Iterator[tuple[Case, set[Cell]]]:
        """What is left to run: not refused, not done before, as long as the budget lasts."""
        how, report, coverage = self._how, self._report, self._share.coverage
        for given, (case, cells) in enumerate(self._share.stream(how.plan)):
            self._stop.check()
            since = time.monotonic() - self._first_end if self._first_end else 0.0
            if how.budget.spent(given, len(self._share.core), since):
                return
            if sum(group.failed for group in report.groups.values()) >= MOST_FINDINGS:
                return
            coverage.done += given < len(self._share.core)
            support = how.supports(self._backend, case.problem)
            if not support.ok:
                self._group.refused += 1
                report.refusals[support.reason] += 1
                coverage.refused |= cells
                coverage.turned_away += given < len(self._share.core)
            elif case.problem.to_json() in how.skip:
                coverage.reached.update(cells)
            else:
                yield case, cells

    def _run_one(self, pool: Restartable, case: Case, cells: set[Cell]) -> None:
        how, source = self._how, self._source
        line = case.problem.to_json()
        if how.journal is not None:
            with source.lock:
                how.journal.start(line, backend=self._subject.backend)
        if how.apart:
            pool.close()
        asked = self._request(case)
        outcome = run_case(pool, asked, timeout=how.timeout)
        if source.stopped and any(finding.stage is Stage.ALIVE for finding in outcome.findings):
            return  # ranks that end with an interrupted run prove nothing
        if outcome.findings:
            self._look_into(pool, asked, outcome, cells)
        else:
            self._history(pool).append(asked)
            with source.lock:
                self._note(line, outcome, outcome, cells)

    def _look_into(self, pool: Restartable, asked: dict[str, Any], outcome: Outcome, cells: set[Cell]) -> None:
        """Explain a failing case and make it smaller; if the run ends meanwhile, it is told as it is."""
        line, names = asked["problem"], []
        breach = any(finding.error == BreachError.__name__ for finding in outcome.findings)
        shown = self._lined(outcome, behind(asked, [] if self._how.apart else self._history(pool)))
        with self._source.lock:
            self._open[id(pool)] = line, outcome, shown, cells
        try:
            names = explain(pool, asked, outcome) if self._how.diagnose else []
            shown = self._shown(pool, asked, outcome, known=breach)
        finally:
            if breach:
                self._source.stop()  # every further case would say the same
            with self._source.lock:
                if self._open.pop(id(pool), None) is not None:
                    if names:
                        self._report.suggestions[line] = names
                    self._note(line, outcome, shown, cells)

    def _note(self, line: str, outcome: Outcome, shown: Outcome, cells: set[Cell]) -> None:
        """Count a case, end it in the journal, and say so."""
        journal = self._how.journal
        self._first_end = self._first_end or time.monotonic()
        self._report.add(self._subject, outcome, shown.findings)
        self._share.coverage.reached.update(cells)
        if journal is not None:
            stages = [finding.stage.value for finding in outcome.findings]
            verdict = "fail" if stages else "pass"
            journal.end(line, backend=self._subject.backend, verdict=verdict, stages=stages)
        self._how.progress(self._report, self._subject)

    def _history(self, pool: Restartable) -> list[dict[str, Any]]:
        """The requests that passed on a pool since its processes were started."""
        return self._histories.setdefault(id(pool), [])

    def _request(self, case: Case) -> dict[str, Any]:
        how = self._how
        checks = [check for check in case.checks if not (how.virtual and check == "unfused")]  # it needs a group
        if how.device == "cuda" and not how.virtual and not how.apart:
            checks += self._gpu_checks.of(case)
        before = [{"problem": x.problem.to_json(), "checks": list(x.checks)} for x in case.before]
        return request(case.problem, self._subject.backend, flow=self._subject.flow, checks=checks, before=before)

    def _shown(self, pool: Restartable, asked: dict[str, Any], outcome: Outcome, *, known: bool) -> Outcome:
        """The findings with the line that shows them again, of a smaller case unless it is known."""
        history, again, found = self._history(pool), True, outcome
        if self._how.diagnose and not self._how.apart and not known:
            asked, found, again = self._isolation.isolate(pool, asked, history, outcome)
            history.clear()
        # What explains the case was asked before it was made smaller.
        first = outcome.findings[0]
        found = replace(found, findings=[replace(f, like=first.like, varies=first.varies) for f in found.findings])
        return self._lined(found, asked, "" if again else ONCE)

    def _lined(self, outcome: Outcome, asked: dict[str, Any], remark: str = "") -> Outcome:
        """The findings with the line of the request that shows them again."""
        line = Question.of(asked, self._how.device, virtual=self._how.virtual).to_json()
        found = [replace(f, message=f.message + remark, question=line) for f in outcome.findings]
        return replace(outcome, findings=found)


def _serve_all(pools: Sequence[Restartable], serve: Callable[[Restartable], None], source: Shared) -> None:
    """A thread per pool; on Ctrl-C the cases in flight end, no further one starts."""
    threads = [threading.Thread(target=serve, args=(pool,), daemon=True) for pool in pools]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        source.stop()
        for thread in threads:
            thread.join(INTERRUPT_SECONDS)
        raise


class Shared:
    """An iterator that several threads draw from."""

    def __init__(self, source: Iterator[tuple[Case, set[Cell]]]) -> None:
        self._source, self.stopped = source, False
        self.lock = threading.Lock()

    def __iter__(self) -> Shared:
        return self

    def __next__(self) -> tuple[Case, set[Cell]]:
        with self.lock:
            if self.stopped:
                raise StopIteration
            return next(self._source)

    def stop(self) -> None:
        """Give out no more."""
        self.stopped = True
