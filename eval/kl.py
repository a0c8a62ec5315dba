"""The log-probability tier: how far each arm is from a high-precision oracle, question by question.

Accuracy forgets everything but the winner. A kernel that spoils one row in 32 moved accuracy by 0.1 points, but doubled
the distance to the oracle. The oracle (same weights, FP8 off) makes the test fair: a fused path that skips a rounding
comes closer to it and is not punished.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax
from scipy.stats import norm, wilcoxon

from fusecheck.eval.gate import GateSettings, Verdict

Floats = NDArray[np.float64]


def divergence(reference: Floats, other: Floats) -> Floats:
    """KL(reference ‖ other) in nats, one value a row.

    Args:
        reference: log-probabilities or log-likelihoods [n, k]; each row is normalised over its k outcomes first.
        other: the same outcomes in the other arm, [n, k].
    """
    p, q = log_softmax(reference, axis=1), log_softmax(other, axis=1)
    # An outcome of probability 0 contributes nothing; rounding can leave the sum a hair below 0.
    terms = np.where(np.isneginf(p), 0.0, np.exp(p) * (np.where(np.isneginf(p), 0.0, p) - q))
    total: Floats = np.maximum(terms.sum(axis=1), 0.0)
    return total


@dataclass(frozen=True)
class QuestionDistances:
    """How far one arm's distribution is from another's, question by question; each array has shape [n].

    Attributes:
        kl: KL(reference ‖ other), nats.
        same_top: whether the most likely outcome is the same.
        equal: whether all log-probabilities are bitwise equal.
        gold_change: change of the right answer's log-probability, nats; NaN where the right answer is unknown.
    """

    kl: Floats
    same_top: NDArray[np.bool_]
    equal: NDArray[np.bool_]
    gold_change: Floats


def question_distances(reference: Floats, other: Floats, gold: NDArray[np.int64]) -> QuestionDistances:
    """Distances of `other` from `reference`, both [n, k]; `gold` is the index of the right outcome [n], -1 unknown."""
    rows = np.arange(len(reference))
    change = log_softmax(other, axis=1)[rows, gold] - log_softmax(reference, axis=1)[rows, gold]
    return QuestionDistances(
        kl=divergence(reference, other),
        same_top=reference.argmax(axis=1) == other.argmax(axis=1),
        equal=(reference == other).all(axis=1),
        gold_change=np.where(gold >= 0, change, np.nan),
    )


@dataclass(frozen=True)
class DistanceSummary:
    """Distances between two arms over n questions.

    Attributes:
        n: questions.
        mean: mean KL, nats.
        quantiles: KL at 50, 99, 99.9 and 100 %, nats.
        same_top: share of questions whose most likely outcome is the same.
        equal: share of questions with bitwise equal log-probabilities.
        gold_mean: mean change of the right answer's log-probability, nats; None where it is unknown.
        gold_error: half-width of its 95 % interval, nats.
    """

    n: int
    mean: float
    quantiles: tuple[float, float, float, float]
    same_top: float
    equal: float
    gold_mean: float | None
    gold_error: float | None


def summarise(distances: QuestionDistances) -> DistanceSummary:
    """Summarise at least one question's distances."""
    p50, p99, p999, largest = (float(x) for x in np.quantile(distances.kl, (0.5, 0.99, 0.999, 1.0)))
    change = distances.gold_change[~np.isnan(distances.gold_change)]
    gold_mean = gold_error = None
    if len(change):
        gold_mean = float(change.mean())
        spread = float(change.std(ddof=1)) if len(change) > 1 else 0.0
        gold_error = float(norm.isf(0.025)) * spread / float(np.sqrt(len(change)))
    return DistanceSummary(
        n=len(distances.kl),
        mean=float(distances.kl.mean()),
        quantiles=(p50, p99, p999, largest),
        same_top=float(distances.same_top.mean()),
        equal=float(distances.equal.mean()),
        gold_mean=gold_mean,
        gold_error=gold_error,
    )


@dataclass(frozen=True)
class OracleJudgement:
    """Whether the candidate is farther from the oracle than the baseline is.

    Attributes:
        verdict: FAIL if the ratio and the test both say so; INCONCLUSIVE below the least number of questions; else
            PASS.
        reason: one clause that says why.
        n: questions.
        baseline_mean: mean KL(oracle ‖ baseline), nats.
        candidate_mean: mean KL(oracle ‖ candidate), nats.
        ratio: candidate_mean / baseline_mean; 1 where both are 0, inf where only the second is.
        p: one-sided Wilcoxon signed-rank p-value for "the candidate is farther".
        worst: indices of the questions with the largest excess of KL, worst first; at most ten.
    """

    verdict: Verdict
    reason: str
    n: int
    baseline_mean: float
    candidate_mean: float
    ratio: float
    p: float
    worst: tuple[int, ...]


def judge_oracle(baseline_kl: Floats, candidate_kl: Floats, settings: GateSettings) -> OracleJudgement:
    """Judge KL to the oracle, question by question, each [n] in nats: FAIL needs the size and the significance."""
    n = len(baseline_kl)
    excess = candidate_kl - baseline_kl
    means = float(baseline_kl.mean()), float(candidate_kl.mean())
    ratio = means[1] / means[0] if means[0] > 0 else (1.0 if means[1] == 0 else float("inf"))
    p = float(wilcoxon(excess, alternative="greater").pvalue) if excess.any() else 1.0
    order = np.argsort(-excess, kind="stable")[:10]
    worst = tuple(int(i) for i in order if excess[i] > 0)
    if n < settings.kl_questions:
        verdict, reason = Verdict.INCONCLUSIVE, f"{n:,} questions; the rule needs {settings.kl_questions:,}"
    elif not (p >= settings.kl_alpha) and not (ratio <= settings.kl_ratio):
        verdict = Verdict.FAIL
        reason = f"ratio above {settings.kl_ratio:g} and p below {settings.kl_alpha:g}"
    else:
        verdict = Verdict.PASS
        reason = f"not both: ratio above {settings.kl_ratio:g}, p below {settings.kl_alpha:g}"
    return OracleJudgement(verdict, reason, n, means[0], means[1], ratio, p, worst)
