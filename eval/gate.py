"""The gate: one verdict a task from one paired interval, and one verdict for the run.

For a margin M and one-sided bounds L, U on the change of accuracy: PASS if L > -M; FAIL if L <= -M and U < 0;
INCONCLUSIVE otherwise, with the number of further questions that would settle it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

from fusecheck.eval.intervals import Interval, score_statistic, tango_interval, wilson_interval
from fusecheck.eval.mcnemar import McNemar, mcnemar
from fusecheck.eval.power import questions_to_decide, smallest_change

DEFAULT_MARGIN = 0.01
DEFAULT_MARGINS: Mapping[str, float] = {"mmlu": 0.005, "gsm8k": 0.02, "golden_mmlu": 0.01, "golden_gsm8k": 0.04}


class Verdict(str, Enum):
    """What a judgement says; `INVALID` means that the two runs do not make a pair."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    INVALID = "invalid"

    @property
    def exit_code(self) -> int:
        """The exit code of a command that ends with this verdict."""
        return {Verdict.PASS: 0, Verdict.FAIL: 1, Verdict.INVALID: 4, Verdict.INCONCLUSIVE: 3}[self]


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """INVALID before FAIL before INCONCLUSIVE before PASS; of nothing: INCONCLUSIVE."""
    order = (Verdict.PASS, Verdict.INCONCLUSIVE, Verdict.FAIL, Verdict.INVALID)
    return max(verdicts, key=order.index, default=Verdict.INCONCLUSIVE)


@dataclass(frozen=True)
class GateSettings:
    """What is fixed before the run.

    Attributes:
        margins: largest drop that is accepted, by task, as fractions of 1; other tasks take `default_margin`.
        default_margin: margin of tasks that `margins` does not name.
        alpha: one-sided level of each task's lower bound, and of all upper bounds together.
        power: chance with which the printed smallest change would be seen.
        kl_ratio: least ratio of mean KL to the oracle, candidate over baseline, that counts as a defect in size.
        kl_alpha: level of the Wilcoxon test that the candidate is farther from the oracle.
        kl_questions: fewest questions on which the KL rule judges at all.
    """

    margins: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_MARGINS))
    default_margin: float = DEFAULT_MARGIN
    alpha: float = 0.05
    power: float = 0.8
    kl_ratio: float = 1.25
    kl_alpha: float = 1e-4
    kl_questions: int = 2000

    def margin(self, task: str) -> float:
        """The margin of `task`, a fraction of 1."""
        return self.margins.get(task, self.default_margin)


@dataclass(frozen=True)
class Flips:
    """Paired counts of questions.

    Attributes:
        both_right: right in both arms.
        lost: right in the baseline only.
        gained: right in the candidate only.
        both_wrong: wrong in both arms, churn included.
        churn: wrong in both arms, with different answers.
    """

    both_right: int
    lost: int
    gained: int
    both_wrong: int
    churn: int = 0

    @property
    def n(self) -> int:
        """Questions in all."""
        return self.both_right + self.lost + self.gained + self.both_wrong

    @property
    def rate(self) -> float:
        """Share of questions whose correctness differs."""
        return (self.lost + self.gained) / self.n

    @property
    def delta(self) -> float:
        """Accuracy of the candidate minus accuracy of the baseline."""
        return (self.gained - self.lost) / self.n

    @property
    def baseline_right(self) -> int:
        """Right answers of the baseline."""
        return self.both_right + self.lost

    @property
    def candidate_right(self) -> int:
        """Right answers of the candidate."""
        return self.both_right + self.gained

    @property
    def swapped(self) -> Flips:
        """The same pair with the arms exchanged."""
        return Flips(self.both_right, self.gained, self.lost, self.both_wrong, self.churn)


def count_flips(
    baseline_right: NDArray[np.bool_], candidate_right: NDArray[np.bool_], same_answer: NDArray[np.bool_]
) -> Flips:
    """Count the pairs; `same_answer` says where both arms gave the same answer; all bool [n]."""
    wrong = ~baseline_right & ~candidate_right
    return Flips(
        both_right=int((baseline_right & candidate_right).sum()),
        lost=int((baseline_right & ~candidate_right).sum()),
        gained=int((~baseline_right & candidate_right).sum()),
        both_wrong=int(wrong.sum()),
        churn=int((wrong & ~same_answer).sum()),
    )


