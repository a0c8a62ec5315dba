"""The golden model's recorded activations as an input family of the kernel question."""

from __future__ import annotations

import pytest
import torch

from golden.model.capture import load_activations
from verify.inputs.rank_inputs import Inputs
from verify.problem import Problem

CPU = torch.device("cpu")
COUNT = 8 * 24


def rows_of(world_size: int, hidden: int = 512, seed: int = 5) -> tuple[list[torch.Tensor], torch.Tensor]:
    problem = Problem(world_size=world_size, tokens=COUNT, hidden=hidden, seed=seed, family="captured")
    inputs = Inputs(problem, CPU)
    return inputs.partials(range(COUNT)), inputs.residual()


def as_set(rows: torch.Tensor) -> set[bytes]:
    return {row.contiguous().view(torch.int16).numpy().tobytes() for row in rows}


def test_on_eight_ranks_the_rows_are_the_recorded_ones_bit_for_bit() -> None:
    recorded = load_activations()
    partials, residual = rows_of(8)
    assert as_set(residual) == as_set(recorded["residual"].flatten(0, 1))
    for rank in (0, 3, 7):
        assert as_set(partials[rank]) == as_set(recorded["partial"][:, rank].flatten(0, 1))


@pytest.mark.parametrize("world_size", [1, 2, 4, 16])
def test_another_number_of_ranks_holds_the_same_sums_but_for_one_rounding_each(world_size: int) -> None:
    exact = torch.stack(rows_of(8)[0]).double().sum(0)
    partials, residual = rows_of(world_size)
    assert torch.equal(residual, rows_of(8)[1])
    magnitude = torch.stack(partials).double().abs().sum(0)
    assert bool(((torch.stack(partials).double().sum(0) - exact).abs() <= magnitude * 2.0**-8 + 1e-30).all())


def test_a_wider_case_repeats_the_columns_and_a_narrower_one_takes_the_first() -> None:
    plain, wide, narrow = (rows_of(2, hidden)[1] for hidden in (512, 1200, 64))
    assert torch.equal(wide[:, 512:1024], plain)
    assert torch.equal(wide[:, 1024:], plain[:, :176])
    assert torch.equal(narrow, plain[:, :64])


def test_another_seed_begins_at_another_row() -> None:
    assert not torch.equal(rows_of(2, seed=1)[1][:4], rows_of(2, seed=2)[1][:4])
