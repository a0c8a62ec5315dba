"""What `fusecheck graph` shows and writes: progress, the table of rows, the summary, one line a finding."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fusecheck.graph.cases import GraphCase
from fusecheck.graph.findings import Check
from fusecheck.graph.ops import SEPARATE_STRATEGIES
from fusecheck.graph.plan import GraphPlan
from fusecheck.graph.question import Question
from fusecheck.graph.results import GraphResult, Status, systemic
from fusecheck.report import Verdict

SHOWN = 12
"""Findings printed; all are in result.json."""


class GraphProgress:
    """A progress bar over graphs, with the number of findings.

    Args:
        console: where to draw.
        total: how many graphs there are.
        results: every result that is seen is added here.
    """

    def __init__(self, console: Console, total: int, results: list[GraphResult]) -> None:
        columns = (TextColumn("graphs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[found]} findings"), console=console, transient=True)
        self._task = self._bar.add_task("graphs", total=total, found=0)
        self._results, self._found = results, 0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return round(time.monotonic() - self._started, 1)

    def __enter__(self) -> GraphProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def seen(self, result: GraphResult) -> None:
        """Count one result."""
        self._results.append(result)
        self._found += len(result.findings)
        self._bar.update(self._task, advance=1, found=self._found)


Replays = dict[str, "tuple[GraphCase, ...] | None"]
"""What must come before a graph for its findings to show, by its name; None where they did not show again."""


def summarise(results: Sequence[GraphResult], question: Question, seconds: float) -> dict[str, Any]:
    """The figures of a run, JSON-ready."""
    rows = [result for result in results if _is_row(result)]
    outcomes = Counter(got or "not fused" for result in results for _, got in result.outcomes.values())
    reports = [result.report for result in results if result.report]
    separate = sum(
        got is not None and result.case.plan.sites[index].strategy in SEPARATE_STRATEGIES
        for result in results
        if isinstance(result.case.plan, GraphPlan)
        for index, (_, got) in result.outcomes.items()
    )
    return {
        "pass": question.subject.name,
        "replay": question.line(),
        "tp": question.world_size,
        "backend": question.backend,
        "dialect": question.dialect,
        "graphs": len(results),
        "rows": len(rows),
        "sites": dict(outcomes),
        "fused_but_separate_on_device": separate,
        "elements": sum(report["elements"] for report in reports),
        "differing_from_unfused": sum(report["differing"] for report in reports),
        "kernel_elements": sum(report["kernel_elements"] for report in reports),
        "off_nominal": sum(report["off_nominal"] for report in reports),
        "checks": dict(Counter(finding.check.value for result in results for finding in result.open_findings)),
        "systemic": {check.value: count for check, count in systemic(results).items()},
        **{f"rows_{status.name.lower()}": _names(rows, status, frozenset(systemic(results))) for status in Status},
        "seconds": seconds,
    }


def _is_row(result: GraphResult) -> bool:
    return bool(result.case.title)


def _names(rows: Sequence[GraphResult], status: Status, ignored: frozenset[Check]) -> list[str]:
    return [result.case.name for result in rows if result.status(ignored) is status]


def finding_records(results: Sequence[GraphResult], question: Question, replays: Replays) -> list[dict[str, Any]]:
    """Every finding with its graph and the line that replays it, JSON-ready; waived ones with their reason."""
    return [
        finding.to_record()
        | {
            "case": result.case.name,
            "title": result.case.title,
            "graph": result.case.plan.to_json(),
            "replay": replay_line(result, question, replays)[0],
        }
        for result in results
        for finding in result.findings
    ]


def replay_line(result: GraphResult, question: Question, replays: Replays) -> tuple[str, str]:
    """The command that shows a result's findings again, and what is to be known of it."""
    earlier = replays.get(result.case.name, ())
    question = replace(question, world_size=1) if result.case.alone else question
    line = question.line(*(case.plan.to_json() for case in (*(earlier or ()), result.case)))
    if earlier is None:
        return line, "it did not show again in fresh ranks: the pass does not do the same each time"
    return line, f"only after {', '.join(case.name for case in earlier)}: the pass keeps something" if earlier else ""


