"""What the strategies draw, and where they shrink to."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from fusecheck.inputs.families import FAMILIES
from fusecheck.problem import Call, Problem
from fusecheck.property_tests.strategies import LIMIT, ODD_HIDDEN, calls, problems, scales, token_counts, widths

often = settings(max_examples=400, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


def drawn(strategy: SearchStrategy[object], count: int = 400) -> list[object]:
    """So many values of a strategy."""
    values: list[object] = []

    @settings(often, max_examples=count)
    @given(strategy)
    def collect(value: object) -> None:
        values.append(value)

    collect()
    return values


def test_the_simplest_problem_is_one_small_row_of_gaussian_data_with_scale_one() -> None:
    simplest = find(problems(2), lambda problem: True, settings=often)
    assert (simplest.tokens, simplest.hidden, simplest.world_size) == (1, 8, 2)
    assert (simplest.family, simplest.scale, simplest.seed, simplest.schedule) == ("gaussian", 1.0, 0, ())


@pytest.mark.parametrize("hidden", [16, 256, 1032, 2880])
def test_a_failure_from_some_width_on_shrinks_to_that_width(hidden: int) -> None:
    least = find(
        problems(2),
        lambda problem: problem.hidden >= hidden,
        settings=settings(max_examples=2000, database=None, suppress_health_check=list(HealthCheck)),
        random=random.Random(hidden),
    )
    assert (least.hidden, least.tokens) == (hidden, 1)


def test_scale_one_is_drawn_and_never_the_only_scale() -> None:
    values = drawn(scales())
    ones = values.count(1.0)
    assert 0 < ones < len(values) / 2
    assert len(set(values)) > 50


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_is_drawn_with_scales_that_keep_its_property(family: str) -> None:
    values = [problem.scale for problem in drawn(problems(2, families=[family]), 60) if isinstance(problem, Problem)]
    assert len(set(values)) > 1


def test_token_counts_meet_remainders_and_the_one_shot_limit() -> None:
    counts = set(drawn(token_counts(4)))
    assert set(range(1, 10)) <= counts
    assert {LIMIT - 1, LIMIT, LIMIT + 1} <= counts
    assert {count % 4 for count in counts if isinstance(count, int)} == {0, 1, 2, 3}


def test_widths_meet_odd_multiples_of_eight_and_real_models() -> None:
    found = set(drawn(st.lists(widths(), min_size=4, max_size=4).map(tuple)))
    hidden = {width for several in found if isinstance(several, tuple) for width in several}
    assert {2880, 4096, 7168} <= hidden
    assert len(hidden & set(ODD_HIDDEN)) >= 5
    assert all(width % 8 == 0 for width in hidden)


def test_calls_are_problems_of_their_own_and_delay_ranks_that_there_are() -> None:
    strategy = calls(2, most_tokens=16, hidden=(8, 64), dtypes=("bf16", "fp16"))
    made = [call for call in drawn(strategy) if isinstance(call, Call)]
    assert {call.delayed for call in made} == {None, 0, 1}
    assert {call.dtype for call in made} == {"bf16", "fp16"}
    assert all((call.delay_ms > 0) == (call.delayed is not None) for call in made)
    problem = Problem(schedule=tuple(made[:5]))
    assert Problem.from_json(problem.to_json()) == problem
