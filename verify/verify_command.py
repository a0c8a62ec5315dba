"""`fusecheck verify`: all that this machine can run, and what was left out and why, as one record and one page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fusecheck.backends import device_of
from fusecheck.errors import UsageError
from fusecheck.interrupts import Interruption
from fusecheck.manual import some_backend
from fusecheck.parts import reuse
from fusecheck.parts.agenda import NAMES, STEPS, divide, duration
from fusecheck.parts.asked import DRAWN, MOST_ELEMENTS, Asked
from fusecheck.parts.runner import Steps, missing
from fusecheck.ranks.mpi import detect
from fusecheck.ranks.zygote import ZYGOTE
from fusecheck.report import Verdict, make_run_dir, write_markdown, write_result
from fusecheck.report.groups import sentence
from fusecheck.report.places import JsonFile, MarkdownFile, RunDir
from fusecheck.report.record import parts

if TYPE_CHECKING:
    from fusecheck.kernel.run import Run

console = Console()


def register(app: typer.Typer) -> None:
    """Add the command `verify` to `app`."""
    app.command("verify")(verify_all)


def verify_all(
    seed: Annotated[int, typer.Option(help="Of the stream of cases.")] = 0,
    budget: Annotated[str | None, typer.Option(help="Time for all of it, such as 90s, 5m or 1h.")] = None,
    cases: Annotated[
        int | None,
        typer.Option(min=1, help=f"Of each kernel and tp, behind the core plan; {DRAWN} without a budget."),
    ] = None,
    most_elements: Annotated[int, typer.Option(min=2**13, help="tokens * hidden of the largest case.")] = MOST_ELEMENTS,
    backend: Annotated[
        str | None,
        typer.Option(help="The kernel for every part that takes one.", autocompletion=some_backend),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help=f"Parts behind the kernel question, of {', '.join(NAMES)}; or none.")
    ] = None,
    require: Annotated[
        str, typer.Option(help="Parts without whose answer there is no pass, such as kernel,accuracy: for gates.")
    ] = "",
    resume: Annotated[
        Path | None,
        typer.Option(help="A verify run's directory: what passed there, by the same code, is not run again."),
    ] = None,
    markdown: MarkdownFile = None,
    json_file: JsonFile = None,
    run_dir: RunDir = None,
) -> None:
    """Run all that this machine can run, and say what was left out and why.

    The kernel question first: for the kernels that are installed where there are GPUs for them, else for the emulator
    under every known dataflow. Then the graph and protocol questions, invariance, the accuracy of the small model, the
    quick part of the fault catalogue, and latency where there are GPUs. Without a budget each part runs to its end, in
    three to four minutes on two idle cores. A budget also buys more cases and the long forms of the parts.

    A part that lacks a package or time was asked for and not answered: exit code 3. One that lacks a GPU is only noted,
    unless --only or --require names it.

    Examples:
      fusecheck verify
      fusecheck verify --budget 30m --markdown summary.md
      fusecheck verify --backend mypackage.kernels:MyKernel --require kernel,accuracy
      fusecheck verify --only none --cases 32
      fusecheck verify --resume runs/20260102T030405Z-verify
    """
    seconds = duration(budget) if budget is not None else None
    chosen = set(NAMES) if only is None else _named("--only", only, NAMES)
    required = _required(require, only, chosen)
    began = time.monotonic()
    wanted = [step.about(_options(backend)) for step in STEPS]
    possible = [step for step in wanted if step.name in chosen and not missing(step.name) and detect() is None]
    ZYGOTE.begin(("fusecheck.case.worker",))
    asked = Asked(seed, cases, most_elements, seconds, backend)
    division = divide(possible, seconds, asked.takes())
    asked = replace(asked, seconds=division.kernel)
    run, refused = asked.run()
    directory = make_run_dir("verify", _place(resume, run_dir))
    kernel = (reuse.recall(directory / "kernel", asked.arguments()) if resume else None) or {}
    reused = ["kernel"] if kernel else []
    deadline = None if seconds is None else began + seconds
    with Interruption(raising=False) as stop:
        steps = Steps(directory, console, deadline, stop, resume=resume is not None, required=required)
        kernel = kernel or _ask_kernel(asked, run, directory)
        stop.noted |= bool(kernel["summary"]["interrupted"])
        for name, reason in refused.items():
            # Where kernels are installed, a gate that requires the kernel question means these.
            steps.leave_out(name, reason, unanswered=run.device == "cpu" and "kernel" in required)
        for step in wanted:
            steps.take(step, division.forms.get(step.name), wanted=step.name in chosen)
    reused += steps.reused
    verdict = Verdict.worst([Verdict(kernel["verdict"]), *steps.verdicts()])
    record = write_result(
        directory, "verify", verdict, _summary(kernel, steps, reused), _findings(kernel, steps), json_file
    )
    if markdown is not None:
        write_markdown(markdown, record)
    _show(record)
    for name in ("result.json", "report.html"):
        console.out(f"{directory}/{name}", highlight=False)
    if verdict is not Verdict.PASS:
        raise typer.Exit(verdict.exit_code)


def _ask_kernel(asked: Asked, run: Run, directory: Path) -> dict[str, Any]:
    """Run the kernel question; its record is also kept in a folder of its own, for a run that resumes."""
    from fusecheck.kernel.session import execute

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
    if resume is not None and not any((resume / name).exists() for name in ("result.json", "cases.jsonl", *NAMES)):
        raise UsageError(f"--resume {resume}: nothing of a verify run is here; give its directory, or leave it out")
    if resume is not None and run_dir is not None and resume.resolve() != run_dir.resolve():
        raise UsageError(f"--resume {resume} goes on in that directory, got --run-dir {run_dir} too; leave it out")
    return resume or run_dir


def _named(option: str, text: str, known: Sequence[str]) -> set[str]:
    chosen = {part.strip() for part in text.split(",")} - {"none", ""}
    for name in chosen - set(known):
        raise UsageError(f"{option} {name!r}, expected none or of: {', '.join(known)}")
    return chosen


def _required(require: str, only: str | None, chosen: set[str]) -> set[str]:
    """The parts that have to be answered: those of `--require`, and those that `--only` names.

    Raises:
        UsageError: one that is unknown, or that `--only` leaves out.
    """
    required = _named("--require", require, ("kernel", *NAMES))
    for name in required - chosen - {"kernel"}:
        raise UsageError(f"--require {name} asks for what --only {only} leaves out; name it there too")
    return required if only is None else required | chosen


def _options(backend: str | None) -> dict[str, str]:
    """How a part is told the kernel and its place."""
    if backend is None:
        return {}
    return {"--backend": backend, "--device": device_of(backend)}


def _summary(kernel: dict[str, Any], steps: Steps, reused: list[str]) -> dict[str, Any]:
    done = {name: {"verdict": r["verdict"], "summary": r["summary"]} for name, r in steps.done.items()}
    own = {"kernel_verdict": kernel["verdict"], "parts": done, "not_run": steps.not_run, "reused": reused}
    return {**kernel["summary"], **own}


def _findings(kernel: dict[str, Any], steps: Steps) -> list[dict[str, Any]]:
    behind = [{**finding, "part": name} for name, r in steps.done.items() for finding in r["findings"]]
    return [*kernel["findings"], *behind]


def _show(record: dict[str, Any]) -> None:
    """A line for each part that was run, and for each that was not."""
    left_out = record["summary"]["not_run"]
    unanswered = [left for left in left_out if left["unanswered"]]
    for left in unanswered:
        line = f"inconclusive  {left['part']}: asked for and not answered: {left['reason']}"
        console.out(line, highlight=False)
    reused = record["summary"]["reused"]
    for part in parts(record):
        again = " (of the earlier run: same code, same question)" if part.question in reused else ""
        line = f"{part.verdict}  {part.question}: {sentence(part)}{again}"
        console.out(line, highlight=False)
    for left in left_out:
        if not left["unanswered"]:
            console.out(f"not run: {left['part']}: {left['reason']}", highlight=False)
    open_ = ", ".join(left["part"] for left in unanswered)
    console.print(f"{record['verdict']}: {f'no answer from {open_}' if open_ else 'all that was run'}", highlight=False)
