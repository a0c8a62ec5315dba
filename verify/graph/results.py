"""What came of each graph: findings, outcomes of its sites, and what all of it says in a word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from fusecheck.graph.cases import NORM_OP, GraphCase, Subject, expected
from fusecheck.graph.collinear import PairPlan
from fusecheck.graph.config import TransformConfig
from fusecheck.graph.family import kind_of
from fusecheck.graph.files import FilePlan
from fusecheck.graph.findings import Check, GraphFinding, Kind
from fusecheck.graph.inspection import PLAIN_ROLES
from fusecheck.graph.model_plan import ModelPlan
from fusecheck.operations import FusionOp

ONE_SUM = "one sum over ranks"


class Status(str, Enum):
    """What came of one case, in a word."""

    EXPECTED = "as expected"
    LEFT = "left"
    """The pass did less than it could, which is allowed."""
    MISSED = "missed"
    """A site that must fuse did not, or not with its quantise; nothing is wrong with what there is."""
    AGAINST = "against a rule"
    """Something was fused that must not be, though no value shows it."""
    BROKEN = "broken"
    """Something is wrong with what the pass made."""
    WAIVED = "waived"
    """Only known gaps."""


@dataclass
class GraphResult:
    """What came of one case.

    Attributes:
        case: the graph.
        findings: of all ranks and of the comparison with what was expected; equal ones once.
        outcomes: per site (expected, got), as operation names; empty for models.
        left: sites where the pass did less than it could, which is allowed, with what was expected.
        report: rank 0's report, empty where no rank answered.
        earlier: the graphs that the same ranks were given before, first to last.
    """

    case: GraphCase
    findings: list[GraphFinding] = field(default_factory=list)
    outcomes: dict[int, tuple[str | None, str | None]] = field(default_factory=dict)
    left: dict[int, str] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    earlier: tuple[GraphCase, ...] = ()

    @property
    def open_findings(self) -> list[GraphFinding]:
        """Those that nobody has accepted."""
        return [finding for finding in self.findings if not finding.waived]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong but what is accepted."""
        return not self.open_findings

    @property
    def fused(self) -> int:
        """How many fused operators the graph has, and sums over ranks of what a rank has summed."""
        counts: Mapping[str, int] = self.report.get("counts", {})
        return sum(count for role, count in counts.items() if role not in PLAIN_ROLES)

    @property
    def judged(self) -> int:
        """Elements that the oracle or a comparison has seen of fused operators."""
        return int(self.report.get("kernel_elements", 0) + self.report.get("separate_elements", 0))

    @property
    def unjudged(self) -> str:
        """Why nothing follows from a user's graph without a finding; empty where something does."""
        if not isinstance(self.case.plan, FilePlan) or self.case.plan.expect or not self.ok:
            return ""
        if not self.fused:
            return "nothing was fused; say --expect sites=0 if that is right"
        return "" if self.judged else "nothing that was fused could be judged"

    def status(self, ignored: frozenset[Check] = frozenset()) -> Status:
        """In a word, leaving out what some checks say."""
        findings = [finding for finding in self.open_findings if finding.check not in ignored]
        if not findings:
            waived = any(finding.check not in ignored for finding in self.findings)
            return Status.WAIVED if waived else Status.LEFT if self.left else Status.EXPECTED
        kinds = {finding.kind for finding in findings}
        return Status.BROKEN if "broken" in kinds else Status.AGAINST if "against a rule" in kinds else Status.MISSED


