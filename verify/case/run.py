"""One case on one pool: send it, collect every rank's record, turn what is wrong into findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol

from fusecheck.case.finding import Finding
from fusecheck.errors import BreachError
from fusecheck.inputs.families import FAMILIES
from fusecheck.problem import Problem
from fusecheck.ranks import Failure, FailureKind, Reply, culprits
from fusecheck.verdict import Stage, off_nominal_budget

WORKER = "fusecheck.case.worker:CaseWorker"
CHECKS = ("repeat", "strategies", "unfused", "layouts")
"""Stages 5 and 6: what a case may check beyond its own call."""

ON_GPU = ("graphs", "streams", "hurried", "neighbours")
"""Checks that only a GPU can make; they compare with other calls' bits, and judge nothing by itself."""

REPEATS = 3
"""Further calls that a failing case makes, to see whether it comes out the same."""

_SPREAD = ("gaussian", "saturating", "subnormal-codes", "e4m3-ties", "outliers", "cancelling")
"""Families whose normed values have spread significands, so that a share of them can be asserted."""


class Caller(Protocol):
    """Calls a method of the worker on every rank: a `Pool`, or what answers like one."""

    def call(self, method: str, *arguments: Any, timeout: float) -> list[Reply]:
        """One reply per rank, in rank order."""
        ...


@dataclass
class Outcome:
    """What one case showed.

    Attributes:
        problem: the case.
        findings: in stage order; empty when it passed.
        elements: outputs judged, over all ranks; ranks that agree bit by bit share one judgement.
        off_nominal: elements that differ from the nominal, by stage.
        codes: admissible codes summed over the sample, and the sample's size.
        histogram: code distance fused against unfused, when that was checked.
        kernel_seconds, judge_seconds: of the slowest rank.
    """

    problem: Problem
    findings: list[Finding] = field(default_factory=list)
    elements: int = 0
    off_nominal: Counter[str] = field(default_factory=Counter)
    judged: Counter[str] = field(default_factory=Counter)
    codes: tuple[int, int] = (0, 0)
    histogram: Counter[str] = field(default_factory=Counter)
    kernel_seconds: float = 0.0
    judge_seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.findings


