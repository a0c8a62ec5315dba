"""The parent's side: pools of ranks that stay, graphs spread over them, and what the ranks' reports come to."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusecheck.errors import UsageError
from fusecheck.graph.cases import GraphCase, Subject
from fusecheck.graph.collinear import PairPlan
from fusecheck.graph.config import ALL_ENABLED, TransformConfig
from fusecheck.graph.findings import Check, GraphFinding
from fusecheck.graph.plan import GraphPlan
from fusecheck.graph.results import GraphResult, judge_outcomes
from fusecheck.graph.worker import GraphJob
from fusecheck.ranks.hosts import LocalHost
from fusecheck.ranks.pool import Pool, wait
from fusecheck.ranks.replies import Reply, culprits
from fusecheck.ranks.zygote import OTHER_HASHES

WORKER = "fusecheck.graph.worker:GraphWorker"
PRELOAD = ("torch._dynamo",)
"""What every rank imports with the first fake tensor of a symbolic size, at a second a rank."""


def start_pool(world_size: int, device: str = "cpu") -> Pool:
    """Ranks of which the first hashes text otherwise than the rest, so that no decision can hang on it."""
    hosts = [LocalHost((0,))]
    if world_size > 1:
        hosts.append(LocalHost(tuple(range(1, world_size)), OTHER_HASHES))
    return Pool(WORKER, world_size, device=device, preload=PRELOAD, hosts=hosts)


BATCH = 4
"""Small graphs that ranks are given at once, so that each rank exports one while the others do."""


@dataclass
class _Failed:
    """What made ranks fail that were given several graphs; each is then asked alone.

    Attributes:
        findings: what came of it.
        earlier: the graphs that the ranks had been given.
        left: how many of the graphs have not been asked alone yet.
        shown: one of them made the ranks fail alone.
    """

    findings: list[GraphFinding]
    earlier: tuple[GraphCase, ...]
    left: int
    shown: bool = False

    def settle(self, result: GraphResult) -> None:
        """Note what came of a graph alone; a failure that none showed alone is the last one's."""
        self.left -= 1
        self.shown |= any(finding.check is Check.RUNS for finding in result.findings)
        if not self.left and not self.shown:
            result.findings += self.findings
            result.earlier = self.earlier


@dataclass
class _Batch:
    """Graphs by their place among all, and the failure that made them be asked alone."""

    cases: list[tuple[int, GraphCase]] = field(default_factory=list)
    failed: _Failed | None = None


def _batches(cases: Iterable[GraphCase]) -> list[_Batch]:
    """Neighbouring plans together, so many as ranks are given at once; a model alone, for it takes long."""
    found: list[_Batch] = []
    for number, case in enumerate(cases):
        last = found[-1].cases if found else []
        small = all(isinstance(each.plan, GraphPlan | PairPlan) for each in (case, *(known for _, known in last)))
        if not last or len(last) == BATCH or not small:
            found.append(_Batch())
        found[-1].cases.append((number, case))
    return found


