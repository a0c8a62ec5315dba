"""The log-probability tier: its distances, and the rule that asks for size and significance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import entropy, wilcoxon

from fusecheck.eval.gate import GateSettings, Verdict
from fusecheck.eval.kl import Floats, divergence, judge_oracle, question_distances, summarise

GATE = GateSettings()
logits = arrays(np.float64, (5, 4), elements=st.floats(-30, 5))


@given(logits, logits)
def test_kl_agrees_with_scipy(first: Floats, second: Floats) -> None:
    p, q = (np.exp(x - np.logaddexp.reduce(x, axis=1, keepdims=True)) for x in (first, second))
    expected = entropy(p, q, axis=1)
    assert np.abs(divergence(first, second) - expected).max() <= 1e-9 * (1 + expected.max())


@given(logits, st.floats(-20, 20))
def test_kl_is_nought_for_the_same_distribution_however_scaled(first: Floats, shift: float) -> None:
    assert divergence(first, first).max() == 0
    assert divergence(first, first + shift).max() < 1e-12


def test_an_impossible_outcome_costs_nothing_unless_the_other_arm_believes_in_it() -> None:
    sure, open_minded = np.array([[0.0, -np.inf]]), np.array([[-0.7, -0.7]])
    assert abs(divergence(sure, open_minded)[0] - np.log(2)) < 1e-12
    assert divergence(open_minded, sure)[0] == np.inf


def test_distances_see_the_top_the_bits_and_the_right_answer() -> None:
    first = np.log([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    second = np.log([[0.2, 0.7, 0.1], [0.5, 0.3, 0.2], [0.4, 0.35, 0.25]])
    second[1] = first[1]
    found = question_distances(first, second, np.array([0, 1, -1]))
    assert found.same_top.tolist() == [False, True, True]
    assert found.equal.tolist() == [False, True, False]
    assert abs(found.gold_change[0] - np.log(0.2 / 0.7)) < 1e-12
    assert found.gold_change[1] == 0
    assert np.isnan(found.gold_change[2])
    summary = summarise(found)
    assert summary.n == 3
    assert summary.same_top == pytest.approx(2 / 3)
    assert summary.quantiles[-1] == found.kl.max()
    assert summary.gold_mean == pytest.approx(np.log(0.2 / 0.7) / 2)


def _noise(seed: int, n: int, scale: float = 1.0) -> Floats:
    return scale * np.random.default_rng(seed).gamma(0.5, 1e-3, n)


def test_the_same_distance_passes() -> None:
    found = judge_oracle(_noise(0, 4000), _noise(1, 4000), GATE)
    assert found.verdict is Verdict.PASS
    assert 0.9 < found.ratio < 1.1


def test_a_path_that_comes_closer_to_the_oracle_is_not_punished() -> None:
    found = judge_oracle(_noise(0, 4000), _noise(1, 4000, 0.5), GATE)
    assert found.verdict is Verdict.PASS
    assert found.p > 0.99


def test_one_row_in_thirty_two_wrong_fails() -> None:
    near = _noise(0, 6000)
    far = near + 1e-6 * np.random.default_rng(5).normal(size=6000)
    far[::32] += 0.05
    assert judge_oracle(near, far, GATE).ratio > 2
    significant = near * 1.02
    significant[::32] += 0.05
    found = judge_oracle(near, significant, GATE)
    assert found.verdict is Verdict.FAIL
    assert all(i % 32 == 0 for i in found.worst)
    assert len(found.worst) == 10


def test_size_without_significance_passes_and_the_reverse() -> None:
    near = _noise(0, 4000)
    one_outlier = near.copy()
    one_outlier[7] += 10
    large = judge_oracle(near, one_outlier, GATE)
    assert large.ratio > 1.25
    assert large.verdict is Verdict.PASS
    small = judge_oracle(near, near * 1.1, GATE)
    assert small.p < 1e-4
    assert small.verdict is Verdict.PASS


def test_too_few_questions_are_not_judged() -> None:
    found = judge_oracle(_noise(0, 1999), 100 * _noise(0, 1999), GATE)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "2,000" in found.reason


def test_the_p_value_is_scipys() -> None:
    near, far = _noise(0, 2500), _noise(3, 2500, 1.1)
    assert judge_oracle(near, far, GATE).p == float(wilcoxon(far - near, alternative="greater").pvalue)


def test_identical_distances_have_ratio_one_and_pass() -> None:
    for values in (np.zeros(2000), _noise(0, 2000)):
        found = judge_oracle(values, values, GATE)
        assert (found.verdict, found.ratio, found.p, found.worst) == (Verdict.PASS, 1.0, 1.0, ())


def test_nan_is_never_a_pass() -> None:
    bad = _noise(0, 3000)
    bad[5] = np.nan
    assert judge_oracle(_noise(1, 3000), bad, GATE).verdict is not Verdict.PASS
    assert judge_oracle(np.zeros(3000), _noise(1, 3000), GATE).verdict is Verdict.FAIL
