"""Layouts: whatever lies in memory otherwise than usual is read rightly or refused, never misread."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fusecheck.interface import Strategy
from fusecheck.problem import Problem
from fusecheck.property_tests.effort import share
from fusecheck.property_tests.kernel.bench import Bench
from fusecheck.property_tests.strategies import PLAIN, STRATEGIES, problems

some = share(8, least=3)
VIEWS = [("column-major", "partial"), ("column-major", "residual")]
VIEWS += [("expanded", operand) for operand in ("partial", "residual", "gamma")]


def judge(bench: Bench, problem: Problem, layout: str, operand: str) -> None:
    """Run with one operand laid out so; every rank must take it and be right, or every rank refuse it."""
    assume(bench.accepts(problem))
    answers = bench.ask("lay_out", problem, layout, operand)
    refused = [answer["refused"] for answer in answers]
    if any(refused):
        if not all(refused):
            bench.fail(problem, f"{layout} {operand}: refused on some ranks only: {refused}")
        return
    bench.judge(problem, answers, f"{layout} {operand}: ")


@pytest.mark.parametrize(("layout", "operand"), VIEWS)
@some
@given(data=st.data())
def test_an_operand_in_another_layout_is_read_rightly_or_refused(
    bench: Bench, layout: str, operand: str, data: st.DataObject
) -> None:
    hidden = st.integers(1, 40).map(lambda lanes: 8 * lanes)
    drawn = problems(bench.world_size, families=PLAIN, tokens=st.integers(1, 9), hidden=hidden)
    judge(bench, data.draw(drawn, label="problem"), layout, operand)


@pytest.mark.parametrize("strategy", STRATEGIES)
@some
@given(data=st.data())
def test_the_residual_may_be_the_tensor_of_the_partial_sums(
    bench: Bench, strategy: Strategy, data: st.DataObject
) -> None:
    hidden = st.integers(1, 40).map(lambda lanes: 8 * lanes)
    drawn = problems(bench.world_size, families=PLAIN, strategies=[strategy], tokens=st.integers(1, 9), hidden=hidden)
    judge(bench, data.draw(drawn, label="problem"), "aliased", "residual")
