"""`fusecheck verify`: all that this machine can run, and what was left out and why, as one record and one page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fusecheck.backends import device_of, shipped
from fusecheck.dataflow import DATAFLOWS
from fusecheck.errors import Inconclusive, UsageError
from fusecheck.interrupts import Interruption
from fusecheck.manual import some_backend
from fusecheck.parts import reuse
from fusecheck.parts.agenda import KERNEL_SECONDS, NAMES, REAL_SECONDS, STEPS, divide, duration
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

WORLD_SIZES = (2, 4)
LARGER = (8,)
"""Also, where cases or a budget are given: eight ranks take more than half of the time on two cores."""

DRAWN = 10
"""Cases of each kernel behind the core plan: over the world sizes, each kernel meets every input family."""

MOST_ELEMENTS = 2**26
"""tokens * hidden of the largest case."""

HUNG_ON_GPUS = 20.0
"""Seconds of one case there; the slowest of the core plan takes two."""

START_SECONDS, OVERSHOOT = 3.0, 0.1
"""What starting the ranks of a world size takes, and by what share the cases in flight overrun their time."""


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
            steps.leave_out(name, reason, unanswered=False)
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


@dataclass(frozen=True)
class Asked:
    """What is asked of the kernel question.

    Attributes:
        seed: of the stream of cases.
        cases: of each subject, as given.
        most_elements: of the largest case.
        seconds: for all subjects; None without a budget.
        backend: the kernel; None for the emulator under every dataflow.
    """

    seed: int
    cases: int | None
    most_elements: int
    seconds: float | None
    backend: str | None = None

    def run(self) -> tuple[Run, dict[str, str]]:
        """Every kernel at every world size that takes it, and the reasons of the others.

        Raises:
            UsageError: the kernel is unknown, or no world size takes it.
            Inconclusive: there are too few GPUs for any.
        """
        names = [f"emulated:{name}" for name in DATAFLOWS] if self.backend is None else [self.backend]
        refused: dict[str, str] = {}
        if there := self._shipped():
            run, refused = _possible(self._run(there, "cuda"), "installed kernels")
            if run.subjects:
                return run, refused | {
                    "emulated kernels": "real ones are here; ask by fusecheck kernel --backend emulated"
                }
        asked = self._run(names, "cpu" if self.backend is None else device_of(self.backend))
        run, more = _possible(asked)
        if not run.subjects:
            asked.validate()
        return run, refused | more

    def takes(self) -> float:
        """Seconds that it takes about; the core plan of each real kernel is run whatever the budget is.

        Raises:
            UsageError, Inconclusive: as `run`.
        """
        run, _ = self.run()
        return KERNEL_SECONDS if run.device == "cpu" else REAL_SECONDS * len(run.subjects)

    def _shipped(self) -> list[str]:
        """The installed kernels for GPUs, where none is named and there are GPUs for them."""
        from torch.cuda import device_count

        needed = min(WORLD_SIZES) if detect() is None else 1  # mpirun may show each of its ranks one
        return shipped() if self.backend is None and device_count() >= needed else []

    @property
    def _sizes(self) -> tuple[int, ...]:
        return WORLD_SIZES if self.cases is None and self.seconds is None else WORLD_SIZES + LARGER

    def _run(self, names: Sequence[str], device: str) -> Run:
        from fusecheck.kernel.plan import Plan
        from fusecheck.kernel.report import Subject
        from fusecheck.kernel.run import Run
        from fusecheck.kernel.turn import Budget

        subjects = [Subject(name, size) for size in self._sizes for name in names]
        drawn = DRAWN if self.cases is None and self.seconds is None else self.cases
        share = None if self.seconds is None else _share(self.seconds, len(subjects))
        # The emulator's dataflows are variants of one kernel.
        joint = self.backend is None and device == "cpu"
        plan = Plan(seed=self.seed, most_elements=self.most_elements, whole=not joint)
        timeout = HUNG_ON_GPUS if device == "cuda" else Run.timeout
        return Run(subjects, plan, Budget(drawn=drawn, seconds=share), device=device, joint=joint, timeout=timeout)

    def arguments(self) -> list[str]:
        """The same as words, by which two runs are known to have asked the same."""
        run, _ = self.run()
        asked = [("--backend", subject.backend, "--tp", str(subject.world_size)) for subject in run.subjects]
        return ["kernel", *chain.from_iterable(asked), repr(self), repr(run.budget)]


def _possible(run: Run, every: str = "kernel") -> tuple[Run, dict[str, str]]:
    """The run with the subjects that can be asked here, and the reasons of the others.

    Args:
        run: with all subjects.
        every: what all kernels together are called.
    """
    why = {subject: _refusal(replace(run, subjects=[subject])) for subject in run.subjects}
    sizes: dict[tuple[str, str], list[int]] = {}
    for subject, reason in why.items():
        if reason:
            sizes.setdefault((subject.backend, reason), []).append(subject.world_size)
    names: dict[tuple[str, str], list[str]] = {}
    for (name, reason), at in sizes.items():
        names.setdefault((", ".join(map(str, at)), reason), []).append(name)
    count = len({subject.backend for subject in why})
    refused = {
        f"{every if len(who) == count else ' and '.join(who)} at tp {at}": reason for (at, reason), who in names.items()
    }
    return replace(run, subjects=[subject for subject, reason in why.items() if not reason]), refused


def _refusal(run: Run) -> str:
    """Why the run's only subject cannot be asked; empty where it can."""
    (subject,) = run.subjects
    try:
        run.validate()
    except (UsageError, Inconclusive) as why:
        return str(why).removeprefix(f"backend {subject.backend} refuses every case at tp {subject.world_size}: ")
    return ""


def _share(seconds: float, subjects: int) -> float:
    """Seconds of each subject, so that with the start of the ranks and the last case of each all end in time."""
    return max(seconds - START_SECONDS * len(WORLD_SIZES + LARGER), seconds / 2) * (1 - OVERSHOOT) / subjects


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
