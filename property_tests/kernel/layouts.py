"""Layouts of an operand that a kernel must read rightly or refuse: columns first, rows of stride zero, aliases.

Gaps and offsets are for every case: `fusecheck.case.layouts`, of the check `layouts`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from fusecheck.interface import RankInputs
from fusecheck.property_tests.kernel.given import Given

Lay = Callable[[Given, int, str], tuple[Given, RankInputs]]
"""(call, rank, operand) -> the call with the values that the operand then has, and what this rank receives."""


def with_operand(inputs: RankInputs, operand: str, tensor: Tensor) -> RankInputs:
    """The inputs with another tensor for one operand."""
    changed: dict[str, Any] = {operand: tensor}
    return replace(inputs, **changed)


def column_major(given: Given, rank: int, operand: str) -> tuple[Given, RankInputs]:
    """Neighbours along a row lie a column apart."""
    inputs = given.of_rank(rank)
    return given, with_operand(inputs, operand, getattr(inputs, operand).t().contiguous().t())


def expanded(given: Given, rank: int, operand: str) -> tuple[Given, RankInputs]:
    """One row (one lane of gamma) with stride zero stands for all."""
    if operand == "partial":
        same = replace(given, partials=tuple(_first_for_all(partial).contiguous() for partial in given.partials))
    else:
        changed: dict[str, Any] = {operand: _first_for_all(getattr(given, operand)).contiguous()}
        same = replace(given, **changed)
    inputs = same.of_rank(rank)
    return same, with_operand(inputs, operand, _first_for_all(getattr(inputs, operand)))


def _first_for_all(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor)


def aliased(given: Given, rank: int, operand: str) -> tuple[Given, RankInputs]:
    """The residual is the very tensor that holds the partial sums."""
    del operand
    same = replace(given, partials=(given.residual,) * given.problem.world_size)
    inputs = same.of_rank(rank)
    shared = inputs.residual.clone()
    return same, replace(inputs, partial=shared, residual=shared)


LAYOUTS: dict[str, Lay] = {"column-major": column_major, "expanded": expanded, "aliased": aliased}
"""The layouts by name."""
