"""The gate's verdicts: mirrored, monotone, consistent with its own interval, and its operating characteristics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusecheck.eval.gate import Flips, GateSettings, Verdict, count_flips, decide, judge, worst
from fusecheck.eval.operating import SETTINGS, Setting, simulate, simulate_sequential
from fusecheck.property_tests.accuracy_strategies import margins, paired_flips

GATE = GateSettings()


@given(paired_flips(), margins())
def test_the_verdict_is_read_off_the_interval(flips: Flips, margin: float) -> None:
    judgement = judge(flips, margin, settings=GATE)
    low, high = judgement.interval.low, judgement.interval.high
    if judgement.verdict is Verdict.PASS:
        assert low > -margin
    elif judgement.verdict is Verdict.FAIL:
        assert low <= -margin
        assert high < 0
    elif flips.baseline_right and judgement.baseline_interval.low > 0:
        assert low <= -margin
        assert high >= 0
        assert judgement.questions_needed is None or judgement.questions_needed > flips.n


@given(paired_flips(), margins(), st.integers(1, 5))
def test_deciding_many_at_once_agrees_with_judging_one(flips: Flips, margin: float, tasks: int) -> None:
    judgement = judge(flips, margin, tasks=tasks, chance=-1, settings=GATE)
    together = decide(
        np.array([flips.lost], float),
        np.array([flips.gained], float),
        flips.n,
        margin=margin,
        alpha_low=0.05,
        alpha_high=0.05 / tasks,
    )
    near_a_bound = min(abs(judgement.interval.low + margin), abs(judgement.interval.high)) < 1e-9
    assert near_a_bound or together[0] == judgement.verdict.value


@given(paired_flips(), margins())
def test_identical_arms_never_fail(flips: Flips, margin: float) -> None:
    same = Flips(flips.both_right + flips.lost, 0, 0, flips.both_wrong + flips.gained)
    judgement = judge(same, margin, settings=GATE)
    assert judgement.flips.delta == 0
    assert judgement.verdict is not Verdict.FAIL


@given(paired_flips(), margins())
def test_both_directions_cannot_fail(flips: Flips, margin: float) -> None:
    here, there = judge(flips, margin, settings=GATE), judge(flips.swapped, margin, settings=GATE)
    assert not (here.verdict is Verdict.FAIL and there.verdict is Verdict.FAIL)
    assert there.flips.delta == -here.flips.delta
    assert (there.interval.low, there.interval.high) == (-here.interval.high, -here.interval.low)


@given(paired_flips(largest=3000), margins())
def test_turning_a_gain_into_a_loss_never_helps(flips: Flips, margin: float) -> None:
    if flips.gained == 0:
        return
    worse = replace(flips, lost=flips.lost + 1, gained=flips.gained - 1)
    rank = {Verdict.FAIL: 0, Verdict.INCONCLUSIVE: 1, Verdict.PASS: 2}
    here = judge(flips, margin, chance=-1, settings=GATE).verdict
    there = judge(worse, margin, chance=-1, settings=GATE).verdict
    assert rank[there] <= rank[here]


@given(paired_flips(), margins(), margins())
def test_a_wider_margin_never_turns_a_pass_into_anything_else(flips: Flips, one: float, other: float) -> None:
    narrow, wide = sorted((one, other))
    if judge(flips, narrow, settings=GATE).verdict is Verdict.PASS:
        assert judge(flips, wide, settings=GATE).verdict is Verdict.PASS


@pytest.mark.parametrize("right", [0, 260, 300])
def test_a_baseline_at_chance_is_never_a_pass(right: int) -> None:
    """A model that guesses passes any gate on accuracy; the gate says so instead."""
    judgement = judge(Flips(right, 0, 0, 1000 - right), 0.05, chance=0.25, settings=GATE)
    expected = Verdict.PASS if right == 300 else Verdict.INCONCLUSIVE
    assert judgement.verdict is expected
    assert ("above chance" in judgement.reason) == (right != 300)


def test_a_drop_below_chance_still_fails() -> None:
    assert judge(Flips(10, 200, 0, 790), 0.05, chance=0.25, settings=GATE).verdict is Verdict.FAIL


def test_a_worst_verdict_is_the_first_of_invalid_fail_inconclusive_pass() -> None:
    assert worst([Verdict.PASS, Verdict.INCONCLUSIVE, Verdict.FAIL]) is Verdict.FAIL
    assert worst([Verdict.PASS, Verdict.INCONCLUSIVE]) is Verdict.INCONCLUSIVE
    assert worst([Verdict.FAIL, Verdict.INVALID]) is Verdict.INVALID
    assert worst([Verdict.PASS, Verdict.PASS]) is Verdict.PASS
    assert worst([]) is Verdict.INCONCLUSIVE


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1))
def test_flips_are_counted_question_by_question(answers: list[tuple[int, int]]) -> None:
    first, second = (np.array(x) for x in zip(*answers, strict=True))
    flips = count_flips(first == 0, second == 0, first == second)
    assert flips.n == len(answers)
    assert flips.lost == sum(a == 0 != b for a, b in answers)
    assert flips.gained == sum(b == 0 != a for a, b in answers)
    assert flips.churn == sum(a != b and a != 0 and b != 0 for a, b in answers)
    assert flips.baseline_right == sum(a == 0 for a, _ in answers)
    assert flips.candidate_right == sum(b == 0 for _, b in answers)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_at_a_true_drop_of_the_margin_a_pass_is_rare(setting: Setting) -> None:
    found = simulate(setting, -setting.margin, runs=20_000, seed=8, alpha=0.05)
    assert found is not None
    assert found.passed <= 0.06
    assert 0.94 <= found.covered <= 0.96


@pytest.mark.parametrize(
    ("task", "n", "flips"), [("mmlu", 14042, 0.01), ("mmlu", 14042, 0.02), ("gsm8k", 1319, 0.01), ("gsm8k", 1319, 0.02)]
)
def test_with_no_change_the_default_run_passes(task: str, n: int, flips: float) -> None:
    found = simulate(Setting(task, n, GATE.margin(task), flips), 0.0, runs=20_000, seed=9, alpha=0.05)
    assert found is not None
    assert found.passed >= 0.95


@pytest.mark.parametrize("setting", [s for s in SETTINGS if 2 * s.margin <= s.flips], ids=str)
def test_twice_the_margin_is_never_passed(setting: Setting) -> None:
    found = simulate(setting, -2 * setting.margin, runs=20_000, seed=10, alpha=0.05)
    assert found is not None
    assert found.passed <= 0.002


def test_the_sequential_rule_keeps_its_level_however_often_it_looks() -> None:
    """False PASS at -M, false FAIL at 0: at most 5 %, here with the slack of 300 runs."""
    setting = Setting("mmlu", 6000, 0.01, 0.02)
    at_margin = simulate_sequential(setting, -0.01, runs=300, seed=11, alpha=0.05)
    unchanged = simulate_sequential(setting, 0.0, runs=300, seed=12, alpha=0.05)
    assert at_margin.passed <= 0.08
    assert unchanged.failed <= 0.08
    assert unchanged.passed >= 0.95
    assert unchanged.questions < 6000 / 2
