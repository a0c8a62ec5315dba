"""The kernel question: run cases on pools of ranks until a count or a time, and sum up what they showed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fusecheck import backends
from fusecheck.case.run import WORKER, Caller, explain, request, run_case
from fusecheck.errors import BreachError, UsageError
from fusecheck.interface import Backend, Support
from fusecheck.journal import Journal
from fusecheck.kernel.plan import Case, Plan
from fusecheck.kernel.report import Group, KernelReport, Subject
from fusecheck.kernel.virtual import VirtualPool, VirtualPools, residency
from fusecheck.problem import Problem
from fusecheck.ranks.launch import Pools, open_pools, require_gpus
from fusecheck.report import Interruption
from fusecheck.verdict import Stage

MOST_FINDINGS = 50
"""After so many failing cases the run stops: more say nothing new."""


INTERRUPT_SECONDS = 5.0
"""How long the cases in flight may take after Ctrl-C."""


@dataclass(frozen=True)
class Budget:
    """When a subject has had enough: cases, seconds, or both (whichever comes first)."""

    cases: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Run:
    """A run of the kernel question.

    Attributes:
        subjects: what to test.
        plan: where the cases come from.
        budget: for each subject.
        device: `cpu` or `cuda`.
        virtual: all ranks of a case in one process on one GPU.
        timeout: seconds for one case.
        journal: where each case is noted before it starts.
        logs: the folder for what the ranks print.
        skip: cases that an earlier run has done.
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
    progress: Callable[[KernelReport, Subject], None] = lambda _report, _subject: None

    def validate(self) -> None:
        """Refuse what cannot run, before anything is started or written.

        Raises:
            UsageError: an unknown backend, or a shape, value or world size that it or a Problem refuses.
        """
        for subject in self.subjects:
            backend = backends.backend(subject.backend)
            check_device(backend, self.device, 1 if self.virtual else subject.world_size)
            reasons: Counter[str] = Counter()
            for case in islice(self.plan.cases(subject.world_size), 4 * len(self.plan.families)):
                support = self._supports(backend, case.problem)
                if support.ok:
                    backend.dataflow(case.problem)
                    break
                reasons[support.reason] += 1
            else:
                reason = reasons.most_common(1)[0][0]
                raise UsageError(f"backend {subject.backend} refuses every case at tp {subject.world_size}: {reason}")

    def execute(self) -> KernelReport:
        """Run every subject's cases; Ctrl-C ends the run with what it has."""
        report = KernelReport()
        report.groups = {subject: Group(subject) for subject in self.subjects}
        began = time.monotonic()
        with Interruption() as stop:
            for world_size in dict.fromkeys(subject.world_size for subject in self.subjects):
                mine = [subject for subject in self.subjects if subject.world_size == world_size]
                with self._open(world_size) as pools:
                    for subject in mine:
                        self._run_subject(subject, pools.pools, report, stop)
        report.interrupted = stop.happened
        report.seconds = time.monotonic() - began
        return report

    def _open(self, world_size: int) -> Pools | VirtualPools:
        options: dict[str, Any] = {"device": self.device, "preload": ("fusecheck.case.worker",)}
        options["output"] = None if self.logs is None else self.logs / f"tp{world_size}"
        if self.virtual:
            return VirtualPools(VirtualPool(world_size, **options))
        return open_pools(WORKER, world_size, **options)

    def _supports(self, backend: Backend, problem: Problem) -> Support:
        """Whether the backend takes every call of the Problem, and the device holds its virtual ranks."""
        if self.virtual and not (held := residency(problem)).ok:
            return held
        refused = (s for _, p in problem.calls() if not (s := backend.supports(p)).ok)
        return next(refused, backend.supports(problem))

    def _run_subject(self, subject: Subject, pools: Sequence[Caller], report: KernelReport, stop: Interruption) -> None:
        """Spread one subject's cases over the pools, a thread each; the threads only wait for ranks."""
        began = time.monotonic()
        source = _Shared(self._cases(subject, report, began, stop))
        errors: list[BaseException] = []

        def serve(pool: Caller) -> None:
            try:
                for case in source:
                    self._run_one(pool, subject, case, report, source)
            except BaseException as error:
                errors.append(error)
                source.stop()

        if len(pools) == 1:
            serve(pools[0])
        else:
            _serve_all(pools, serve, source)
        report.groups[subject].seconds = time.monotonic() - began
        if errors:
            raise errors[0]

    def _run_one(self, pool: Caller, subject: Subject, case: Case, report: KernelReport, source: _Shared) -> None:
        line = case.problem.to_json()
        if self.journal is not None:
            with source.lock:
                self.journal.start(line, backend=subject.backend)
        checks = [check for check in case.checks if not (self.virtual and check == "unfused")]  # it needs a group
        if self.device == "cuda" and not self.virtual and "repeat" in checks:
            checks += ["graphs", "streams"]
            checks += ["neighbours"] * getattr(backends.backend(subject.backend), "pdl", False)
        asked = request(case.problem, subject.backend, flow=subject.flow, checks=checks)
        outcome = run_case(pool, asked, timeout=self.timeout)
        if source.stopped and any(finding.stage is Stage.ALIVE for finding in outcome.findings):
            return  # ranks that end with an interrupted run prove nothing
        names = explain(pool, asked, outcome) if outcome.findings else []
        if any(finding.error == BreachError.__name__ for finding in outcome.findings):
            source.stop()  # every further case would say the same
        with source.lock:
            report.add(subject, outcome)
            if names:
                report.suggestions[line] = names
            if self.journal is not None:
                stages = [finding.stage.value for finding in outcome.findings]
                self.journal.end(line, backend=subject.backend, verdict="fail" if stages else "pass", stages=stages)
            self.progress(report, subject)

    def _cases(self, subject: Subject, report: KernelReport, began: float, stop: Interruption) -> Iterator[Case]:
        backend = backends.backend(subject.backend)
        group = report.groups[subject]
        for given, case in enumerate(self.plan.cases(subject.world_size)):
            stop.check()
            enough = self.budget.cases is not None and given >= self.budget.cases
            late = self.budget.seconds is not None and time.monotonic() - began >= self.budget.seconds
            if enough or late or sum(g.failed for g in report.groups.values()) >= MOST_FINDINGS:
                return
            support = self._supports(backend, case.problem)
            if not support.ok:
                group.refused += 1
                report.refusals[support.reason] += 1
            elif case.problem.to_json() not in self.skip:
                yield case


def check_device(backend: Backend, device: str, gpus: int) -> None:
    """Check that the backend runs on the device, and that there are as many GPUs as it needs.

    Raises:
        UsageError: it runs on another device.
        Inconclusive: there are fewer GPUs.
    """
    needed = getattr(backend, "device", None)
    if needed is not None and needed != device:
        raise UsageError(f"backend {backend.name} runs on {needed}, got --device {device}; give --device {needed}")
    if device == "cuda":
        require_gpus(gpus)


def _serve_all(pools: Sequence[Caller], serve: Callable[[Caller], None], source: _Shared) -> None:
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


class _Shared:
    """An iterator that several threads draw from."""

    def __init__(self, source: Iterator[Case]) -> None:
        self._source, self.stopped = source, False
        self.lock = threading.Lock()

    def __iter__(self) -> _Shared:
        return self

    def __next__(self) -> Case:
        with self.lock:
            if self.stopped:
                raise StopIteration
            return next(self._source)

    def stop(self) -> None:
        """Give out no more."""
        self.stopped = True
