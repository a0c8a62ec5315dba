"""The kill matrix on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fusecheck.faults.listed import Judged
from fusecheck.faults.results import Report, Result
from fusecheck.faults.scale_sensitivity import ScaleRow
from fusecheck.faults.sensitivity import RUNS, RowResult

MARKS = {"kill": "x", "miss": ".", "hang": "h"}


def line(result: Result) -> str:
    """One fault in one line, as it is printed while the run goes on."""
    state = (
        f"caught in case {result.cases} by {result.stages[0]}" if result.stages else f"SURVIVED {result.cases} cases"
    )
    return f"{result.fault.id:8} {state:44} {result.seconds:6.1f} s  {result.fault.title}"


def show(console: Console, report: Report) -> None:
    """The kill rates, the criteria's columns where they were asked, and what survived."""
    summary = report.summary()
    table = Table("group", "faults", "caught", title="Who notices: Fusecheck")
    for name, figures in summary["groups"].items():
        table.add_row(name, str(figures["faults"]), str(figures["killed"]))
    table.add_row("all", str(summary["faults"]), str(summary["killed"]), style="bold")
    console.print(table)
    if summary["killed"]:
        stages = ", ".join(f"{stage} {count}" for stage, count in summary["stages"].items())
        console.print(
            f"median cases until caught {summary['median_cases_until_caught']}, "
            f"most {summary['most_cases_until_caught']}; first noticed by {stages}",
            highlight=False,
        )
    console.print(
        f"false alarms {summary['false_alarms']} over {summary['legal_cases']} cases of right kernels; "
        f"{len(summary['left_out'])} published bugs are not re-created; {summary['seconds']} s",
        highlight=False,
    )
    if summary["criteria"]:
        _show_criteria(console, report)
    for record in report.findings():
        console.print(
            f"{record['kind']}: {record.get('fault') or record.get('subject')}: {record['message']}", markup=False
        )


def _show_criteria(console: Console, report: Report) -> None:
    summary = report.summary()
    table = Table("criterion", "passes when", "ours", "their own", "false alarms", title="Who notices: the field")
    for row in summary["criteria"]:
        own = "-" if row["killed_on_their_inputs"] is None else f"{row['killed_on_their_inputs']}/{row['faults']}"
        alarms = f"{row['false_alarms'][0]}/{row['false_alarms'][1]}"
        table.add_row(row["name"], row["formula"], f"{row['killed_on_our_inputs']}/{row['faults']}", own, alarms)
    console.print(table)
    for result in report.results[report.seeds[0]]:
        if result.columns is not None:
            marks = "".join(MARKS[mark] for mark in result.columns.ours.values())
            by = f" by {', '.join(result.columns.ours)}" if result.fault.quantiser else ""
            noticed = result.stages[0] if result.stages else "SURVIVED"
            console.print(f"{result.fault.id:8} {noticed:14} {marks}{by}", highlight=False)
    console.print(
        "x rejects it, . does not, h noticed by its CI's timeout only; columns in the order above, on our inputs; "
        "of a quantiser in the order that its line names. "
        "Where two of the own tests hang, the rest are taken to hang too."
    )
    console.print(
        "Every criterion is given a perfect reference. A rejection counts where the right kernel passes on the same "
        "inputs; a dash is a criterion without a test of such a kernel. "
        "Of their own shapes some are run, the small ones. "
        "False alarms are on our inputs, NaN and infinities among them."
    )
    for row in summary["criteria"]:
        if row["note"]:
            console.print(f"{row['name']}: {row['note']}", highlight=False)


def show_sensitivity(console: Console, rows: list[RowResult], any_order: float, deep: float) -> None:
    """The table of defects, and the smallest scale errors."""
    table = Table("defect", "codes, any order", "codes, depth", "all outputs", "", title=f"Rejected runs of {RUNS}")
    for row in rows:
        table.add_row(row.defect.name, *[str(n) for n in row.rejected], "" if row.kept else "EXPECTED MORE")
    console.print(table)
    console.print(f"smallest scale error rejected: {any_order:.2e} in any order, {deep:.2e} with the depth declared")


def show_scales(console: Console, rows: list[ScaleRow]) -> None:
    """The smallest uniform error of scales, by quantiser and declared arithmetic."""
    table = Table("quantiser", "declared", "rejected from", "", title="Smallest error of all scales at once")
    for row in rows:
        told = f"{row.steps} {row.unit}" if row.steps else "not rejected"
        table.add_row(row.quantiser, row.rules, told, "" if row.sharp else f"EXPECTED {row.expected}")
    console.print(table)


def show_listed(console: Console, judged: list[Judged]) -> None:
    """What became of somebody else's kernels."""
    table = Table("kernel", "expected to", "verdict", "cases", "noticed by")
    for each in judged:
        verdict = "as expected" if each.as_expected else "NOT AS EXPECTED"
        stages = ", ".join(each.caught.stages)
        table.add_row(
            each.kernel.title or each.kernel.backend, each.kernel.expect, verdict, str(each.caught.cases), stages
        )
    console.print(table)
