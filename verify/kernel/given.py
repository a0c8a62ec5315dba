"""Given cases instead of a plan: what `fusecheck replay` runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fusecheck import backends
from fusecheck.case.question import Question
from fusecheck.errors import UsageError
from fusecheck.kernel.plan import Plan
from fusecheck.kernel.report import Subject
from fusecheck.kernel.run import Run
from fusecheck.kernel.table import Case
from fusecheck.kernel.turn import Budget


def read_questions(given: str, *, backend: str | None, flow: str | None, device: str | None) -> list[Question]:
    """The questions of a replay line, or of a file of them.

    Args:
        given: the line or the file's name.
        backend: to ask instead of the lines' own.
        flow: to judge by instead of the lines' own.
        device: to run on instead of the lines' own.

    Raises:
        UsageError: a line is none, or lacks something; or the lines are of several devices.
    """
    found = []
    for line in replay_lines(given):
        question = Question.from_json(line, backend=backend)
        own = str(getattr(backends.backend(question.kernel), "device", "cpu"))
        # Another kernel runs where it runs; one that runs anywhere, where the line says.
        where = device or (own if backend or not question.device else question.device)
        found.append(replace(question, dataflow=flow or question.dataflow, device=where))
    if len(places := {(question.device, question.virtual) for question in found}) > 1:
        raise UsageError(f"the lines are of {len(places)} devices, expected one; replay them apart")
    return found


def run_of(questions: Sequence[Question], timeout: float) -> Run:
    """The run that asks these questions, each in processes of its own."""
    given: dict[Subject, list[Case]] = {}
    for question in questions:
        subject = Subject(question.kernel, question.problem.world_size, question.dataflow)
        before = tuple(Case(problem, checks) for problem, checks in question.before)
        given.setdefault(subject, []).append(Case(question.problem, question.checks, before))
    first = questions[0]
    return Run(list(given), Plan(), Budget(), device=first.device, virtual=first.virtual, timeout=timeout, given=given)


def replay_lines(given: str) -> list[str]:
    """The argument itself if it is JSON, else the lines of that file.

    Raises:
        UsageError: neither.
    """
    if given.lstrip().startswith("{"):
        return [given]
    try:
        lines = Path(given).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{given!r} is neither a JSON object nor a readable file ({error})") from None
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    if not lines:
        raise UsageError(f"{given} has no replay line, expected one JSON object a line")
    return lines
