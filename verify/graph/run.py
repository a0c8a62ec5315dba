"""The parent's side: which graphs to check, one pool of ranks, and what the ranks' reports come to."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from fusecheck.graph.build import MAX_TOKENS
from fusecheck.graph.config import BOTH_ENABLED, NORM_PASS, QUANT_PASS, SharedConfig, TransformConfig
from fusecheck.graph.files import FilePlan
from fusecheck.graph.findings import Check, GraphFinding
from fusecheck.graph.model_plan import ModelPlan
from fusecheck.graph.plan import Expectation, GraphPlan, expectation
from fusecheck.graph.random_graphs import random_plan
from fusecheck.graph.rows import ROWS
from fusecheck.graph.worker import GraphJob
from fusecheck.interface import FusionOp
from fusecheck.ranks.pool import Pool
from fusecheck.ranks.replies import culprits

WORKER = "fusecheck.graph.worker:GraphWorker"
NORM_OP = FusionOp.RESIDUAL_RMS_NORM


@dataclass(frozen=True)
class Subject:
    """The pass under test and where it stands.

    Attributes:
        name: `package.module:function`, or the short name of one of Fusecheck's own.
        after_norm: it gets the graph that the norm pass made, else the graph as exported.
        quantises: it makes quantising operators, else only norms.
    """

    name: str = QUANT_PASS
    after_norm: bool = True
    quantises: bool = True

    @property
    def passes(self) -> tuple[str, ...]:
        """All passes to run, the subject last."""
        return (NORM_PASS, self.name) if self.after_norm else (self.name,)


@dataclass(frozen=True)
class GraphCase:
    """A graph with a name.

    Attributes:
        name: of the row, the seed or the model.
        plan: what to build.
        title: in words.
    """

    name: str
    plan: GraphPlan | ModelPlan | FilePlan
    title: str = ""


class Status(str, Enum):
    """What came of one case, in a word."""

    EXPECTED = "as expected"
    LEFT = "left"
    """The pass did less than it could, which is allowed."""
    MISSED = "missed"
    """A site that must fuse did not, or not with its quantise."""
    BROKEN = "broken"
    """Something is wrong with what the pass made."""


@dataclass
class GraphResult:
    """What came of one case.

    Attributes:
        case: the graph.
        findings: of all ranks and of the comparison with what was expected; equal ones once.
        outcomes: per site (expected, got), as operation names; empty for models.
        left: sites where the pass did less than it could, which is allowed, with what was expected.
        report: rank 0's report, empty where no rank answered.
    """

    case: GraphCase
    findings: list[GraphFinding] = field(default_factory=list)
    outcomes: dict[int, tuple[str | None, str | None]] = field(default_factory=dict)
    left: dict[int, str] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def status(self, ignored: frozenset[Check] = frozenset()) -> Status:
        """In a word, leaving out what some checks say."""
        findings = [finding for finding in self.findings if finding.check not in ignored]
        if not findings:
            return Status.LEFT if self.left else Status.EXPECTED
        missed = all(
            finding.check is Check.SITES and finding.site is not None and _less(*self.outcomes[finding.site])
            for finding in findings
        )
        return Status.MISSED if missed else Status.BROKEN


def _less(wanted: str | None, got: str | None) -> bool:
    """Whether a site got less than it must: nothing, or a norm without its quantise."""
    return wanted is not None and got in (None, NORM_OP.value)


def systemic(results: Sequence[GraphResult]) -> dict[Check, int]:
    """Checks that object to most graphs in which something fused, with the number of graphs.

    They say something about the pass as a whole, and would hide what single graphs show.
    """
    fused = [result for result in results if any(got for _, got in result.outcomes.values())]
    objections = Counter(check for result in fused for check in {finding.check for finding in result.findings})
    return {check: count for check, count in objections.items() if count > max(1, len(fused) // 2)}


def row_cases(world_size: int) -> list[GraphCase]:
    """The named edge cases that this world size can show."""
    wanted = [row for row in ROWS if (row.world_size or max(world_size, 2)) == world_size]
    return [GraphCase(row.name, row.plan, row.title) for row in wanted]


def random_cases(count: int, seed: int) -> Iterator[GraphCase]:
    """Random graphs; the same for the same seed."""
    for number in range(count):
        yield GraphCase(f"random-{seed + number}", random_plan(seed + number))


def expected(
    subject: Subject,
    plan: GraphPlan,
    index: int,
    world_size: int,
    transforms: Mapping[str, TransformConfig] = BOTH_ENABLED,
) -> Expectation:
    """What must become of a site, given which passes run and how they are configured."""
    full = expectation(plan, index, world_size)
    if full.fused is None:
        return full
    if reason := _switched_off(NORM_PASS, plan, transforms):
        return Expectation(None, (), ("D8",), reason)
    reason = _switched_off(QUANT_PASS, plan, transforms) if subject.quantises else "the quantising pass does not run"
    if not reason:
        return full
    also = (None,) if None in full.also else ()
    return Expectation(NORM_OP, also, full.rows, reason)


def _switched_off(name: str, plan: GraphPlan, transforms: Mapping[str, TransformConfig]) -> str:
    """Why a transform leaves the whole graph alone; empty where it does not."""
    config = SharedConfig(transforms=transforms).config(name)
    if not config.enabled:
        return f"{name} is not enabled"
    fixed = None if plan.dynamic else plan.tokens
    return config.policy.refusal(fixed, MAX_TOKENS if fixed is None else fixed) or ""


class GraphChecker:
    """Checks graphs on a pool of ranks.

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
        pool: ranks to use; left out, the checker starts its own and stops them when closed.
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
        pool: Pool | None = None,
        transforms: Mapping[str, TransformConfig] = BOTH_ENABLED,
    ) -> None:
        self.subject, self.world_size, self.timeout, self.transforms = subject, world_size, timeout, transforms
        self.backend, self.dialect, self.tokens, self.export = backend, dialect, tuple(tokens), export
        self._owner = pool is None
        self._pool = pool or Pool(WORKER, world_size, device=device, preload=(WORKER.partition(":")[0],))

    def __enter__(self) -> GraphChecker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the ranks, unless they were handed in."""
        if self._owner:
            self._pool.close()

    def for_subject(self, subject: Subject) -> GraphChecker:
        """A checker of another pass on the same ranks."""
        other = copy.copy(self)
        other.subject, other._owner = subject, False
        return other

    def check(self, case: GraphCase) -> GraphResult:
        """Check one graph on all ranks."""
        source = case.plan.to_json()
        common = (self.backend, self.dialect, self.tokens, self.export, tuple(self.transforms.items()))
        job = GraphJob(source, self.subject.passes, *common)
        replies = self._pool.call("check", job, timeout=self.timeout)
        result = GraphResult(case)
        for failure in culprits(replies):
            result.findings.append(GraphFinding(Check.RUNS, str(failure), rank=failure.rank))
        reports = [reply.value for reply in replies if reply.ok]
        for record in (record for report in reports for record in report["findings"]):
            finding = GraphFinding(Check(record["check"]), record["message"], record["site"], record["rank"])
            if all((finding.check, finding.message) != (known.check, known.message) for known in result.findings):
                result.findings.append(finding)
        if reports and not self._unsound(result):
            result.report = reports[0]
            self._judge(result)
        return result

    def check_all(
        self, cases: Iterable[GraphCase], seen: Callable[[GraphResult], None] = lambda result: None
    ) -> list[GraphResult]:
        """Check graphs in turn; `seen` is told of each result as it comes."""
        results = []
        for case in cases:
            results.append(self.check(case))
            seen(results[-1])
        return results

    @staticmethod
    def _unsound(result: GraphResult) -> bool:
        return any(each.check in (Check.RUNS, Check.LINT, Check.RANKS) for each in result.findings)

    def _judge(self, result: GraphResult) -> None:
        plan = result.case.plan
        if isinstance(plan, FilePlan):
            return
        if isinstance(plan, ModelPlan):
            self._judge_counts(result, plan)
            return
        outcomes = {int(site): name for site, name in result.report["outcomes"].items()}
        for index in range(len(plan.sites)):
            wanted = expected(self.subject, plan, index, self.world_size, self.transforms)
            got = outcomes.get(index)
            result.outcomes[index] = (_name(wanted.fused), got)
            if got == _name(wanted.fused):
                continue
            if got in [_name(each) for each in wanted.also]:
                result.left[index] = f"{_name(wanted.fused)} expected, {got} is allowed"
                continue
            rule = f"{','.join(wanted.rows)}: {wanted.why}"
            message = (
                f"site {index} became {got or 'nothing fused'}, expected {_name(wanted.fused) or 'nothing'} ({rule})"
            )
            result.findings.append(GraphFinding(Check.SITES, message, index))

    def _judge_counts(self, result: GraphResult, plan: ModelPlan) -> None:
        wanted = plan.counts(quant=self.subject.quantises)
        if self.world_size == 1:
            wanted = {"all_reduce": 2 * plan.layers, "norm": wanted.get("norm", 0) + 2 * plan.layers}
        got = {role: count for role, count in result.report["counts"].items() if count}
        if got != wanted:
            result.findings.append(GraphFinding(Check.COUNTS, f"the graph has {got}, expected {wanted}"))


def _name(op: FusionOp | None) -> str | None:
    return None if op is None else op.value
