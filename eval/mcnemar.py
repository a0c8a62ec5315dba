"""Tests on discordant pairs: exact and mid-p McNemar, and Holm's correction for many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom


@dataclass(frozen=True)
class McNemar:
    """p-values of McNemar's test for "the candidate is not worse" (one-sided) and "no difference" (two-sided).

    The exact test conditions on the number of discordant pairs and is conservative; mid-p counts half of the observed
    outcome's probability and keeps the level on average.
    """

    exact: float
    mid_p: float
    exact_two_sided: float
    mid_p_two_sided: float


def mcnemar(lost: int, gained: int) -> McNemar:
    """McNemar's test on `lost` (baseline right, candidate wrong) against `gained` (the reverse)."""
    pairs = lost + gained
    if pairs == 0:
        return McNemar(1.0, 1.0, 1.0, 1.0)
    exact = float(binom.sf(lost - 1, pairs, 0.5))
    smaller = min(lost, gained)
    # The law is symmetric, so the two tails are equal; where both are the middle their sum exceeds 1.
    tail = float(binom.cdf(smaller, pairs, 0.5))
    point = float(binom.pmf(smaller, pairs, 0.5))
    return McNemar(exact, exact - point / 2, min(1.0, 2 * tail), min(1.0, 2 * tail - point))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given; valid whatever the dependence between the tests."""
    order = np.argsort(np.asarray(p_values, dtype=np.float64), kind="stable")
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
