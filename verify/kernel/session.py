"""A kernel run from its plan to its files: what the commands `kernel`, `replay` and `verify` share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from fusecheck.journal import FILE_NAME, Journal
from fusecheck.kernel.report import KernelReport
from fusecheck.kernel.run import Run
from fusecheck.kernel.screen import KernelProgress, show_kernel
from fusecheck.report import make_run_dir, write_markdown, write_result

console = Console()


def execute(run: Run, directory: Path) -> KernelReport:
    """Run with progress and a journal in `directory`, and print what it showed.

    Raises:
        UsageError: the journal cannot be written.
        Inconclusive: what the run needs is not here.
    """
    with Journal(directory / FILE_NAME) as journal:
        watched = replace(run, journal=journal, logs=directory / "ranks")
        with KernelProgress(watched, console) as progress:
            report = replace(watched, progress=progress).execute()
    report.printed = [f"ranks/{log.name}" for log in sorted((directory / "ranks").glob("*.log"))]
    show_kernel(report, console)
    for name in report.printed:
        console.out(f"a rank printed: {directory}/{name}", highlight=False)
    return report


def run_kernel(
    command: str, run: Run, run_dir: Path | None, json_file: Path | None, markdown: Path | None
) -> KernelReport:
    """Validate, run with progress, show, and write the run's files.

    Raises:
        UsageError: what cannot run, or a file that cannot be written.
    """
    run.validate()
    directory = make_run_dir(command, run_dir)
    report = execute(run, directory)
    record = write_result(directory, command, report.verdict, report.summary(), report.finding_records(), json_file)
    if markdown is not None:
        write_markdown(markdown, record)
    say_where(directory)
    return report


def say_where(directory: Path) -> None:
    """Print where the run's files are."""
    console.out(f"{directory}/result.json", highlight=False)
    console.out(f"{directory}/report.html", highlight=False)
