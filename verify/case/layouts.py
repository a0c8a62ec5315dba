"""Layouts of an operand: the same values with gaps between them, each looked at after the call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusecheck.case.alive import Arena
from fusecheck.interface import RankInputs
from fusecheck.problem import Problem

OPERANDS = ("partial", "residual", "gamma")

LIMIT = 2**15
"""tokens * hidden up to which one case meets all layouts; a larger one meets one of them."""

GAP = 8
"""Elements of a gap; keeps the alignment of what lies behind it."""


@dataclass(frozen=True)
class Laid:
    """A view, the whole of the memory that it is a view of, and what that held before the call."""

    view: Tensor
    whole: Tensor
    before: Tensor

    def changed(self, *, values: bool) -> bool:
        """Whether the call wrote into the gaps, or with `values` anywhere."""
        before = self.before.clone()
        if not values:
            offset = self.view.storage_offset() - self.whole.storage_offset()
            before.as_strided(self.view.shape, self.view.stride(), offset).copy_(self.view)
        return not torch.equal(self.whole.view(torch.int16), before.view(torch.int16))


def _padded(arena: Arena, source: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Rows with a gap before and behind each."""
    whole = arena.empty((*source.shape[:-1], source.shape[-1] + 2 * GAP), source.dtype, name)
    return whole, whole[..., GAP:-GAP]


def _every_second(arena: Arena, source: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Columns two apart."""
    whole = arena.empty((*source.shape[:-1], 2 * source.shape[-1]), source.dtype, name)
    return whole, whole[..., ::2]


def _offset(arena: Arena, source: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Behind a gap in a longer storage, aligned."""
    whole = arena.empty((source.numel() + 2 * GAP,), source.dtype, name)
    return whole, whole[GAP:-GAP].view(source.shape)


def _misaligned(arena: Arena, source: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Two bytes behind an aligned address."""
    whole = arena.empty((source.numel() + GAP,), source.dtype, name)
    return whole, whole[1 : 1 + source.numel()].view(source.shape)


LAYOUTS: dict[str, Callable[[Arena, Tensor, str], tuple[Tensor, Tensor]]] = {
    "padded rows": _padded,
    "every second column": _every_second,
    "offset": _offset,
    "misaligned": _misaligned,
}
"""The layouts by name; each makes memory full of poison, and the view in it."""

ALL = tuple((layout, operand) for layout in LAYOUTS for operand in OPERANDS)


def layouts_of(problem: Problem) -> tuple[tuple[str, str], ...]:
    """The layouts that a case meets, each of one operand: all, or one that follows from its seed where it is large."""
    return ALL if problem.elements <= LIMIT else (ALL[problem.seed % len(ALL)],)


def lay(arena: Arena, inputs: RankInputs, layout: str, operand: str) -> tuple[RankInputs, Laid]:
    """The inputs, each between canaries, with one operand as a view."""
    source: Tensor = getattr(inputs, operand)
    whole, view = LAYOUTS[layout](arena, source, operand)
    view.copy_(source)
    given: dict[str, Any] = {operand: view}
    return replace(arena.guard(inputs), **given), Laid(view, whole, whole.clone())
