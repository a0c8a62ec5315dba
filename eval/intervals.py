"""Intervals for accuracies and for the difference of two paired accuracies.

A pair of runs on the same questions leaves four counts: both right, both wrong, `lost` (baseline right, candidate
wrong) and `gained` (the reverse). The difference of the accuracies is (gained - lost) / n, and only the lost and the
gained questions say anything about it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import binomtest, norm, t

# Where the variance under the hypothesis is 0 the statistic is infinite; brentq needs a finite stand-in.
_CAP = 1e9


@dataclass(frozen=True)
class Interval:
    """Two one-sided bounds, each at its own level; `low` <= estimate <= `high`, as fractions of 1."""

    low: float
    high: float


def score_statistic(lost: ArrayLike, gained: ArrayLike, n: ArrayLike, delta: ArrayLike) -> NDArray[np.float64]:
    """Tango's score statistic for "the true difference is `delta`".

    With the difference fixed at delta, the likelihood of (lost, gained, n) is largest at a probability q of losing a
    question that solves 2n q² + B q + C = 0 with B = -(lost + gained) + (2n + lost - gained) delta and
    C = -lost delta (1 - delta); the variance of gained - lost is then n (2q + delta (1 - delta)).
    Source: T. Tango, Statistics in Medicine 17 (1998) 891-908. Falls as `delta` grows; changes sign, and nothing else,
    when the arms are swapped and delta negated.

    Args:
        lost: questions lost, real numbers >= 0; all arguments broadcast.
        gained: questions gained.
        n: questions in all, at least lost + gained.
        delta: the hypothesis, in [-1, 1].

    Returns:
        The statistic, standard normal when the hypothesis is true; ±inf where the hypothesis is impossible.
    """
    b, c, size, d = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (lost, gained, n, delta)))
    # For delta > 0 the root loses digits; the mirrored problem has delta < 0 and does not.
    mirrored = d > 0
    b, c, d = np.where(mirrored, c, b), np.where(mirrored, b, c), -np.abs(d)
    linear = -(b + c) + (2 * size + b - c) * d
    discriminant = np.maximum(linear * linear + 8 * size * b * d * (1 - d), 0)
    q = (np.sqrt(discriminant) - linear) / (4 * size)
    # q cannot be below -delta; rounding may leave the variance a hair below 0 there.
    variance = size * np.maximum(2 * q + d * (1 - d), 0)
    excess = c - b - size * d
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.where(excess == 0, 0.0, excess / np.sqrt(variance))
    return np.where(mirrored, -value, value)


def tango_interval(lost: float, gained: float, n: float, *, alpha_low: float, alpha_high: float) -> Interval:
    """Tango's paired score interval for (gained - lost) / n.

    Args:
        lost: questions that only the baseline answered rightly; may be fractional when planning.
        gained: questions that only the candidate answered rightly.
        n: questions in all, > 0.
        alpha_low: chance that the lower bound lies above the truth, one-sided.
        alpha_high: chance that the upper bound lies below the truth, one-sided.

    Returns:
        The bounds, as fractions of 1.

    Raises:
        ValueError: counts that are negative or exceed n.
    """
    # Scaled counts may exceed a scaled n by their rounding.
    if not (lost >= 0 and gained >= 0 and n > 0 and lost + gained <= n * (1 + 1e-12)):
        raise ValueError(f"lost {lost}, gained {gained} of {n} questions is not a paired result")
    low = _lower_bound(lost, gained, n, alpha_low)
    return Interval(low, -_lower_bound(gained, lost, n, alpha_high))


def _lower_bound(lost: float, gained: float, n: float, alpha: float) -> float:
    estimate = min((gained - lost) / n, 1.0)
    if estimate <= -1:
        return -1.0
    z = float(norm.isf(alpha))

    def excess(delta: float) -> float:
        # 0 at the estimate by definition; computed, rounding over a variance of 0 could make it anything.
        statistic = 0.0 if delta >= estimate else float(score_statistic(lost, gained, n, delta))
        return min(statistic, _CAP) - z

    if excess(-1.0) <= 0:
        return -1.0
    return float(brentq(excess, -1.0, estimate, xtol=1e-13, rtol=1e-12))


def wilson_interval(right: int, n: int, *, alpha: float = 0.05) -> Interval:
    """Wilson's two-sided interval for one accuracy, as fractions of 1; `right` of `n` answers were right."""
    bounds = binomtest(right, n).proportion_ci(confidence_level=1 - alpha, method="wilson")
    return Interval(float(bounds.low), float(bounds.high))


@dataclass(frozen=True)
class ClusteredDifference:
    """A paired difference whose error allows for questions of one cluster going together.

    Attributes:
        delta: mean of the per-question differences, a fraction of 1.
        standard_error: cluster-robust; 0 where no answer differs.
        clusters: how many.
        interval: one-sided bounds from Student's t with clusters - 1 degrees of freedom.
    """

    delta: float
    standard_error: float
    clusters: int
    interval: Interval


def clustered_difference(
    differences: ArrayLike, clusters: Sequence[str], *, alpha: float = 0.05
) -> ClusteredDifference | None:
    """Difference with a cluster-robust standard error, or None for fewer than two clusters.

    The residuals are summed inside each cluster before they are squared, with the usual G / (G - 1) correction.
    Source: E. Miller, Adding Error Bars to Evals (arXiv 2411.00640), equation for clustered standard errors.

    Args:
        differences: candidate minus baseline a question, in {-1, 0, 1}, shape [n].
        clusters: the cluster of each question, length n.
        alpha: one-sided level of each bound.
    """
    x = np.asarray(differences, dtype=np.float64)
    names, index = np.unique(np.asarray(clusters, dtype=np.str_), return_inverse=True)
    groups = len(names)
    if groups < 2:
        return None
    delta = float(x.mean())
    sums = np.bincount(index, weights=x - delta, minlength=groups)
    error = math.sqrt(float(sums @ sums) * groups / (groups - 1)) / len(x)
    half = float(t.isf(alpha, groups - 1)) * error
    return ClusteredDifference(delta, error, groups, Interval(max(delta - half, -1.0), min(delta + half, 1.0)))
