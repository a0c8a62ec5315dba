"""Refusals: what the backend says it does not take is refused with an error, and what it takes runs."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fusecheck.interface import Strategy
from fusecheck.problem import Problem
from fusecheck.property_tests.effort import share
from fusecheck.property_tests.kernel.bench import Bench
from fusecheck.property_tests.kernel.refusals import SPOILERS
from fusecheck.property_tests.strategies import PLAIN, problems

few = share(8, least=3)
WILD = (8, 16, 8192, 8200, 8216, 16384, 16392, 32768, 65536, 65544, 131072)
"""Hidden sizes at and beyond the edges of what fused kernels take."""


@pytest.mark.parametrize("spoiler", sorted(SPOILERS))
@few
@given(data=st.data())
def test_an_operand_that_would_be_misread_is_refused_and_does_no_harm(
    bench: Bench, spoiler: str, data: st.DataObject
) -> None:
    hidden = st.integers(2, 40).map(lambda lanes: 8 * lanes)
    drawn = problems(bench.world_size, families=PLAIN, tokens=st.integers(2, 9), hidden=hidden)
    problem = data.draw(drawn, label="problem")
    assume(bench.accepts(problem))
    answers = bench.ask("spoil", problem, spoiler)
    for rank, answer in enumerate(answers):
        if not answer["refused"]:
            bench.fail(problem, f"{spoiler}: rank {rank} took it, expected an error")
    bench.judge(problem, answers, f"after {spoiler} was refused: ")


@share(3, least=6)
@given(data=st.data())
def test_what_the_backend_says_it_takes_runs_and_what_it_refuses_raises(bench: Bench, data: st.DataObject) -> None:
    drawn = problems(bench.world_size, tokens=st.integers(1, 3), hidden=st.sampled_from(WILD), elements=2**18)
    problem = data.draw(drawn, label="problem")
    if bench.accepts(problem):
        bench.check(problem)
    else:
        must_raise(bench, problem)


def test_a_one_shot_call_beyond_its_buffer_is_refused_or_right(bench: Bench) -> None:
    problem = Problem(strategy=Strategy.ONESHOT, world_size=bench.world_size, tokens=264, hidden=65536)
    if bench.accepts(problem):
        bench.check(problem)
    else:
        must_raise(bench, problem)


def must_raise(bench: Bench, problem: Problem) -> None:
    """The kernel itself refuses, on every rank."""
    for rank, answer in enumerate(bench.ask("attempt", problem)):
        if not answer["refused"]:
            bench.fail(problem, f"rank {rank} ran what the backend says it refuses, expected an error")
