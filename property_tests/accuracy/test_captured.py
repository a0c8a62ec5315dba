"""The golden model's recorded operands as an input family of the kernel question."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch

from fusecheck.faults.shrink import candidates
from fusecheck.golden.model.capture import load_activations
from fusecheck.inputs.captured import site_of
from fusecheck.inputs.families import FAMILIES
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.inputs.scales import draw_scale
from fusecheck.kernel.plan import Plan
from fusecheck.problem import Call, Problem
from fusecheck.property_tests.suite.samples import sample_of

CPU = torch.device("cpu")
SITES, ROWS = 8, 24
SEEDS = {site_of(seed): seed for seed in range(200)}
"""A seed for each site."""


def case(seed: int, world_size: int = 2, *, hidden: int = 512) -> Problem:
    scale = draw_scale("captured", seed)
    return Problem(
        world_size=world_size,
        tokens=ROWS,
        hidden=hidden,
        seed=seed,
        family="captured",
        gamma="captured",
        scale=scale,
    )


def rows_of(problem: Problem) -> tuple[list[torch.Tensor], torch.Tensor]:
    inputs = Inputs(problem, CPU)
    return inputs.partials(range(problem.tokens)), inputs.residual()


def as_set(rows: torch.Tensor) -> set[bytes]:
    return {row.contiguous().view(torch.int16).numpy().tobytes() for row in rows}


@pytest.mark.parametrize("site", range(SITES))
def test_on_eight_ranks_all_operands_are_those_of_one_recorded_site_bit_for_bit(site: int) -> None:
    recorded, problem = load_activations(), case(SEEDS[site], 8)
    partials, residual = rows_of(problem)
    assert as_set(residual) == as_set(recorded["residual"][site])
    for rank in (0, 3, 7):
        assert as_set(partials[rank]) == as_set(recorded["partial"][site, rank])
    inputs = Inputs(problem, CPU)
    assert torch.equal(inputs.gamma(), recorded["gamma"][site])
    assert torch.equal(inputs.scale(), recorded["scale"][site : site + 1])


def test_a_case_survives_its_replay_line_and_a_schedule_stays_at_its_site() -> None:
    for seed in (3, 2**62, 2**63 - 1):
        problem = replace(case(seed), schedule=(Call(5), Call(9, hidden=128), Call(2)))
        assert Problem.from_json(problem.to_json()) == problem
        calls = [own for _, own in problem.calls()]
        assert {site_of(own.seed) for own in calls} == {site_of(seed)}
        assert len({own.seed for own in calls}) == 4
        for own in calls:
            assert FAMILIES["captured"].holds(sample_of(own)) is None


def test_the_plan_draws_whole_sites() -> None:
    problems = [c.problem for c in islice(Plan(families=("captured",)).cases(4), 60)]
    assert {site_of(p.seed) for p in problems} == set(range(SITES))
    for problem in problems:
        assert (problem.gamma, problem.weight_bias) == ("captured", 0.0)
        assert problem.scale == draw_scale("captured", problem.seed)


@pytest.mark.parametrize("change", [{"scale": 0.0125}, {"seed": SEEDS[2]}, {"gamma": "captured", "family": "gaussian"}])
def test_operands_of_two_sites_or_of_none_are_noticed(change: dict[str, object]) -> None:
    mixed = replace(case(SEEDS[1]), **change)  # type: ignore[arg-type]
    assert "of no recorded site" in str(FAMILIES["captured"].holds(sample_of(mixed)))


def test_rows_alone_may_be_recorded_and_a_smaller_case_still_is_what_its_name_says() -> None:
    whole = replace(case(SEEDS[1], 4), schedule=(Call(5),))
    smaller = [p for p in candidates(whole) if p.family == "captured"]
    assert any(p.gamma == "spread" for p in smaller)
    assert len(smaller) > 8
    for problem in smaller:
        assert FAMILIES["captured"].holds(sample_of(problem)) is None, problem


@pytest.mark.parametrize("world_size", [1, 2, 4, 16])
def test_another_number_of_ranks_holds_the_same_sums_but_for_one_rounding_each(world_size: int) -> None:
    for seed in SEEDS.values():
        whole, whole_residual = rows_of(case(seed, 8))
        exact = torch.stack(whole).double().sum(0)
        partials, residual = rows_of(case(seed, world_size))
        assert torch.equal(residual, whole_residual)
        magnitude = torch.stack(partials).double().abs().sum(0)
        assert bool(((torch.stack(partials).double().sum(0) - exact).abs() <= magnitude * 2.0**-8 + 1e-30).all())


def test_a_wider_case_repeats_the_columns_and_a_narrower_one_takes_the_first() -> None:
    plain, wide, narrow = (rows_of(case(5, hidden=hidden))[1] for hidden in (512, 1200, 64))
    assert torch.equal(wide[:, 512:1024], plain)
    assert torch.equal(wide[:, 1024:], plain[:, :176])
    assert torch.equal(narrow, plain[:, :64])
    gamma, wider = (Inputs(case(5, hidden=hidden), CPU).gamma() for hidden in (512, 1200))
    assert torch.equal(wider, torch.cat([gamma, gamma, gamma[:176]]))


def test_another_seed_begins_at_another_row() -> None:
    first, second = (rows_of(case(seed))[1] for seed in [s for s in range(99) if site_of(s) == 0][:2])
    assert not torch.equal(first[:4], second[:4])
    assert as_set(first) == as_set(second)
