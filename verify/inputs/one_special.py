"""Families whose rows hold something special in one operand at a time: on each rank, in the residual, in gamma.

Of six rows one has it in the residual, the others on the ranks in turn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusecheck.inputs.cells import Cells

VALUES = ("NaN", "+Inf", "-Inf", "large", "overflow")
"""What a row holds in one lane: 2^100 (6e4 in fp16), whose square overflows; or two addends whose sum overflows."""

GAMMA_VALUES = ("NaN", "+Inf", "-Inf", "largest")
"""What lanes 1, 3, 5 and 7 of a special gamma hold."""

_TURN = 1 + len(VALUES)
_LANE = 104


def rows_of_all(world_size: int) -> int:
    """Rows that hold every value in every operand."""
    return _TURN * max(len(VALUES), world_size)


def rank_rows(base: Tensor, cells: Cells, rank: int, world_size: int) -> Tensor:
    """The ordinary addends of a rank with what is special in them."""
    number = cells.row + cells.seed
    turn = number - number // _TURN - 1
    value, where = turn % len(VALUES), turn // len(VALUES) % world_size
    pair = (value == VALUES.index("overflow")) & ((where + 1) % world_size == rank)
    mine = torch.where(number % _TURN != 0, (where == rank) | pair, _overflows_with_rank_0(number) & (rank == 0))
    return _put(base, cells, torch.where(number % _TURN != 0, value, VALUES.index("overflow")), mine)


def residual_rows(base: Tensor, cells: Cells) -> Tensor:
    """The ordinary residual with what is special in it."""
    number = cells.row + cells.seed
    return _put(base, cells, number // _TURN % len(VALUES), number % _TURN == 0)


def _overflows_with_rank_0(number: Tensor) -> Tensor:
    return number // _TURN % len(VALUES) == VALUES.index("overflow")


def _put(base: Tensor, cells: Cells, value: Tensor, mine: Tensor) -> Tensor:
    large = 2.0**100 if cells.format.precision == 8 else 6e4
    numbers = [torch.nan, torch.inf, -torch.inf, large, 0.75 * cells.format.largest]
    table = torch.tensor(numbers, dtype=torch.float64, device=cells.device).to(base.dtype)
    lane = cells.column == cells.row_bits(_LANE) % cells.hidden
    return torch.where(lane & mine, table[value], base)


def special_gamma(base: Tensor, cells: Cells) -> Tensor:
    """A norm weight, [1, hidden], with one lane of each of `GAMMA_VALUES`; a row has eight lanes or more."""
    numbers = [torch.nan, torch.inf, -torch.inf, cells.format.largest]
    made = base.clone()
    made[0, 1 : 2 * len(numbers) : 2] = torch.tensor(numbers, dtype=torch.float64, device=cells.device).to(base.dtype)
    return made


def values_of(family: str, seed: int, tokens: int, world_size: int) -> set[str]:
    """What a call of a family holds of these, as value and operand; empty for other families."""
    if family == "special-gamma":
        return {f"{value} gamma" for value in GAMMA_VALUES}
    if family != "one-special":
        return set()
    numbers = range(seed, seed + min(tokens, _TURN * len(VALUES) * world_size))
    return {_name(number, world_size) for number in numbers}


def _name(number: int, world_size: int) -> str:
    turn, last = divmod(number, _TURN)
    if last == 0:
        return f"{VALUES[turn % len(VALUES)]} residual"
    turn = number - turn - 1
    return f"{VALUES[turn % len(VALUES)]} rank {turn // len(VALUES) % world_size}"
