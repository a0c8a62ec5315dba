"""Answers that are none: empty, an error's text, rejected by the filter, cut at the token limit; counted for each arm.

An answer that never came (a time-out, a refused request, a parser that eats the text) is logged by lm-eval as an empty
string or as the error's text, and counts as wrong: in both arms alike it makes any two kernels look equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.stats import fisher_exact

from fusecheck.eval.rows import Sample
from fusecheck.eval.samples import Run, TaskRun

UNANSWERED_SHARE = 0.01
"""Share of a task's questions that may go unanswered (empty, or an error's text) in an arm; above it: no verdict."""
DIFFERS = 0.01
"""Level of Fisher's test below which two arms' counts are said to differ."""
REJECTED = "[invalid]"
"""What lm-eval's filters return where they find no answer."""
FILTERS = ("flexible-extract", "none", "strict-match")
"""The filter whose rejections count, the first that a task has."""

_ERROR = re.compile(
    r"\s*(?:\{\s*\"(?:error|detail)\"|<(?:!doctype )?html|traceback \(most recent call last\)|"
    r"(?:internal server error|bad gateway|service unavailable|gateway time-?out|too many requests|bad request)\b|"
    r"(?:http|status|error)(?: code)?:? ?[45]\d\d\b|"
    r"(?:request |read |connection )(?:timed out|time-?out|error|refused|reset)|"
    r"(?:\w+\.)*\w*(?:error|exception)\s*[:(\[])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Unanswered:
    """Counts of one generating task in one arm; a question is in one of the first three at most.

    Attributes:
        n: questions.
        empty: answers without a visible character.
        errors: answers that begin like an error's text.
        rejected: other answers in which the filter found nothing.
        cut: answers cut at the token limit; None where the engine does not tell.
    """

    n: int
    empty: int
    errors: int
    rejected: int
    cut: int | None

    def named(self) -> dict[str, int]:
        """The counts by what they are called."""
        found = {"empty": self.empty, "an error's text": self.errors, "rejected by the filter": self.rejected}
        return found if self.cut is None else found | {"cut at the token limit": self.cut}


def is_error(text: str) -> bool:
    """Whether an answer begins as servers and clients word an error."""
    return _ERROR.match(text) is not None


def generates(task: TaskRun) -> bool:
    """Whether the task's answers are texts, not choices."""
    return all(sample.likelihoods is None for sample in task.samples.values())


def count(task: TaskRun, run: Run) -> Unanswered:
    """Count a generating task's answers that are none."""
    name = next((f for f in FILTERS if f in task.filters), task.filters[0])
    samples = [sample for (_, key), sample in task.samples.items() if key == name]
    empty = sum(not sample.response.strip() for sample in samples)
    errors = sum(is_error(sample.response) for sample in samples)
    rejected = sum(_rejected(sample) for sample in samples)
    cut = None if run.record is None else run.record.truncated.get(task.task, 0)
    return Unanswered(len(samples), empty, errors, rejected, cut)


def _rejected(sample: Sample) -> bool:
    return sample.answer == REJECTED and bool(sample.response.strip()) and not is_error(sample.response)


@dataclass(frozen=True)
class AnswerCheck:
    """What the counts of one task say: `invalid`, `warning` or `ok`, and the counts in words."""

    state: Literal["ok", "warning", "invalid"]
    detail: str


def compare_answers(baseline: Run, candidate: Run, role: str) -> Iterator[AnswerCheck]:
    """Look at every generating task that both arms have; nothing where there is none."""
    for name in sorted(baseline.tasks.keys() & candidate.tasks.keys()):
        if generates(baseline.tasks[name]) and generates(candidate.tasks[name]):
            mine, theirs = count(baseline.tasks[name], baseline), count(candidate.tasks[name], candidate)
            yield _judge(name, mine, theirs, role)


def _judge(task: str, mine: Unanswered, theirs: Unanswered, role: str) -> AnswerCheck:
    first, second = mine.named(), theirs.named()
    shared = [kind for kind in first if kind in second]
    told = _told(shared, first, second)
    detail = f"{task}: of {mine.n:,} answers, baseline and {role}: {told}"
    worst = max((arm.empty + arm.errors) / max(arm.n, 1) for arm in (mine, theirs))
    if worst > UNANSWERED_SHARE:
        return AnswerCheck(
            "invalid",
            f"{detail}; {worst:.1%} never answered, at most {UNANSWERED_SHARE:.0%} may be: run again what timed out or "
            "failed, and look at the server's log",
        )
    apart = [kind for kind in shared if _differ(first[kind], second[kind], mine.n, theirs.n)]
    if apart:
        return AnswerCheck("warning", f"{detail}; the arms differ in answers {' and '.join(apart)}: look at them first")
    lost = mine.empty + mine.errors + theirs.empty + theirs.errors
    return AnswerCheck("warning" if lost else "ok", detail)


def _told(kinds: Sequence[str], first: Mapping[str, int], second: Mapping[str, int]) -> str:
    return ", ".join(f"{first[kind]:,} and {second[kind]:,} {kind}" for kind in kinds)


def _differ(a: int, b: int, n: int, m: int) -> bool:
    return float(fisher_exact([[a, max(n - a, 0)], [b, max(m - b, 0)]]).pvalue) < DIFFERS


def all_equal(baseline: Run, candidate: Run) -> bool:
    """Whether every generated text is the same in both arms, of at least one."""
    pairs = [
        (sample.response, candidate.tasks[name].samples[key].response)
        for name, task in baseline.tasks.items()
        if generates(task)
        for key, sample in task.samples.items()
    ]
    return bool(pairs) and all(mine == theirs for mine, theirs in pairs)
