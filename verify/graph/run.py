"""The parent's side: pools of ranks that stay, graphs spread over them, and what the ranks' reports come to."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

from fusecheck.errors import UsageError
from fusecheck.graph.cases import GraphCase, Subject
from fusecheck.graph.config import ALL_ENABLED, TransformConfig
from fusecheck.graph.findings import Check, GraphFinding
from fusecheck.graph.results import GraphResult, judge_outcomes
from fusecheck.graph.worker import GraphJob
from fusecheck.ranks.hosts import LocalHost
from fusecheck.ranks.pool import Pool, wait
from fusecheck.ranks.replies import Reply, culprits
from fusecheck.ranks.zygote import OTHER_HASHES

WORKER = "fusecheck.graph.worker:GraphWorker"
PRELOAD = (WORKER.partition(":")[0], "torch._dynamo")
"""What every rank imports; the second with the first fake tensor of a symbolic size, at a second a rank."""


def start_pool(world_size: int, device: str = "cpu") -> Pool:
    """Ranks of which the first hashes text otherwise than the rest, so that no decision can hang on it."""
    hosts = [LocalHost((0,))]
    if world_size > 1:
        hosts.append(LocalHost(tuple(range(1, world_size)), OTHER_HASHES))
    return Pool(WORKER, world_size, device=device, preload=PRELOAD, hosts=hosts)


class _Lane:
    """One pool of ranks, and what it was given since it was started."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.given: list[GraphCase] = []


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
        waiting = list(enumerate(cases))[::-1]
        busy: dict[_Lane, tuple[int, GraphCase]] = {}
        results: dict[int, GraphResult] = {}
        try:
            while waiting or busy:
                for lane in self._lanes:
                    if lane not in busy and waiting:
                        busy[lane] = waiting.pop()
                        lane.pool.submit("check", self._job(busy[lane][1]), timeout=self.timeout)
                wait(lane.pool for lane in busy)
                for lane in list(busy):
                    replies = lane.pool.poll()
                    if replies is not None:
                        number, case = busy.pop(lane)
                        results[number] = self._result(case, replies, tuple(lane.given))
                        # A pool that lost a rank starts anew.
                        lane.given = [] if any(reply.value is None for reply in replies) else [*lane.given, case]
                        seen(results[number])
        finally:
            for lane in busy:
                lane.pool.cancel()
        return [results[number] for number in sorted(results)]

    def check_afresh(self, cases: Sequence[GraphCase]) -> GraphResult:
        """Check graphs in their order in ranks that have seen no other; returns the last result."""
        lane = self._lanes[0]
        lane.pool.cancel()
        lane.given = []
        return [self.check(case) for case in cases][-1]

    def _job(self, case: GraphCase) -> GraphJob:
        export = self.export and case.export
        common = (self.backend, self.dialect, self.tokens, export, tuple(self.transforms.items()))
        return GraphJob(case.plan.to_json(), self.subject.passes, *common)

    def _result(self, case: GraphCase, replies: Sequence[Reply], earlier: tuple[GraphCase, ...]) -> GraphResult:
        result = GraphResult(case, earlier=earlier)
        for failure in culprits(replies):
            if failure.error == UsageError.__name__:
                raise UsageError(failure.message.partition(f"{failure.error}: ")[2] or failure.message)
            result.findings.append(
                GraphFinding(Check.RUNS, str(failure), rank=failure.rank, traceback=failure.traceback)
            )
        reports = [reply.value for reply in replies if reply.ok]
        for record in (record for report in reports for record in report["findings"]):
            finding = GraphFinding.from_record(record)
            if all((finding.check, finding.message) != (known.check, known.message) for known in result.findings):
                result.findings.append(finding)
        if reports and not any(each.check in (Check.RUNS, Check.LINT, Check.RANKS) for each in result.findings):
            result.report = reports[0]
            judge_outcomes(result, self.subject, self.world_size, self.transforms)
        return result
