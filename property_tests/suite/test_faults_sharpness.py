"""How small an error is rejected, and how a failing case is made smaller."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from fusecheck.faults import scale_sensitivity, sensitivity
from fusecheck.faults.command import MOST_SCALE_ERROR, MOST_SCALE_ERROR_DEEP
from fusecheck.faults.defects import DEFECTS, scaled_by
from fusecheck.faults.sensitivity import RowResult, judge, smallest_scale_error
from fusecheck.faults.shrink import Shrinker, candidates
from fusecheck.problem import Call, Problem

pytestmark = pytest.mark.usefixtures("one_thread")
BY_NAME = {defect.name: defect for defect in DEFECTS}


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    with sensitivity.one_thread():
        yield


@pytest.mark.parametrize(
    "name",
    [
        "none: the right kernel",
        "scale x 1.0001",
        "t off by 1 bf16 ulp, 1 element",
        "y off by 1 bf16 ulp, 1 %",
        "y rounded to bf16, undeclared",
        "cast through bf16",
        "mean over hidden - 1",
        "multiplies, scale 1, bf16 y",
        "cast without saturation, scale / 8",
    ],
)
def test_one_run_of_a_defect_is_rejected_where_all_runs_should_be(name: str) -> None:
    defect = BY_NAME[name]
    rejected = judge(defect, seed=31)
    assert [got for want, got in zip(defect.expected, rejected, strict=True) if want == sensitivity.RUNS].count(
        False
    ) == 0
    assert defect.expected != (0, 0, 0) or rejected == (False, False, False)


def test_the_smallest_scale_error_is_what_the_criterion_predicts() -> None:
    any_order, deep = (smallest_scale_error(depth=depth, seed=0, steps=7) for depth in (False, True))
    # (hidden / 2 + 13.5) u and (depth / 2 + 14) u, with u = 2^-24, are the predicted thresholds.
    assert 0.9e-4 < any_order <= MOST_SCALE_ERROR
    assert 1e-6 < deep <= MOST_SCALE_ERROR_DEEP


def test_a_row_is_kept_only_where_every_run_that_should_be_is_rejected() -> None:
    defect = BY_NAME["mean over hidden - 1"]
    assert RowResult(defect, (3, 8, 8)).kept
    assert not RowResult(defect, (0, 7, 8)).kept
    assert not RowResult(BY_NAME["none: the right kernel"], (0, 1, 1)).kept


def test_a_scale_error_of_one_is_none() -> None:
    assert judge(replace(BY_NAME["scale x 1.2"], arithmetic=scaled_by(1.0)), seed=1) == (False, False, False)


BIG = Problem(
    tokens=129,
    hidden=2880,
    world_size=4,
    family="outliers",
    gamma="signed",
    schedule=(Call(64), Call(1, delayed=3, delay_ms=5), Call(64, hidden=512)),
)


def test_candidates_are_smaller_or_plainer_and_stay_problems() -> None:
    made = list(candidates(BIG))
    assert len(made) > 10
    assert all(problem != BIG for problem in made)
    assert all(problem.tokens <= 129 and problem.hidden <= 2880 for problem in made)


def test_shrinking_keeps_what_the_failure_needs_and_drops_the_rest() -> None:
    def fails(problem: Problem) -> bool:
        return problem.hidden >= 256 and any(call.tokens == 64 for call in problem.schedule)

    smallest = Shrinker(fails, lambda problem: True, runs=300, seconds=20).shrink(BIG)
    assert (smallest.hidden, smallest.tokens, smallest.world_size, smallest.family) == (256, 1, 2, "gaussian")
    assert len(smallest.schedule) == 1


def test_shrinking_stops_at_its_budget_and_asks_only_for_what_the_kernel_takes() -> None:
    asked: list[Problem] = []

    def fails(problem: Problem) -> bool:
        asked.append(problem)
        return True

    Shrinker(fails, lambda problem: problem.hidden != 64, runs=3, seconds=20).shrink(BIG)
    assert len(asked) == 3
    assert all(problem.hidden != 64 for problem in asked)


def test_one_step_of_all_scales_is_rejected_wherever_one_scale_alone_is_admissible() -> None:
    rows = list(scale_sensitivity.rows())
    assert [row for row in rows if not row.sharp] == []
    assert {row.unit for row in rows} == {"ulp of float32", "exponent", "step of E4M3"}
    assert all(row.steps == 1 for row in rows if row.expected == 1)
    assert {(row.quantiser, row.rules) for row in rows if row.steps > 1} == {
        ("dynamic-fp8", "flashinfer"),
        ("dynamic-fp8", "flashinfer-mnnvl-twoshot"),
        ("group-fp8", "flashinfer-block"),
        ("group-fp8", "tokenspeed"),
    }
