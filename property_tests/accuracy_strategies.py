"""Hypothesis strategies for paired results."""

from __future__ import annotations

import hypothesis.strategies as st

from fusecheck.eval.gate import Flips


@st.composite
def paired_flips(draw: st.DrawFn, *, largest: int = 15_000) -> Flips:
    """Counts of a paired run of 1 to `largest` questions; no flips, few flips and all flips are all likely."""
    n = draw(st.integers(1, largest))
    flips = draw(st.one_of(st.just(0), st.integers(0, min(n, 30)), st.integers(0, n)))
    lost = draw(st.integers(0, flips))
    both_right = draw(st.integers(0, n - flips))
    both_wrong = n - flips - both_right
    return Flips(both_right, lost, flips - lost, both_wrong, churn=draw(st.integers(0, both_wrong)))


def margins() -> st.SearchStrategy[float]:
    """Margins from 0.1 to 10 points, as fractions of 1."""
    return st.floats(0.001, 0.1)


def levels() -> st.SearchStrategy[float]:
    """One-sided levels from 0.1 % to 30 %."""
    return st.floats(0.001, 0.3)
