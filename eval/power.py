"""What a run could have seen: smallest detectable change, and questions needed before the run.

`flips` is the share of questions whose correctness differs between the two arms. For paired runs it is the whole
variance: two arms that disagree on 2 % of the questions resolve a change thirty times finer than two separate samples.
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.stats import norm

from fusecheck.eval.intervals import tango_interval


def smallest_change(n: int, flips: float, *, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """Smallest true drop that a one-sided paired test finds with chance `power`, as a fraction of 1.

    Solves change √n = z_alpha √flips + z_power √(flips - change²). None where even "every flip is a loss" is not
    enough, so that no change of this many flips can be found.
    """
    if flips <= 0:
        return None
    z_alpha, z_power = float(norm.isf(alpha)), float(norm.ppf(power))

    def excess(change: float) -> float:
        spread = math.sqrt(max(flips - change * change, 0.0))
        return change * math.sqrt(n) - z_alpha * math.sqrt(flips) - z_power * spread

    if excess(flips) < 0:
        return None
    return float(brentq(excess, 0.0, flips, xtol=1e-12))


def smallest_unpaired_change(n: int, *, deviation: float = 0.5, alpha: float = 0.05, power: float = 0.8) -> float:
    """The same for two independent samples of `n`, each answer with standard deviation `deviation`."""
    return (float(norm.isf(alpha)) + float(norm.ppf(power))) * math.sqrt(2 * deviation**2 / n)


def questions_to_pass(margin: float, flips: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """Questions that show a drop below `margin` with chance `power` when there is no change: (z+z)² flips / margin²."""
    z = float(norm.isf(alpha)) + float(norm.ppf(power))
    return math.ceil(z * z * flips / (margin * margin))


def questions_to_decide(
    lost: int, gained: int, n: int, *, margin: float, alpha_low: float, alpha_high: float
) -> int | None:
    """Questions in all after which the verdict cannot be "inconclusive", if flips keep the observed rates.

    An inconclusive interval reaches from below -margin to 0 or above, so it is at least `margin` wide; the smallest n
    at which it is narrower settles the matter. None where 2**31 questions would not.
    """

    def width(size: float) -> float:
        scale = size / n
        ends = tango_interval(lost * scale, gained * scale, size, alpha_low=alpha_low, alpha_high=alpha_high)
        return ends.high - ends.low

    if width(n) < margin:
        return n
    low, high = n, 2 * n
    while width(high) >= margin:
        low, high = high, 2 * high
        if high > 2**31:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if width(middle) < margin:
            high = middle
        else:
            low = middle
    return high
