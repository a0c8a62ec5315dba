"""`fusecheck verify`: all that this machine can run, and what was left out and why, as one record and one page."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from verify.dataflow import DATAFLOWS
from verify.errors import UsageError
from verify.inputs.families import FAMILIES
from verify.kernel.plan import Plan
from verify.kernel.report import KernelReport, Subject
from verify.kernel.run import Budget, Run
from verify.kernel.session import console, execute, say_where
from verify.ranks.mpi import detect
from verify.report import Verdict, make_run_dir, write_markdown, write_result
from verify.report.groups import sentence
from verify.report.record import parts, read_run

WORLD_SIZES = (2, 4, 8)
CHEAP = 90.0
"""Seconds that each part behind the kernel question may take without a budget; dearer parts need one."""

KERNEL_SHARE = 0.5
"""Of a budget, at most so much goes to the kernel question."""


@dataclass(frozen=True)
class Step:
    """A part behind the kernel question: a command of its own, so that it can be stopped when its time is up.

    Attributes:
        name: the command.
        arguments: its quick form.
        seconds: that it takes about, on two cores.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float


STEPS = (
    Step("graph", ("--random", "10", "--no-export"), 60.0),
    Step("accuracy", ("--quick",), 150.0),
    Step("faults", ("--quick",), 200.0),
)
NAMES = [step.name for step in STEPS]


def register(app: typer.Typer) -> None:
    """Add the command `verify` to `app`."""
    app.command("verify")(verify_all)


def verify_all(
    seed: Annotated[int, typer.Option(help="Of the stream of cases.")] = 0,
    budget: Annotated[str | None, typer.Option(help="Time for all of it, such as 90s, 5m or 1h.")] = None,
    only: Annotated[str, typer.Option(help="Parts behind the kernel question, comma-separated, or none.")] = ",".join(
        NAMES
    ),
    markdown: Annotated[Path | None, typer.Option(help="Write a summary here.", dir_okay=False)] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write result.json here too.", dir_okay=False)
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where the files go; default runs/<utc>-verify/.")] = None,
) -> None:
    """Run all that this machine can run, and say what was left out and why.

    The kernel question for the emulator under every known dataflow, then the graph question; with enough --budget also
    accuracy of the small model, and the quick part of the fault catalogue.

    Examples:
      fusecheck verify
      fusecheck verify --budget 15m --markdown summary.md
    """
    seconds = duration(budget) if budget is not None else None
    chosen = _chosen(only)
    began = time.monotonic()
    subjects = [Subject(f"emulated:{name}", size) for size in WORLD_SIZES for name in DATAFLOWS]
    share = None if seconds is None else KERNEL_SHARE * seconds / len(subjects)
    run = Run(subjects, Plan(seed=seed), Budget(2 * len(FAMILIES), share))
    run.validate()
    directory = make_run_dir("verify", run_dir)
    report = execute(run, directory)
    steps = Steps(directory, None if seconds is None else began + seconds, stopped=report.interrupted)
    for step in STEPS:
        steps.take(step, wanted=step.name in chosen)
    steps.leave_out("latency", _why_no_latency())
    verdict = Verdict.worst([report.verdict, *steps.verdicts()])
    record = write_result(directory, "verify", verdict, _summary(report, steps), _findings(report, steps), json_file)
    if markdown is not None:
        write_markdown(markdown, record)
    _show(record)
    say_where(directory)
    if verdict is not Verdict.PASS:
        raise typer.Exit(verdict.exit_code)


