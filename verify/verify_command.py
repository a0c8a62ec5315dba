"""`fusecheck verify`: all that this machine can run, and what was left out and why, as one record and one page."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from fusecheck.dataflow import DATAFLOWS
from fusecheck.errors import UsageError
from fusecheck.inputs.families import FAMILIES
from fusecheck.kernel.plan import Plan
from fusecheck.kernel.report import Subject
from fusecheck.kernel.run import Budget, Run
from fusecheck.kernel.session import console, execute, say_where
from fusecheck.parts import reuse
from fusecheck.parts.agenda import NAMES, STEPS, divide, duration
from fusecheck.parts.runner import Steps, missing
from fusecheck.ranks.mpi import detect
from fusecheck.report import Verdict, make_run_dir, write_markdown, write_result
from fusecheck.report.groups import sentence
from fusecheck.report.places import JsonFile, MarkdownFile, RunDir
from fusecheck.report.record import parts

WORLD_SIZES = (2, 4, 8)
MOST_ELEMENTS = 2**18
"""tokens * hidden of the largest case: with one case of each family, half a minute for all kernels on two cores."""

START_SECONDS, OVERSHOOT = 3.0, 0.1
"""What starting the ranks of a world size takes, and by what share the cases in flight overrun their time."""


def register(app: typer.Typer) -> None:
    """Add the command `verify` to `app`."""
    app.command("verify")(verify_all)


def verify_all(
    seed: Annotated[int, typer.Option(help="Of the stream of cases.")] = 0,
    budget: Annotated[str | None, typer.Option(help="Time for all of it, such as 90s, 5m or 1h.")] = None,
    cases: Annotated[
        int | None, typer.Option(min=1, help=f"Of each kernel and world size; {len(FAMILIES)} without a budget.")
    ] = None,
    most_elements: Annotated[int, typer.Option(min=2**13, help="tokens * hidden of the largest case.")] = MOST_ELEMENTS,
    only: Annotated[str, typer.Option(help="Parts behind the kernel question, comma-separated, or none.")] = ",".join(
        NAMES
    ),
    resume: Annotated[
        Path | None,
        typer.Option(help="A verify run's directory: what passed there, by the same code, is not run again."),
    ] = None,
    markdown: MarkdownFile = None,
    json_file: JsonFile = None,
    run_dir: RunDir = None,
) -> None:
    """Run all that this machine can run, and say what was left out and why.

    The kernel question for the emulator under every known dataflow, then the graph question, the accuracy of the small
    model, the quick part of the fault catalogue, and latency where there are GPUs. Without a budget each part runs to
    its end, in three to four minutes on two idle cores. A budget also buys more cases and the long forms of the parts.

    Examples:
      fusecheck verify
      fusecheck verify --budget 30m --markdown summary.md
      fusecheck verify --only none --cases 32 --most-elements 524288
      fusecheck verify --resume runs/20260102T030405Z-verify
    """
    seconds = duration(budget) if budget is not None else None
    chosen = _chosen(only)
    began = time.monotonic()
    possible = [step for step in STEPS if step.name in chosen and not missing(step.name) and detect() is None]
    division = divide(possible, seconds)
    asked = _Asked(seed, cases, most_elements, division.kernel)
    run = asked.run()
    run.validate()
    directory = make_run_dir("verify", _place(resume, run_dir))
    kernel = reuse.recall(directory / "kernel", asked.arguments()) if resume else None
    reused = ["kernel"] if kernel else []
    kernel = kernel or _ask_kernel(asked, run, directory)
    deadline = None if seconds is None else began + seconds
    stopped = bool(kernel["summary"]["interrupted"])
    steps = Steps(directory, console, deadline, resume=resume is not None, stopped=stopped)
    for step in STEPS:
        steps.take(step, division.forms.get(step.name), wanted=step.name in chosen)
    reused += steps.reused
    verdict = Verdict.worst([Verdict(kernel["verdict"]), *steps.verdicts()])
    record = write_result(
        directory, "verify", verdict, _summary(kernel, steps, reused), _findings(kernel, steps), json_file
    )
    if markdown is not None:
        write_markdown(markdown, record)
    _show(record)
    say_where(directory)
    if verdict is not Verdict.PASS:
        raise typer.Exit(verdict.exit_code)


@dataclass(frozen=True)
class _Asked:
    """What is asked of the kernel question.

    Attributes:
        seed: of the stream of cases.
        cases: of each subject, as given.
        most_elements: of the largest case.
        seconds: for all subjects; None without a budget.
    """

    seed: int
    cases: int | None
    most_elements: int
    seconds: float | None

    def run(self) -> Run:
        """Every dataflow at every world size."""
        subjects = [Subject(f"emulated:{name}", size) for size in WORLD_SIZES for name in DATAFLOWS]
        count = len(FAMILIES) if self.cases is None and self.seconds is None else self.cases
        share = None if self.seconds is None else _share(self.seconds, len(subjects))
        plan = Plan(seed=self.seed, most_elements=self.most_elements)
        return Run(subjects, plan, Budget(count, share))

    def arguments(self) -> list[str]:
        """The same as words, by which two runs are known to have asked the same."""
        run = self.run()
        return ["kernel", *(f"{s.backend} tp {s.world_size}" for s in run.subjects), repr(self), repr(run.budget)]


def _share(seconds: float, subjects: int) -> float:
    """Seconds of each subject, so that with the start of the ranks and the last case of each all end in time."""
    return max(seconds - START_SECONDS * len(WORLD_SIZES), seconds / 2) * (1 - OVERSHOOT) / subjects


def _ask_kernel(asked: _Asked, run: Run, directory: Path) -> dict[str, Any]:
    """Run the kernel question; its record is also kept in a folder of its own, for a run that resumes."""
    report = execute(run, directory)
    folder = directory / "kernel"
    folder.mkdir(exist_ok=True)
    record = write_result(folder, "kernel", report.verdict, report.summary(), report.finding_records())
    if not report.interrupted:
        reuse.keep(folder, asked.arguments())
    return record


def _place(resume: Path | None, run_dir: Path | None) -> Path | None:
    """The run's directory as given.

    Raises:
        UsageError: nothing to resume, or two places.
    """
    if resume is not None and not resume.is_dir():
        raise UsageError(f"--resume {resume}: no such directory, expected that of a verify run")
    if resume is not None and run_dir is not None and resume.resolve() != run_dir.resolve():
        raise UsageError(f"--resume {resume} goes on in that directory, got --run-dir {run_dir} too; leave it out")
    return resume or run_dir


def _chosen(only: str) -> set[str]:
    chosen = {part.strip() for part in only.split(",")} - {"none"}
    for name in chosen - set(NAMES):
        raise UsageError(f"--only {name!r}, expected none or of: {', '.join(NAMES)}")
    return chosen


def _summary(kernel: dict[str, Any], steps: Steps, reused: list[str]) -> dict[str, Any]:
    done = {name: {"verdict": r["verdict"], "summary": r["summary"]} for name, r in steps.done.items()}
    own = {"kernel_verdict": kernel["verdict"], "parts": done, "not_run": steps.not_run, "reused": reused}
    return {**kernel["summary"], **own}


def _findings(kernel: dict[str, Any], steps: Steps) -> list[dict[str, Any]]:
    behind = [{**finding, "part": name} for name, r in steps.done.items() for finding in r["findings"]]
    return [*kernel["findings"], *behind]


def _show(record: dict[str, Any]) -> None:
    """A line for each part that was run, and for each that was not."""
    reused = record["summary"]["reused"]
    for part in parts(record):
        again = " (of the earlier run: same code, same question)" if part.question in reused else ""
        line = f"{part.verdict}  {part.question}: {sentence(part)}{again}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for left in record["summary"]["not_run"]:
        console.print(f"not run: {left['part']}: {left['reason']}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{record['verdict']}: all that was run", highlight=False)
