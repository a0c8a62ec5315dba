"""Relations between two calls, which hold whatever the right answer is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fusecheck.interface import FusionOp, Strategy
from fusecheck.operations import COMPOSITIONS, Collective
from fusecheck.problem import Problem
from fusecheck.property_tests.effort import share
from fusecheck.property_tests.kernel.bench import Bench
from fusecheck.property_tests.strategies import ORDER_FREE, PLAIN, permutations, problems

both = FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8
MADE = [op for op in COMPOSITIONS if op.collective is Collective.ALL_REDUCE and op.returns_scale and op.returns_norm]
moderate = share(2, least=5)
ROWS = st.integers(1, 24)
WIDTHS = st.one_of(st.integers(1, 64).map(lambda lanes: 8 * lanes), st.sampled_from((1032, 2880)))


def draw(bench: Bench, data: st.DataObject, **limits: Any) -> Problem:
    """A small Problem that the backend takes; see `problems` for the limits."""
    limits = {"families": PLAIN, "tokens": ROWS, "hidden": WIDTHS, **limits}
    problem: Problem = data.draw(problems(bench.world_size, **limits), label="problem")
    assume(bench.accepts(problem))
    return problem


def summable(bench: Bench) -> tuple[str, ...]:
    """Families whose sums are determined: all plain ones where the order is declared, else those free of it."""
    return PLAIN if bench.world_size <= 2 or bench.dataflow(Problem()).order_free else ORDER_FREE


@moderate
@given(data=st.data())
def test_ranks_may_swap_their_partial_sums(bench: Bench, data: st.DataObject) -> None:
    problem = draw(bench, data, families=PLAIN if bench.world_size <= 2 else ORDER_FREE)
    bench.relate("permuted_ranks", problem, order=data.draw(permutations(bench.world_size), label="order"))


@moderate
@given(data=st.data())
def test_it_does_not_matter_which_rank_adds_zeros(bench: Bench, data: st.DataObject) -> None:
    problem = draw(bench, data, families=summable(bench))
    place = st.integers(0, bench.world_size - 1)
    bench.relate("zero_rank", problem, first=data.draw(place, label="first"), second=data.draw(place, label="second"))


@moderate
@given(data=st.data())
def test_rows_may_change_places(bench: Bench, data: st.DataObject) -> None:
    problem = draw(bench, data, families=summable(bench))
    bench.relate("permuted_tokens", problem, order=data.draw(permutations(problem.tokens), label="order"))


@moderate
@given(data=st.data())
def test_a_row_alone_gives_what_it_gave_in_a_batch(bench: Bench, data: st.DataObject) -> None:
    problem = draw(bench, data, families=summable(bench))
    assume(bench.accepts(replace(problem, tokens=1)))
    bench.relate("lone_row", problem, row=data.draw(st.integers(0, problem.tokens - 1), label="row"))


@moderate
@given(data=st.data())
def test_rows_give_the_same_bits_in_every_batch_unless_invariant_below_says_otherwise(
    bench: Bench, data: st.DataObject
) -> None:
    """Whoever declares nothing is held to every batch; a kernel that depends on the rows declares from how many on."""
    below = bench.dataflow(Problem(world_size=bench.world_size)).invariant_below
    most = max(1, min(24, below - 1)) if below else 24
    rows, widths = st.integers(1, most), st.sampled_from((64, 128, 256, 512, 1024))
    problem = draw(bench, data, families=("gaussian", "outliers", "cancelling"), tokens=rows, hidden=widths)
    assume(bench.dataflow(problem).invariant_below == below)
    order = data.draw(permutations(problem.tokens), label="order")
    order = order[: data.draw(st.integers(1, problem.tokens), label="rows")]
    assume(bench.accepts(replace(problem, tokens=len(order))))
    bench.relate("rows_of_another_batch", problem, rows=order)


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=["NaN", "infinity"])
@moderate
@given(data=st.data())
def test_a_row_keeps_its_bits_when_its_neighbours_are_poisoned(
    bench: Bench, poison: float, data: st.DataObject
) -> None:
    problem = draw(bench, data, tokens=st.integers(2, 24))
    row = data.draw(st.integers(0, problem.tokens - 1), label="row")
    bench.relate("poisoned_neighbours", problem, row=row, poison=poison)


@moderate
@given(data=st.data())
def test_the_residual_may_change_places_with_the_only_partial_sum(bench: Bench, data: st.DataObject) -> None:
    bench.relate("residual_and_partial_swapped", draw(bench, data))


@pytest.mark.needs_ranks(2)
@moderate
@given(data=st.data())
def test_with_a_residual_of_zero_a_rank_can_bring_the_residual(bench: Bench, data: st.DataObject) -> None:
    bench.relate("residual_from_a_rank", draw(bench, data))


@moderate
@given(data=st.data())
def test_doubling_gamma_and_scale_doubles_the_norm_and_keeps_the_codes(bench: Bench, data: st.DataObject) -> None:
    bench.relate("gamma_and_scale_doubled", draw(bench, data, dtypes=["bf16"]))


@moderate
@given(data=st.data())
def test_doubling_the_scale_takes_one_from_the_exponent_of_the_codes(bench: Bench, data: st.DataObject) -> None:
    ops = [both, FusionOp.RESIDUAL_RMS_NORM_QUANT_FP8]
    bench.relate("scale_doubled", draw(bench, data, dtypes=["bf16"], ops=ops))


@moderate
@given(data=st.data())
def test_scaling_all_inputs_and_the_root_of_eps_keeps_the_norm(bench: Bench, data: st.DataObject) -> None:
    problem = draw(bench, data, dtypes=["bf16"])
    bench.relate("inputs_scaled", problem, power=data.draw(st.integers(-8, 8), label="power of two"))


@moderate
@given(data=st.data())
def test_one_shot_and_two_shot_give_the_same_sums(bench: Bench, data: st.DataObject) -> None:
    problem = draw(bench, data, families=summable(bench), strategies=[Strategy.ONESHOT])
    assume(bench.accepts(replace(problem, strategy=Strategy.TWOSHOT)))
    bench.relate("two_strategies", problem)


@pytest.mark.parametrize("other", [FusionOp.RESIDUAL_RMS_NORM_QUANT_FP8, FusionOp.RESIDUAL_RMS_NORM])
@moderate
@given(data=st.data())
def test_an_op_gives_the_same_bits_as_the_op_that_returns_everything(
    bench: Bench, other: FusionOp, data: st.DataObject
) -> None:
    bench.relate("two_ops", draw(bench, data, ops=[both]), first=both.value, second=other.value)


@moderate
@given(data=st.data())
def test_a_format_has_the_same_bits_whether_its_norm_is_returned_or_not(bench: Bench, data: st.DataObject) -> None:
    """So what is judged from the returned norm holds for the twin, where the norm is only enclosed."""
    taken = [op for op in MADE if bench.accepts(Problem(op=op, world_size=bench.world_size, tokens=5, hidden=128))]
    if not taken:
        pytest.skip("the backend makes no scales, and returns the norm beside them")
    op = data.draw(st.sampled_from(taken), label="op")
    problem = draw(bench, data, ops=[op], hidden=st.sampled_from((128, 256, 640, 1024)))
    bench.relate("two_ops", problem, first=op.value, second=op.value.replace("_OUT_", "_"))