def decide(
    lost: ArrayLike, gained: ArrayLike, n: int, *, margin: float, alpha_low: float, alpha_high: float
) -> NDArray[np.str_]:
    """Verdicts ("pass", "fail", "inconclusive") of many paired results at once, without computing the bounds.

    L > -M exactly where the score statistic at -M exceeds z, and U < 0 where the one at 0 lies below -z.
    """
    passes = score_statistic(lost, gained, n, -margin) > norm.isf(alpha_low)
    worse = score_statistic(lost, gained, n, 0.0) < -norm.isf(alpha_high)
    return np.where(passes, Verdict.PASS.value, np.where(worse, Verdict.FAIL.value, Verdict.INCONCLUSIVE.value))


@dataclass(frozen=True)
class Judgement:
    """One task's accuracy, judged.

    Attributes:
        verdict: PASS, FAIL or INCONCLUSIVE.
        reason: one clause that says why.
        flips: the counts.
        margin: M, a fraction of 1.
        interval: L and U, fractions of 1.
        alpha_low: one-sided level of L.
        alpha_high: one-sided level of U.
        baseline_interval: Wilson's 95 % interval of the baseline's accuracy.
        candidate_interval: the same of the candidate's.
        test: McNemar's p-values.
        smallest_change: the drop that this run would have found with the stated power at the observed share of flips,
            as a fraction of 1; None where the flips are too few for any drop to be found.
        questions_needed: questions in all that settle an INCONCLUSIVE task; None where it is settled or never would be.
    """

    verdict: Verdict
    reason: str
    flips: Flips
    margin: float
    interval: Interval
    alpha_low: float
    alpha_high: float
    baseline_interval: Interval
    candidate_interval: Interval
    test: McNemar
    smallest_change: float | None
    questions_needed: int | None


def judge(flips: Flips, margin: float, *, tasks: int = 1, chance: float = 0.0, settings: GateSettings) -> Judgement:
    """Judge one task's paired counts.

    Args:
        flips: the counts, of at least one question.
        margin: M, a fraction of 1, > 0.
        tasks: tasks gated together; the level of the upper bound is shared among them, so that the chance of any false
            FAIL stays `alpha`. The lower bounds need no such care: all of them must pass.
        chance: accuracy of guessing; a baseline that is not above it makes the task INCONCLUSIVE, whatever the flips.
        settings: levels and power.
    """
    alpha_low, alpha_high = settings.alpha, settings.alpha / tasks
    interval = tango_interval(flips.lost, flips.gained, flips.n, alpha_low=alpha_low, alpha_high=alpha_high)
    verdict, reason, needed = Verdict.INCONCLUSIVE, "", None
    baseline = wilson_interval(flips.baseline_right, flips.n)
    if interval.low <= -margin and interval.high < 0:
        verdict, reason = Verdict.FAIL, "worse, and a drop of the margin or more is not excluded"
    elif baseline.low <= chance:
        reason = f"the baseline is not above chance ({chance:.0%}), so that its accuracy says nothing"
    elif interval.low > -margin:
        verdict, reason = Verdict.PASS, "any drop is smaller than the margin"
    else:
        needed = questions_to_decide(
            flips.lost, flips.gained, flips.n, margin=margin, alpha_low=alpha_low, alpha_high=alpha_high
        )
        further = "more than 2**31" if needed is None else f"{needed - flips.n:,}"
        reason = f"{further} further questions would settle it"
    return Judgement(
        verdict=verdict,
        reason=reason,
        flips=flips,
        margin=margin,
        interval=interval,
        alpha_low=alpha_low,
        alpha_high=alpha_high,
        baseline_interval=baseline,
        candidate_interval=wilson_interval(flips.candidate_right, flips.n),
        test=mcnemar(flips.lost, flips.gained),
        smallest_change=smallest_change(flips.n, flips.rate, alpha=settings.alpha, power=settings.power),
        questions_needed=needed,
    )