def show(
    results: Sequence[GraphResult],
    summary: dict[str, Any],
    verdict: Verdict,
    replay: Callable[[GraphResult], tuple[str, str]],
    console: Console,
) -> None:
    """Print what holds for the pass as a whole, the rows that are not as expected, the findings and the figures."""
    common = systemic(results)
    for check, count in common.items():
        first = next(each for result in results for each in result.open_findings if each.check is check)
        _line(console, f"{check.value}: on {count} of {len(results)} graphs, for example: {first.message}")
    ignored = frozenset(common)
    odd = [result for result in results if _is_row(result) and result.status(ignored) is not Status.EXPECTED]
    if odd:
        console.print(_table(odd, ignored))
    told = {
        (result.case.name, finding.check): (result, finding)
        for result in results
        for finding in reversed(result.open_findings)
        if finding.check not in ignored
    }
    for result, finding in list(told.values())[:SHOWN]:
        _line(console, f"{finding.check.value}: {result.case.name}: rank {finding.rank}: {finding.message}")
        line, known = replay(result)
        _line(console, f"  replay: {line}" + (f"  ({known})" if known else ""))
    if len(told) > SHOWN:
        _line(console, f"... and {len(told) - SHOWN} more in result.json")
    for line in _figures(results, summary, verdict, ignored):
        _line(console, line)


def _line(console: Console, text: str) -> None:
    console.out(text, highlight=False)


def _figures(
    results: Sequence[GraphResult], summary: dict[str, Any], verdict: Verdict, ignored: frozenset[Check]
) -> list[str]:
    rows = [result.status(ignored) for result in results if _is_row(result)]
    counts = ", ".join(f"{rows.count(status)} {status.value}" for status in Status if status in rows)
    apart = f" (apart from: {', '.join(check.value for check in ignored)})" if ignored else ""
    sites = ", ".join(f"{count} {name}" for name, count in sorted(summary["sites"].items()))
    ending = verdict.value.upper() + (", interrupted" if summary["interrupted"] else "")
    absent = summary["does_not_arise"]
    lines = [
        f"graph: {ending}  {summary['pass']} on {summary['graphs']} graphs, tp {summary['tp']}, "
        f"backend {summary['backend']}, dialect {summary['dialect']}, {summary['seconds']} s",
        *(f"  {name}: {why}" for name, why in summary["unjudged"].items()),
        f"  edge cases: {counts}{apart}" if rows else "",
        f"  {len(absent)} rows do not arise in {summary['dialect']}: {', '.join(absent)}" if absent else "",
        f"  {summary['waived']} findings waived" if summary["waived"] else "",
        *(f"  unused waiver {text}: nothing had to be accepted, take it out" for text in summary["unused_waivers"]),
        f"  sites: {sites}" if sites else "",
        f"  {summary['elements']} output elements compared bit by bit, {summary['kernel_elements']} kernel elements "
        f"judged, {summary['differing_from_unfused']} outputs differ from the unfused graph's",
        f"  {summary['fused_but_separate_on_device']} sites are fused in the graph but separate kernels on the device "
        f"(strategy {', '.join(SEPARATE_STRATEGIES)})",
        f"  {summary['library']}" if summary["library"] else "",
    ]
    return [line for line in lines if line]


def _table(results: Sequence[GraphResult], ignored: frozenset[Check]) -> Table:
    table = Table(title="edge cases that are not as expected", title_justify="left")
    for name in ("row", "what", "status", "why"):
        table.add_column(name, overflow="fold")
    for result in results:
        found = [finding for finding in result.findings if finding.check not in ignored]
        told = (f"{each.waived}: " * bool(each.waived) + f"{each.check.value}: {each.message}" for each in found)
        why = "; ".join(dict.fromkeys(told)) or "; ".join(result.left.values())
        table.add_row(result.case.name, result.case.title, result.status(ignored).value, Text(why[:140]))
    return table
