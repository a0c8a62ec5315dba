"""`fusecheck accuracy --sequential`: block after block until each task is decided; broken off, it goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fusecheck.eval.asked import Asked
from fusecheck.eval.blocks import Answers, Asker, Question, open_asker
from fusecheck.eval.gate import Flips, GateSettings, Verdict, worst
from fusecheck.eval.intervals import wilson_interval
from fusecheck.eval.progress import Tell
from fusecheck.eval.report_blocks import interruption, points
from fusecheck.eval.sequential import Evidence, SequentialPlan, run_sequential, stratified_order
from fusecheck.eval.session import Copies, deliver_record


@dataclass(frozen=True)
class SequentialOutcome:
    """One task's result.

    Attributes:
        task: as asked for.
        verdict: PASS, FAIL or INCONCLUSIVE.
        evidence: what it rests on.
        flips: counts over the questions asked.
        available: questions of the task.
    """

    task: str
    verdict: Verdict
    evidence: Evidence
    flips: Flips
    available: int

    @property
    def line(self) -> str:
        """The result in one line."""
        e, f = self.evidence, self.flips
        text = (
            f"{self.verdict.name}  {self.task} after {e.n:,} of {self.available:,} questions "
            f"({points(e.total / e.n)} pt; {f.lost} lost, {f.gained} gained of {f.n:,} asked; evidence {e.e_pass:.3g} "
            f"against a drop of {100 * e.margin:g}, {e.e_fail:.3g} against no change; decided at {1 / e.alpha:g})"
        )
        if self.verdict is not e.verdict:
            return f"{text}: the baseline is not above chance, so that its accuracy says nothing"
        return text

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        evidence = {k: v for k, v in asdict(self.evidence).items() if not k.startswith("log_")}
        evidence |= {
            "verdict": self.evidence.verdict.value,
            "e_pass": self.evidence.e_pass,
            "e_fail": self.evidence.e_fail,
        }
        return {"verdict": self.verdict.value, "line": self.line, **evidence, "flips": asdict(self.flips)}


def judge_sequentially(
    asked: Asked, settings: GateSettings, folder: Path, *, block: int, seed: int, tell: Tell
) -> Iterator[SequentialOutcome]:
    """Judge every task in turn; states and answers are kept in `folder` after every block.

    Raises:
        UsageError: a broken checkpoint, task, data folder or argument; `folder` holds another plan's state.
        ArmError: the ranks failed.
    """
    tell("building the prompts")
    with open_asker(asked) as asker:
        for name in asked.tasks:
            yield _judge(asker, name, asked, settings, folder, block, seed, tell)


def _judge(
    asker: Asker,
    name: str,
    asked: Asked,
    settings: GateSettings,
    folder: Path,
    block: int,
    seed: int,
    tell: Tell,
) -> SequentialOutcome:
    questions = asker.questions(name)
    order = stratified_order([task for task, _ in questions], seed)
    plan = SequentialPlan(
        questions=tuple(questions[i] for i in order),
        margin=settings.margin(name),
        alpha=settings.alpha,
        block=block,
        identity=json.dumps(asker.job.identity, sort_keys=True),
    )
    answers = Answers.load(folder / f"answers_{name}.jsonl")

    def ask(part: Sequence[Question]) -> list[int]:
        tell(f"{name}: {len(answers.right):,} of {len(questions):,} asked")
        first, second = asker.ask(part)
        answers.add(part, first, second)
        return [int(b) - int(a) for a, b in zip(first, second, strict=True)]

    state = run_sequential(plan, ask, folder / f"sequential_{name}.json")
    flips = _count([answers.right[q] for q in plan.questions[: state.asked] if q in answers.right])
    chance = float(np.mean([_chance(asker, q) for q in questions]))
    above = wilson_interval(flips.baseline_right, flips.n).low > chance
    verdict = state.evidence.verdict
    if verdict is Verdict.PASS and not above:
        verdict = Verdict.INCONCLUSIVE
    return SequentialOutcome(name, verdict, state.evidence, flips, len(questions))


def _chance(asker: Asker, question: Question) -> float:
    choices = len(asker.requests[question])
    return 1 / choices if choices > 1 else 0.02


def _count(pairs: Sequence[tuple[bool, bool]]) -> Flips:
    return Flips(
        both_right=sum(a and b for a, b in pairs),
        lost=sum(a and not b for a, b in pairs),
        gained=sum(b and not a for a, b in pairs),
        both_wrong=sum(not a and not b for a, b in pairs),
    )


def asked_so_far(tasks: Sequence[str], folder: Path) -> dict[str, int]:
    """Questions that `folder` holds both arms' answers to, by task."""
    return {name: len(Answers.load(folder / f"answers_{name}.jsonl").right) for name in tasks}


def deliver_sequential(
    outcomes: Sequence[SequentialOutcome],
    folder: Path,
    console: Console,
    copies: Copies,
    *,
    interrupted: str = "",
    asked: Mapping[str, int] | None = None,
) -> int:
    """Print the tasks' results and write the run's files; returns the exit code.

    Args:
        outcomes: of the tasks that are decided or came to their end.
        folder: of the run.
        console: where to print.
        copies: further places for the files.
        interrupted: what the run was doing when Ctrl-C ended it; empty where it came to its end.
        asked: questions asked so far, by task, where it was interrupted.
    """
    for outcome in outcomes:
        console.out(outcome.line, highlight=False)
    verdict = worst([*(o.verdict for o in outcomes), *([Verdict.INCONCLUSIVE] if interrupted else [])])
    line = f"{verdict.name}  sequential"
    if interrupted:
        counts = ", ".join(f"{count:,} of {name}" for name, count in (asked or {}).items())
        line = f"{verdict.name}  {interruption(interrupted)}; asked so far: {counts}; the same line goes on in {folder}"
        console.out(line, highlight=False)
    failed = [o for o in outcomes if o.verdict is Verdict.FAIL]
    found = [{"stage": "accuracy", "title": o.task, "detail": o.line} for o in failed]
    summary: dict[str, Any] = {
        "headline": line,
        "tasks": {o.task: o.to_json() for o in outcomes},
        "interrupted": bool(interrupted),
    }
    if asked is not None:
        summary["asked"] = dict(asked)
    return deliver_record(verdict, summary, found, folder, copies)
