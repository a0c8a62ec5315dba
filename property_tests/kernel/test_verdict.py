"""Every stage of the verdict on drawn Problems: alive, ranks agree, residual, norm, quant, unfused, again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fusecheck.case.run import CHECKS
from fusecheck.inputs.families import FAMILIES
from fusecheck.interface import STATIC_OPS, FusionOp, Strategy
from fusecheck.kernel.table import model_sizes
from fusecheck.problem import Problem
from fusecheck.property_tests.effort import share
from fusecheck.property_tests.kernel.bench import Bench
from fusecheck.property_tests.strategies import (
    FINITE,
    LIMIT,
    ODD_HIDDEN,
    STRATEGIES,
    problems,
    token_counts,
)

SMALL = st.integers(1, 64).map(lambda lanes: 8 * lanes)


def judge(bench: Bench, problem: Problem, checks: Sequence[str] = ()) -> None:
    assume(bench.accepts(problem))
    bench.check(problem, checks)


@given(data=st.data())
def test_every_output_of_any_problem_is_one_that_the_dataflow_allows(bench: Bench, data: st.DataObject) -> None:
    drawn = data.draw(st.lists(problems(bench.world_size), min_size=1, max_size=len(bench.pools)), label="problems")
    taken = [problem for problem in drawn if bench.accepts(problem)]
    assume(taken)
    bench.check_all(taken)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@share(8)
@given(data=st.data())
def test_every_kind_of_input_is_computed_rightly(bench: Bench, family: str, data: st.DataObject) -> None:
    judge(bench, data.draw(problems(bench.world_size, families=[family]), label="problem"))


@pytest.mark.parametrize(
    ("tokens", "hidden"),
    [
        pytest.param(None, st.sampled_from(model_sizes()), id="widths of real models"),
        pytest.param(None, st.sampled_from(ODD_HIDDEN), id="odd multiples of eight lanes"),
        pytest.param(st.integers(LIMIT - 1, LIMIT + 1), SMALL, id="one-shot's limit"),
    ],
)
@share(4)
@given(data=st.data())
def test_sizes_at_which_kernels_change_are_computed_rightly(
    bench: Bench, tokens: st.SearchStrategy[int] | None, hidden: st.SearchStrategy[int], data: st.DataObject
) -> None:
    judge(bench, data.draw(problems(bench.world_size, tokens=tokens, hidden=hidden), label="problem"))


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(data=st.data())
def test_every_token_is_computed_when_the_ranks_share_them_unevenly(
    bench: Bench, strategy: Strategy, data: st.DataObject
) -> None:
    few = st.integers(1, 2 * bench.world_size + 1)
    uneven = st.one_of(few, token_counts(bench.world_size, 64).filter(lambda t: t % bench.world_size != 0))
    judge(bench, data.draw(problems(bench.world_size, strategies=[strategy], tokens=uneven, hidden=SMALL)))


@pytest.mark.parametrize("op", list(STATIC_OPS))
@share(4)
@given(data=st.data())
def test_every_op_returns_what_it_names_and_nothing_else(bench: Bench, op: FusionOp, data: st.DataObject) -> None:
    judge(bench, data.draw(problems(bench.world_size, ops=[op]), label="problem"))


@pytest.mark.parametrize("weight_bias", [0.0, 1.0])
@share(4)
@given(data=st.data())
def test_the_weight_bias_is_added_once(bench: Bench, weight_bias: float, data: st.DataObject) -> None:
    drawn = data.draw(problems(bench.world_size, families=["gaussian", "outliers"]), label="problem")
    gamma = "small" if weight_bias else "spread"
    judge(bench, replace(drawn, gamma=gamma, weight_bias=weight_bias))


@share(2)
@given(data=st.data())
def test_a_second_run_and_the_other_strategies_and_the_unfused_ops_agree(bench: Bench, data: st.DataObject) -> None:
    judge(bench, data.draw(problems(bench.world_size, families=FINITE), label="problem"), CHECKS)
