"""Sequential mode: blocks do not matter, a verdict stands, a broken-off run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusecheck.errors import UsageError
from fusecheck.eval.gate import Verdict
from fusecheck.eval.sequential import STAKES, Evidence, SequentialPlan, load_state, run_sequential, stratified_order

differences = st.lists(st.sampled_from([-1, 0, 0, 0, 1]), max_size=200)


@given(differences, st.integers(1, 50), st.floats(0.005, 0.1))
def test_the_blocks_do_not_matter(xs: list[int], block: int, margin: float) -> None:
    at_once = Evidence(margin).extended(xs)
    by_blocks = Evidence(margin)
    for start in range(0, len(xs), block):
        by_blocks = by_blocks.extended(xs[start : start + block])
    assert (by_blocks.n, by_blocks.total, by_blocks.verdict) == (at_once.n, at_once.total, at_once.verdict)
    np.testing.assert_allclose(by_blocks.log_pass, at_once.log_pass, rtol=0, atol=1e-9)


@given(differences, st.floats(0.005, 0.1))
def test_the_wealth_is_the_mean_over_the_stakes(xs: list[int], margin: float) -> None:
    evidence = Evidence(margin).extended(xs)
    seen = xs[: evidence.n]
    expected = np.mean([np.prod([1 + s * (x + margin) for x in seen]) for s in STAKES])
    assert abs(evidence.e_pass / expected - 1) < 1e-9
    expected = np.mean([np.prod([1 - s * x for x in seen]) for s in STAKES])
    assert abs(evidence.e_fail / expected - 1) < 1e-9


def test_the_wealth_expects_nothing_when_the_hypothesis_is_true() -> None:
    """A fair game: at a true change of exactly -M, and of 0, one question leaves the expected wealth at 1."""
    for margin, lost, gained in ((0.01, 0.03, 0.02), (0.05, 0.06, 0.01)):
        start = Evidence(margin)
        still = 1 - lost - gained
        mean = sum(p * start.extended([x]).e_pass for x, p in ((-1, lost), (1, gained), (0, still)))
        assert abs(mean - 1) < 1e-12
    fair = sum(p * Evidence(0.01).extended([x]).e_fail for x, p in ((-1, 0.02), (1, 0.02), (0, 0.96)))
    assert abs(fair - 1) < 1e-12


@given(st.lists(st.sampled_from([-1, 0, 1]), max_size=50))
def test_a_verdict_stands(later: list[int]) -> None:
    decided = Evidence(0.01).extended([0] * 2000)
    assert decided.verdict is Verdict.PASS
    assert decided.extended(later) == decided


def test_a_steady_loss_fails_within_a_few_hundred_questions() -> None:
    evidence = Evidence(0.02).extended([-1, 0, 0, 0, 0, 0, 0, 0, 0, 0] * 100)
    assert evidence.verdict is Verdict.FAIL
    assert evidence.n < 300


def test_questions_that_run_out_leave_it_open() -> None:
    assert Evidence(0.005).extended([1, -1] * 30).verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize("wrong", [[2], [0.5], [[1, 0]], [float("nan")]])
def test_differences_other_than_minus_one_nought_one_are_refused(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="must be -1, 0 or 1"):
        Evidence(0.01).extended(wrong)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=300), st.integers(0, 5))
def test_the_order_is_a_permutation_with_every_stratum_spread_evenly(strata: list[str], seed: int) -> None:
    order = stratified_order(strata, seed)
    assert sorted(order) == list(range(len(strata)))
    assert list(stratified_order(strata, seed)) == list(order)
    half = [strata[i] for i in order[: len(order) // 2]]
    for name in set(strata):
        # A stratum's k-th member lies in the k-th part of the line, so half of the line holds half of it, give or take.
        assert abs(half.count(name) - strata.count(name) / 2) <= 1 + len(set(strata))


def _plan(n: int = 3000, **changes: object) -> SequentialPlan:
    fields: dict[str, object] = {"questions": tuple(("t", i) for i in range(n)), "margin": 0.005, "block": 100}
    return SequentialPlan(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_run_that_was_broken_off_goes_on_where_it_stopped(tmp_path: Path) -> None:
    answers = np.random.default_rng(0).choice((-1, 0, 1), size=3000, p=(0.005, 0.99, 0.005))
    asked: list[int] = []

    def ask(block: Sequence[tuple[str, int]]) -> list[int]:
        asked.extend(i for _, i in block)
        return [int(answers[i]) for _, i in block]

    def ask_and_die(block: Sequence[tuple[str, int]]) -> list[int]:
        if len(asked) >= 500:
            raise KeyboardInterrupt
        return ask(block)

    path = tmp_path / "state.json"
    with pytest.raises(KeyboardInterrupt):
        run_sequential(_plan(), ask_and_die, path)
    broken_off = len(asked)
    resumed = run_sequential(_plan(), ask, path)
    assert broken_off == 500
    assert asked == list(range(len(asked)))
    whole = run_sequential(_plan(), ask, tmp_path / "other.json")
    assert resumed.evidence == whole.evidence
    assert resumed.history == whole.history
    assert resumed.evidence.verdict is not Verdict.INCONCLUSIVE or resumed.asked == 3000


@pytest.mark.parametrize("change", [{"margin": 0.01}, {"identity": "another model"}, {"n": 2999}, {"alpha": 0.01}])
def test_another_plan_does_not_go_on_with_the_state(tmp_path: Path, change: dict[str, object]) -> None:
    run_sequential(_plan(), lambda block: [0] * len(block), tmp_path / "state.json")
    with pytest.raises(UsageError, match="another plan"):
        load_state(tmp_path / "state.json", _plan(**change))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"plan_digest": 1, "asked": 0, "evidence": {}}'])
def test_a_broken_state_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(UsageError, match=r"state\.json: not a state"):
        load_state(tmp_path / "state.json", _plan())


def test_the_state_is_plain_json(tmp_path: Path) -> None:
    run_sequential(_plan(), lambda block: [0] * len(block), tmp_path / "state.json")
    data = json.loads((tmp_path / "state.json").read_text())
    assert data["evidence"]["verdict"] == "pass"
    assert data["asked"] % 100 == 0
