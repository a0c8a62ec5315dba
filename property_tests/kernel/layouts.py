"""Layouts of an operand that a kernel must read rightly or refuse: gaps, offsets, rows of stride zero, aliases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusecheck.interface import RankInputs
from fusecheck.property_tests.kernel.given import Given

OPERANDS = ("partial", "residual", "gamma")

Lay = Callable[[Given, int, str], tuple[Given, RankInputs]]
"""(call, rank, operand) -> the call with the values that the operand then has, and what this rank receives."""


def _viewed(given: Given, rank: int, operand: str, view: Callable[[Tensor], Tensor]) -> tuple[Given, RankInputs]:
    """Replace an operand by a view that holds the same values."""
    inputs = given.of_rank(rank)
    laid = view(getattr(inputs, operand))
    assert torch.equal(laid.contiguous().view(torch.int16), getattr(inputs, operand).contiguous().view(torch.int16))
    return given, with_operand(inputs, operand, laid)


def with_operand(inputs: RankInputs, operand: str, tensor: Tensor) -> RankInputs:
    """The inputs with another tensor for one operand."""
    changed: dict[str, Any] = {operand: tensor}
    return replace(inputs, **changed)


def _column_major(tensor: Tensor) -> Tensor:
    """Neighbours along the row lie a column apart; a vector's elements lie two apart."""
    return _gaps(tensor) if tensor.dim() == 1 else tensor.t().contiguous().t()


def _gaps(tensor: Tensor) -> Tensor:
    """Every second element of a tensor twice as wide, whose others are NaN."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype, device=tensor.device)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def _padded_rows(tensor: Tensor) -> Tensor:
    """Rows with eight NaN behind each."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 8), torch.nan, dtype=tensor.dtype, device=tensor.device)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def _behind(tensor: Tensor, elements: int) -> Tensor:
    """So many elements into a storage."""
    long = torch.full((tensor.numel() + elements,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    long[elements:] = tensor.reshape(-1)
    return long[elements:].view(tensor.shape)


def expanded(given: Given, rank: int, operand: str) -> tuple[Given, RankInputs]:
    """One row (one lane of gamma) with stride zero stands for all."""
    if operand == "gamma":
        gamma = given.gamma[:1].expand(given.problem.hidden)
        same = replace(given, gamma=gamma.contiguous())
        return same, replace(same.of_rank(rank), gamma=gamma)
    if operand == "residual":
        residual = given.residual[:1].expand_as(given.residual)
        same = replace(given, residual=residual.contiguous())
        return same, replace(same.of_rank(rank), residual=residual)
    rows = [partial[:1].expand_as(partial) for partial in given.partials]
    same = replace(given, partials=tuple(partial.contiguous() for partial in rows))
    return same, replace(same.of_rank(rank), partial=rows[rank])


def aliased(given: Given, rank: int, operand: str) -> tuple[Given, RankInputs]:
    """The residual is the very tensor that holds the partial sums."""
    del operand
    same = replace(given, partials=(given.residual,) * given.problem.world_size)
    inputs = same.of_rank(rank)
    shared = inputs.residual.clone()
    return same, replace(inputs, partial=shared, residual=shared)


def _layout(view: Callable[[Tensor], Tensor]) -> Lay:
    return lambda given, rank, operand: _viewed(given, rank, operand, view)


LAYOUTS: dict[str, Lay] = {
    "column-major": _layout(_column_major),
    "gaps": _layout(_gaps),
    "padded-rows": _layout(_padded_rows),
    # Two bytes behind an aligned address, which 16-byte loads cannot read; and aligned, but not at a storage's start.
    "misaligned": _layout(lambda tensor: _behind(tensor, 1)),
    "offset": _layout(lambda tensor: _behind(tensor, 16)),
    "expanded": expanded,
    "aliased": aliased,
}
"""The layouts by name."""