class Steps:
    """Runs parts one after the other and keeps their records, and the reasons for those that were left out.

    Args:
        directory: of the run; each part gets a folder in it.
        deadline: of all parts, on the monotonic clock; None for no budget.
        stopped: whether the user has already had enough.
    """

    def __init__(self, directory: Path, deadline: float | None, *, stopped: bool = False) -> None:
        self._directory, self._deadline, self._stopped = directory, deadline, stopped
        self.done: dict[str, dict[str, Any]] = {}
        self.not_run: list[dict[str, str]] = []

    def leave_out(self, name: str, reason: str) -> None:
        """Note that a part was not run."""
        self.not_run.append({"part": name, "reason": reason})

    def verdicts(self) -> list[Verdict]:
        """Those of the parts that were run."""
        return [Verdict(record["verdict"]) for record in self.done.values()]

    def take(self, step: Step, *, wanted: bool) -> None:
        """Run a part if it is wanted and there is time, else note why not."""
        reason = self._refusal(step, wanted=wanted)
        if reason:
            self.leave_out(step.name, reason)
            return
        limit = CHEAP if self._deadline is None else self._deadline - time.monotonic()
        try:
            self._run(step, limit)
        except KeyboardInterrupt:
            self._stopped = True
            self.leave_out(step.name, "interrupted")

    def _refusal(self, step: Step, *, wanted: bool) -> str:
        if not wanted:
            return "left out by --only"
        if self._stopped:
            return "interrupted"
        if detect() is not None:
            return f"ranks of mpirun run the kernel question only; run fusecheck {step.name} by itself"
        if self._deadline is None:
            return "" if step.seconds <= CHEAP else f"takes about {step.seconds:.0f} s; give --budget 15m"
        left = self._deadline - time.monotonic()
        return "" if step.seconds <= left else f"takes about {step.seconds:.0f} s, {max(left, 0):.0f} s were left"

    def _run(self, step: Step, limit: float) -> None:
        folder = self._directory / step.name
        command = [sys.executable, "-m", "verify.cli", step.name, *step.arguments, "--run-dir", str(folder)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").unlink(missing_ok=True)
        console.print(f"{step.name}: at most {limit:.0f} s", highlight=False)
        with (folder / "output.txt").open("w", encoding="utf-8") as output:
            code = _await(command, output, limit)
        if code is None:
            self.leave_out(step.name, f"not done after {limit:.0f} s and stopped; give more --budget")
            return
        try:
            self.done[step.name] = read_run(folder)
        except UsageError:
            last = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            self.leave_out(step.name, f"ended with exit code {code}: {''.join(last) or 'it said nothing'}"[:400])


def _await(command: list[str], output: Any, limit: float) -> int | None:
    """The exit code, or None when its time was up; asked to end first, then killed."""
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        return process.wait(timeout=max(limit, 0.1))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def duration(text: str) -> float:
    """Seconds of a text such as `90s`, `5m` or `1h`; a bare number is seconds.

    Raises:
        UsageError: it is no positive duration.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"--budget {text!r}, expected a time such as 90s, 5m or 1h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def _chosen(only: str) -> set[str]:
    chosen = {part.strip() for part in only.split(",")} - {"none"}
    for name in chosen - set(NAMES):
        raise UsageError(f"--only {name!r}, expected none or of: {', '.join(NAMES)}")
    return chosen


def _why_no_latency() -> str:
    gpus = torch.cuda.device_count()
    return f"needs two GPUs, {gpus} here" if gpus < 2 else "run fusecheck latency on idle GPUs by itself"


def _summary(report: KernelReport, steps: Steps) -> dict[str, Any]:
    done = {name: {"verdict": r["verdict"], "summary": r["summary"]} for name, r in steps.done.items()}
    return {**report.summary(), "kernel_verdict": report.verdict.value, "parts": done, "not_run": steps.not_run}


def _findings(report: KernelReport, steps: Steps) -> list[dict[str, Any]]:
    behind = [{**finding, "part": name} for name, r in steps.done.items() for finding in r["findings"]]
    return report.finding_records() + behind


def _show(record: dict[str, Any]) -> None:
    """A line for each part that was run behind the kernel question, and for each that was not."""
    for part in list(parts(record))[1:]:
        line = f"{part.verdict}  {part.command}: {sentence(part)}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for left in record["summary"]["not_run"]:
        console.print(f"not run: {left['part']}: {left['reason']}", highlight=False, markup=False, soft_wrap=True)
    if len(list(parts(record))) > 1:
        console.print(f"{record['verdict']}: all that was run", highlight=False)