class _Lane:
    """One pool of ranks, what it was given since it was started, and what it has in hand."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.given: tuple[GraphCase, ...] = ()
        self.batch: _Batch | None = None

    def stop(self) -> None:
        """End the ranks; the next call starts new ones."""
        self.pool.cancel()
        self.given, self.batch = (), None


class GraphChecker:
    """Checks graphs on pools of ranks.

    Args:
        subject: the pass.
        world_size: ranks.
        backend: the kernel that fused operators call.
        dialect: of the graphs.
        tokens: sizes to run at besides each graph's own.
        timeout: seconds for one graph.
        export: whether to export rewritten graphs again.
        device: `cpu` or `cuda`.
        transforms: configuration by transform name.
        lanes: pools of ranks among which `check_all` spreads the graphs; left out, as many as there are cores for.
    """

    def __init__(
        self,
        subject: Subject,
        world_size: int,
        *,
        backend: str = "emulated",
        dialect: str = "fusecheck",
        tokens: Sequence[int] = (1, 5),
        timeout: float = 60.0,
        export: bool = True,
        device: str = "cpu",
        transforms: Mapping[str, TransformConfig] = ALL_ENABLED,
        lanes: int | None = None,
    ) -> None:
        self.subject, self.world_size, self.timeout, self.transforms = subject, world_size, timeout, transforms
        self.backend, self.dialect, self.tokens, self.export = backend, dialect, tuple(tokens), export
        count = lanes or (1 if device == "cuda" else max(1, (os.cpu_count() or 1) // world_size))
        self._lanes = [_Lane(start_pool(world_size, device)) for _ in range(count)]
        self._owner = True

    def __enter__(self) -> GraphChecker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the ranks, unless they are another checker's."""
        if self._owner:
            for lane in self._lanes:
                lane.pool.close()

    def for_subject(self, subject: Subject) -> GraphChecker:
        """A checker of another pass on the same ranks."""
        other = copy.copy(self)
        other.subject, other._owner = subject, False
        return other

    def check(self, case: GraphCase) -> GraphResult:
        """Check one graph on all ranks."""
        return self.check_all([case])[0]

    def check_all(
        self, cases: Iterable[GraphCase], seen: Callable[[GraphResult], None] = lambda result: None
    ) -> list[GraphResult]:
        """Check graphs, spread over the pools; `seen` is told of each result as it comes. Results in order."""
        waiting = _batches(cases)
        results: dict[int, GraphResult] = {}
        try:
            while waiting or any(lane.batch for lane in self._lanes):
                for lane in self._lanes:
                    if lane.batch is None and waiting:
                        lane.batch = waiting.pop(0)
                        jobs = [self._job(case) for _, case in lane.batch.cases]
                        lane.pool.submit("check", jobs, timeout=self.timeout)
                wait(lane.pool for lane in self._lanes if lane.batch)
                for lane in self._lanes:
                    if lane.batch is None or (replies := lane.pool.poll()) is None:
                        continue
                    batch, lane.batch = lane.batch, None
                    if len(batch.cases) > 1 and not all(reply.ok for reply in replies):
                        waiting[:0] = self._apart(batch, replies, lane)
                        continue
                    for number, result in self._results(batch, replies, lane):
                        results[number] = result
                        seen(result)
        finally:
            for lane in self._lanes:
                if lane.batch:
                    lane.stop()
        return [results[number] for number in sorted(results)]

    def _apart(self, batch: _Batch, replies: Sequence[Reply], lane: _Lane) -> list[_Batch]:
        """The graphs of a batch that made ranks fail, each to be asked alone, in new ranks."""
        earlier = (*lane.given, *(case for _, case in batch.cases[:-1]))
        lane.stop()
        failed = _Failed(_failures(replies), earlier, len(batch.cases))
        return [_Batch([each], failed) for each in batch.cases]

    def _results(self, batch: _Batch, replies: Sequence[Reply], lane: _Lane) -> Iterator[tuple[int, GraphResult]]:
        for at, (number, case) in enumerate(batch.cases):
            result = self._result(case, [reply.value[at] for reply in replies if reply.ok], lane.given, replies)
            if batch.failed is not None:
                batch.failed.settle(result)
            # A pool that lost a rank starts anew.
            lane.given = () if any(reply.value is None for reply in replies) else (*lane.given, case)
            yield number, result

    def check_afresh(self, cases: Sequence[GraphCase]) -> GraphResult:
        """Check graphs in their order in ranks that have seen no other; returns the last result."""
        self._lanes[0].stop()
        return [self.check(case) for case in cases][-1]

    def _job(self, case: GraphCase) -> GraphJob:
        export = self.export and case.export
        common = (self.backend, self.dialect, self.tokens, export, case.alone, tuple(self.transforms.items()))
        return GraphJob(case.plan, self.subject.passes, *common)

    def _result(
        self,
        case: GraphCase,
        reports: Sequence[dict[str, Any]],
        earlier: tuple[GraphCase, ...],
        replies: Sequence[Reply],
    ) -> GraphResult:
        result = GraphResult(case, _failures(replies), earlier=() if case.alone else earlier)
        for record in (record for report in reports for record in report["findings"]):
            finding = GraphFinding.from_record(record)
            if all((finding.check, finding.message) != (known.check, known.message) for known in result.findings):
                result.findings.append(finding)
        if reports and not any(each.check in (Check.RUNS, Check.LINT, Check.RANKS) for each in result.findings):
            result.report = reports[0]
            judge_outcomes(result, self.subject, 1 if case.alone else self.world_size, self.transforms)
        return result


def _failures(replies: Sequence[Reply]) -> list[GraphFinding]:
    """What made ranks fail.

    Raises:
        UsageError: they were asked for something that there is not.
    """
    found = []
    for failure in culprits(replies):
        if failure.error == UsageError.__name__:
            raise UsageError(failure.message.partition(f"{failure.error}: ")[2] or failure.message)
        found.append(GraphFinding(Check.RUNS, str(failure), rank=failure.rank, traceback=failure.traceback))
    return found