def systemic(results: Sequence[GraphResult]) -> dict[Check, int]:
    """Checks that object to most graphs in which something fused, with the number of graphs.

    They say something about the pass as a whole, and would hide what single graphs show.
    """
    fused = [result for result in results if any(got for _, got in result.outcomes.values())]
    objections = Counter(check for result in fused for check in {finding.check for finding in result.open_findings})
    return {check: count for check, count in objections.items() if count > max(1, len(fused) // 2)}


def judge_outcomes(
    result: GraphResult, subject: Subject, world_size: int, transforms: Mapping[str, TransformConfig]
) -> None:
    """Add what became of each site to a result, and a finding where it is not what was expected."""
    plan = result.case.plan
    if isinstance(plan, FilePlan):
        counts: dict[str, int] = {role: count for role, count in result.report["counts"].items() if count}
        counts["sites"] = result.fused
        for role, wanted in plan.expect.items():
            if (got := counts.get(role, 0)) != wanted:
                kind: Kind = "missed" if role != "all_reduce" and got < wanted else "broken"
                message = f"the graph has {got} {role}, --expect says {wanted}"
                result.findings.append(GraphFinding(Check.COUNTS, message, kind=kind))
    elif isinstance(plan, ModelPlan):
        made = 1 if subject.merges else world_size  # as on one rank, where nothing fuses either
        quant = kind_of(plan.quantiser) in subject.moved and not subject.merges
        _judge_counts(result, plan.counts(quant=quant), plan, made)
    elif isinstance(plan, PairPlan):
        _judge_pairs(result, plan)
    else:
        outcomes = {int(site): name for site, name in result.report["outcomes"].items()}
        for index in range(len(plan.sites)):
            wanted_of = expected(subject, plan, index, world_size, transforms)
            wanted_name, got_name = _name(wanted_of.fused), outcomes.get(index)
            result.outcomes[index] = (wanted_name, got_name)
            if got_name == wanted_name:
                continue
            if got_name in [_name(each) for each in wanted_of.also]:
                result.left[index] = f"{wanted_name} expected, {got_name} is allowed"
                continue
            rule = f"{','.join(wanted_of.rows)}: {wanted_of.why}".removeprefix(": ")
            became = f"site {index} became {got_name or 'nothing fused'}, expected {wanted_name or 'nothing'} ({rule})"
            less = wanted_name is not None and got_name in (None, NORM_OP.value)
            result.findings.append(
                GraphFinding(Check.SITES, became, index, kind="missed" if less else "against a rule")
            )


def _judge_pairs(result: GraphResult, plan: PairPlan) -> None:
    """All pairs of a graph are alike: all must become one sum over ranks each, or none."""
    counts: Mapping[str, int] = result.report["counts"]
    merged, wanted = counts.get("merged", 0), plan.pairs * plan.merges
    result.outcomes[0] = (ONE_SUM if wanted else None, ONE_SUM if merged else None)
    told = f"{merged} sums over ranks are of sums that a rank has made, expected {wanted}"
    if merged < wanted:
        result.findings.append(GraphFinding(Check.SITES, told, 0, kind="missed"))
    elif merged > wanted and plan.add != "broadcast":
        result.findings.append(GraphFinding(Check.SITES, told, 0, kind="against a rule"))
    elif counts.get("all_reduce", 0) > wanted > 0:
        result.left[0] = f"{wanted} sums over ranks expected, {counts['all_reduce']} are allowed"


def _judge_counts(result: GraphResult, wanted: dict[str, int], plan: ModelPlan, world_size: int) -> None:
    if world_size == 1:
        wanted = {"all_reduce": 2 * plan.layers, "norm": wanted.get("norm", 0) + 2 * plan.layers}
    got = {role: count for role, count in result.report["counts"].items() if count}
    if got == wanted:
        return
    fused = [role for role in {**got, **wanted} if role not in PLAIN_ROLES]
    quantising = [role for role in fused if "QUANT" in role]
    less = all(
        sum(got.get(role, 0) for role in roles) <= sum(wanted.get(role, 0) for role in roles)
        for roles in (fused, quantising)
    )
    kind: Kind = "missed" if less and _sums(got, fused) == _sums(wanted, fused) else "broken"
    result.findings.append(GraphFinding(Check.COUNTS, f"the graph has {got}, expected {wanted}", kind=kind))


def _sums(counts: Mapping[str, int], fused: Sequence[str]) -> int:
    """Sums over the ranks, fused or not."""
    return counts.get("all_reduce", 0) + sum(counts.get(role, 0) for role in fused)


def _name(op: FusionOp | None) -> str | None:
    return None if op is None else op.value