def request(
    problem: Problem,
    backend: str,
    *,
    flow: str | None = None,
    checks: Sequence[str] = (),
    limits: tuple[int, int] | None = None,
    fresh: bool = False,
    before: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """What a pool's ranks are asked to run.

    Args:
        problem: the case.
        backend: its name, or `package.module:attribute`.
        flow: a dataflow to judge by, instead of the backend's own.
        checks: of `CHECKS`.
        limits: (max_tokens, hidden) of the workspace to keep open.
        fresh: on a workspace of its own, as a Problem with a schedule always is.
        before: earlier requests, whose cases run first on the same workspace; only the last one is judged.
    """
    case: dict[str, Any] = {"problem": problem.to_json(), "backend": backend, "checks": list(checks)}
    if flow is not None:
        case["dataflow"] = flow
    if limits is not None:
        case["limits"] = list(limits)
    if fresh:
        case["fresh"] = True
    if before:
        case["before"] = [{"problem": earlier["problem"], "checks": earlier["checks"]} for earlier in before]
    return case


def run_case(pool: Caller, case: dict[str, Any], *, timeout: float = 60.0) -> Outcome:
    """Run a case to its verdict, asking the ranks again where they disagree.

    A rank that hangs, crashes or raises is a finding of stage `alive`; the pool restarts by itself.
    """
    replies = pool.call("run", case, timeout=timeout)
    outcome = collect(case, replies)
    if any("unwritten" in record for reply in replies if reply.ok for record in reply.value["calls"]):
        _confirm_unwritten(pool, case, outcome, timeout)
    if outcome.findings and all(f.stage is Stage.AGREE for f in outcome.findings) and all(r.ok for r in replies):
        outcome.findings = [_locate(pool, finding, timeout) for finding in outcome.findings]
        _judge_all(pool, case, outcome, timeout)
    return outcome


def _confirm_unwritten(pool: Caller, case: dict[str, Any], outcome: Outcome, timeout: float) -> None:
    """Where outputs held the poison, run once more on another one: what held both was not written."""
    replies = pool.call("unwritten", case, timeout=timeout)
    if not all(reply.ok for reply in replies):
        outcome.findings[:0] = collect(case, replies).findings
        return
    found = Outcome(outcome.problem)
    for reply in replies:
        for index, tally in enumerate(reply.value):
            if tally is not None:
                where = f"call {index} " if index or outcome.problem.schedule else ""
                _merge_tallies(
                    found, case, {"tallies": [tally]}, f"{where}rank {reply.rank}", case.get("dataflow") or "-"
                )
    outcome.findings[:0] = found.findings


def explain(pool: Caller, case: dict[str, Any], outcome: Outcome, *, timeout: float = 60.0) -> list[str]:
    """Say of the findings of the case that the pool ran last what explains them, as far as that can be known.

    Two things: the known dataflows under which every element is inside, which are returned as well; and whether the
    same call comes out otherwise when it is repeated.
    """
    if not outcome.findings or any(f.stage is Stage.ALIVE for f in outcome.findings):
        return []
    replies = pool.call("explain", timeout=timeout)
    if not all(reply.ok for reply in replies):
        return []
    common = set.intersection(*(set(reply.value) for reply in replies))
    names = [name for name in replies[0].value if name in common and name != outcome.findings[0].dataflow]
    replies = pool.call("varying", case, REPEATS, timeout=timeout)
    different = max((reply.value for reply in replies), default=0) if all(reply.ok for reply in replies) else None
    varies = ""
    if different is not None:
        again = f"{different} of {REPEATS} repeats of the same call differ"
        varies = f"varies from call to call: {again}" if different else f"the same in {REPEATS} repeats of the call"
    outcome.findings = [replace(f, like=tuple(names), varies=varies) for f in outcome.findings]
    return names


def collect(case: dict[str, Any], replies: Sequence[Reply]) -> Outcome:
    """Merge the ranks' records into one outcome."""
    outcome = Outcome(_parse(case["problem"]))
    outcome.findings = [_of_failures(case, alike) for alike in _alike(culprits(replies))]
    if outcome.findings:
        return outcome
    records = [reply.value["calls"] for reply in replies]
    for index, per_rank in enumerate(zip(*records, strict=True)):
        _merge_call(outcome, case, index, per_rank)
    order = list(Stage)
    outcome.findings.sort(key=lambda finding: order.index(finding.stage))
    return outcome


def _alike(failures: Sequence[Failure]) -> list[list[Failure]]:
    """The failures, those of one kind with one message together; hangs are one, for each names every rank."""
    together: dict[str, list[Failure]] = {}
    for failure in failures:
        together.setdefault(f"{failure.kind.value} {failure.message}", []).append(failure)
    return list(together.values())


def _of_failures(case: dict[str, Any], alike: Sequence[Failure]) -> Finding:
    """One finding of ranks that failed alike."""
    first = alike[0]
    ranks = ", ".join(str(rank) for rank in sorted(failure.rank for failure in alike))
    what = first.message
    if first.error == BreachError.__name__:
        what = what.partition(": ")[2]
    elif first.kind is not FailureKind.ERROR:
        what = f"{first.kind.value}: {what}"
    message = what if first.kind is FailureKind.HANG else f"rank {ranks} {what}"
    return Finding(
        Stage.ALIVE,
        case["problem"],
        message,
        case.get("dataflow", "-"),
        error=first.error,
        traceback=first.traceback,
        output=first.output,
    )


_parse = lru_cache(maxsize=64)(Problem.from_json)


def _merge_call(outcome: Outcome, case: dict[str, Any], index: int, per_rank: Sequence[dict[str, Any]]) -> None:
    step = _parse(per_rank[0]["problem"])
    name = per_rank[0].get("dataflow", case.get("dataflow") or "-")
    where = f"call {index} " if index or outcome.problem.schedule else ""
    outcome.kernel_seconds += max(r.get("kernel_seconds", 0.0) for r in per_rank)
    outcome.judge_seconds += max(r.get("judge_seconds", 0.0) for r in per_rank)
    digests = [record.get("digests") for record in per_rank]
    if any(d != digests[0] for d in digests):
        outputs = [n for n in digests[0] or {} if any((d or {}).get(n) != (digests[0] or {})[n] for d in digests)]
        message = f"{where}{', '.join(outputs) or 'outputs'} differ between ranks"
        outcome.findings.append(Finding(Stage.AGREE, case["problem"], message, name))
    for rank, record in enumerate(per_rank):
        _merge_tallies(outcome, case, record, f"{where}rank {rank}", name)
        sample = record.get("codes")
        if sample:
            outcome.codes = (outcome.codes[0] + sample["codes"], outcome.codes[1] + sample["elements"])
            if sample["property"]:
                message = f"{where}family {step.family}: {sample['property']}"
                outcome.findings.append(Finding(Stage.PROPERTY, case["problem"], message, name))
        outcome.histogram.update(record.get("histogram") or {})
    if "check" not in per_rank[0]:
        _check_budget(outcome, case, step, name, per_rank)
        count = sum(name != "scale" for name in step.op.returns)
        outcome.elements += count * step.elements * step.world_size


def _merge_tallies(outcome: Outcome, case: dict[str, Any], record: dict[str, Any], where: str, name: str) -> None:
    for tally in record["tallies"]:
        outcome.off_nominal[tally["stage"]] += tally["off_nominal"]
        outcome.judged[tally["stage"]] += tally["elements"]
        if not tally["outside"]:
            continue
        if record.get("check") and tally["stage"] != Stage.UNFUSED.value:
            where = f"{where.removesuffix(' ')} check {record['check']}"
        message = f"{where} {tally['outside']} elements outside"
        shown = tally["shown"]
        if shown and shown[0]["row"] < 0:
            message = f"{where} {'; '.join(each['got'] + ', expected ' + each['admissible'] for each in shown)}"
        elif shown:
            first = shown[0]
            message = (
                f"{where} element[{first['row']},{first['column']}] {first['context']} got {first['got']} admissible"
                f" {first['admissible']} ({tally['outside']} elements)"
            )
        finding = Finding(Stage(tally["stage"]), case["problem"], message, name, tally["outside"])
        outcome.findings.append(finding)


def _check_budget(
    outcome: Outcome, case: dict[str, Any], step: Problem, name: str, per_rank: Iterable[dict[str, Any]]
) -> None:
    """Fail the norm stage where more norms differ from the nominal than the legal error can explain."""
    shares = [record.get("off_nominal_share") for record in per_rank]
    share = next((share for share in shares if share is not None), None)
    if step.family not in _SPREAD or not FAMILIES[step.family].finite or share is None:
        return
    tallies = [t for record in per_rank for t in record["tallies"] if t["stage"] == Stage.NORM.value]
    off, elements = sum(t["off_nominal"] for t in tallies), sum(t["elements"] for t in tallies)
    budget = off_nominal_budget(share, elements)
    if off > budget:
        message = f"{off} of {elements} norms differ from the nominal, at most {budget:.0f} can by rounding alone"
        outcome.findings.append(Finding(Stage.NORM, case["problem"], message, name, off))


def _locate(pool: Caller, finding: Finding, timeout: float) -> Finding:
    """Name the first element in which ranks differ."""
    index = 0
    if finding.message.startswith("call "):
        index = int(finding.message.split()[1])
    replies = pool.call("row_digests", index, timeout=timeout)
    if not all(reply.ok for reply in replies):
        return finding
    for output, rows in replies[0].value.items():
        for other in replies[1:]:
            differing = [i for i, pair in enumerate(zip(rows, other.value[output], strict=True)) if pair[0] != pair[1]]
            if differing:
                return _name_element(pool, finding, (index, output, differing[0]), (0, other.rank), timeout)
    return finding


def _name_element(
    pool: Caller, finding: Finding, place: tuple[int, str, int], ranks: tuple[int, int], timeout: float
) -> Finding:
    replies = pool.call("row_bits", *place, timeout=timeout)
    if not all(reply.ok for reply in replies):
        return finding
    left, right = (replies[rank].value for rank in ranks)
    column = next(i for i, pair in enumerate(zip(left, right, strict=True)) if pair[0] != pair[1])
    message = (
        f"{finding.message}: {place[1]} element[{place[2]},{column}] is {left[column] & 0xFFFF:#06x} on rank {ranks[0]}"
        f" and {right[column] & 0xFFFF:#06x} on rank {ranks[1]}"
    )
    return Finding(finding.stage, finding.problem, message, finding.dataflow)


def _judge_all(pool: Caller, case: dict[str, Any], outcome: Outcome, timeout: float) -> None:
    """Where ranks disagree, each rank's share is not everyone's: judge all rows on every rank."""
    for reply in pool.call("judge_all", timeout=timeout):
        for index, tallies in enumerate(reply.value or []):
            name = outcome.findings[0].dataflow
            _merge_tallies(outcome, case, {"tallies": tallies}, f"call {index} rank {reply.rank}", name)
