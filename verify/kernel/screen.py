"""What the terminal shows of a kernel run: progress while it runs, a table and the findings at its end."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fusecheck.kernel.report import KernelReport, Subject
from fusecheck.kernel.run import Run
from fusecheck.ranks.mpi import detect
from fusecheck.report import Verdict

COLUMNS = (
    ("backend", "tp", "cases", "refused", "elements", "seconds", "failed"),
    ("backend", "tp", "cases", "elements", "failed"),
    ("backend", "tp", "cases", "failed"),
)
"""Of the table: the most that fit the console; the files have all."""

WIDE = 110
"""Columns of a console that holds the whole progress line."""

SHOWN = 10
"""Findings on the terminal; the files have all."""


class KernelProgress:
    """A progress bar with cases, elements, rate and findings; silent where there is no terminal.

    Args:
        run: what will be run; its budget gives the bar its length.
        console: where to draw.
    """

    def __init__(self, run: Run, console: Console) -> None:
        self._by_time = run.budget.cases is None and run.budget.seconds is not None
        self._total = float((run.budget.seconds if self._by_time else run.budget.cases) or 0) * len(run.subjects)
        wide = console.width >= WIDE
        self._bar = Progress(
            SpinnerColumn(),
            *([TextColumn("{task.description}"), BarColumn(bar_width=None)] if wide else []),
            TextColumn("{task.fields[note]}"),
            *([TimeElapsedColumn()] if wide else []),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal or detect() is not None,  # mpirun would interleave it
        )
        self._task = self._bar.add_task("starting ranks", total=self._total or None, note="")

    def __enter__(self) -> KernelProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, report: KernelReport, subject: Subject) -> None:
        """Redraw after a case."""
        elapsed = self._bar.tasks[0].elapsed or 1e-9
        note = f"{report.cases} cases  {report.elements / 1e6:.1f} M elements"
        if self._bar.console.width >= WIDE:
            note += f"  {report.elements / elapsed / 1e6:.1f} M/s"
        if report.findings:
            note += f"  [red]{len(report.findings)} findings[/red]"
        done = elapsed if self._by_time else float(report.cases + sum(g.refused for g in report.groups.values()))
        self._total = max(self._total, float(sum(coverage.cases for coverage in report.coverages)))
        self._bar.update(
            self._task,
            total=self._total or None,
            completed=min(done, self._total),
            description=f"{escape(subject.backend)} tp {subject.world_size}",
            note=note,
        )


def show_kernel(report: KernelReport, console: Console) -> None:
    """Print the table of subjects, the findings, and the verdict as the last line."""
    tables = [_table(report, columns) for columns in COLUMNS]
    unbounded = console.options.update(max_width=10_000)
    fitting = (table for table in tables if Measurement.get(console, unbounded, table).maximum <= console.width)
    console.print(next(fitting, tables[-1]))
    for finding in report.findings[:SHOWN]:
        console.out(finding.line(), highlight=False)
    if len(report.findings) > SHOWN:
        console.print(f"... and {len(report.findings) - SHOWN} more findings, in result.json")
    console.print(_sentence(report), highlight=False, soft_wrap=True)


def _table(report: KernelReport, columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        left = name == "backend"
        table.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for group in report.groups.values():
        judged = f" as {group.subject.flow}" if group.subject.flow else ""
        cells = {
            "backend": escape(group.subject.backend + judged),
            "tp": str(group.subject.world_size),
            "cases": str(group.cases),
            "refused": str(group.refused),
            "elements": f"{group.elements:,}",
            "seconds": f"{group.seconds:.1f}",
            "failed": f"[red]{group.failed}[/red]" if group.failed else "0",
        }
        table.add_row(*(cells[name] for name in columns))
    return table


def _sentence(report: KernelReport) -> str:
    summary = report.summary()
    codes = summary["codes_per_element"]
    rate = summary["elements_per_second"] / 1e6
    starting = sum(group.starting for group in report.groups.values())
    facts = f"{report.cases} cases, {report.elements:,} output elements in {report.seconds:.1f} s ({rate:.1f} M/s)"
    facts += f", of them {starting:.1f} s of starting" if starting else ""
    facts += f", {codes:.5f} admissible codes per element" if codes else ""
    off = ", ".join(f"{k} {a / b:.1e}" for k, (a, b) in summary["off_nominal"].items() if a and k in _SHARES)
    facts += f"; off nominal: {off}" if off else ""
    colour = {"pass": "green", "fail": "red", "inconclusive": "yellow"}[report.verdict.value]
    open_ = report.open if report.verdict is Verdict.INCONCLUSIVE else ""
    why = f" ({open_})" if open_ else ""
    return f"[bold {colour}]{report.verdict.value}[/]{escape(why + ': ' + _reached(report))}{facts}"


def _reached(report: KernelReport) -> str:
    """How much of the core plan was reached and refused; empty where cases were given instead."""
    core = report.summary()["core"]
    if not core["cells"]:
        return ""
    refused = f", {core['refused']} refused" if core["refused"] else ""
    why = f" ({report.refusals.most_common(1)[0][0]})" if core["refused"] and report.refusals else ""
    return f"{core['reached']} of {core['cells']} cells of the core plan reached{refused}{why}; "


_SHARES = ("residual", "norm", "quant")
