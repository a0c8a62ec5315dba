"""The buffers of one call carved from one block, so that canaries cost one fill and one look."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fusecheck.case.alive import CANARY, MARGIN, POISONS, Arena, canary
from fusecheck.problem import Problem

_BUFFERS = 7
"""Partial, residual, gamma, scale; residual_out, norm_out, quant_out."""


class FlatArena(Arena):
    """An arena whose buffers lie in one block; what does not fit gets a block of its own.

    Args:
        problem: the call, which says how much is needed.
        device: where.
    """

    def __init__(self, problem: Problem, device: torch.device) -> None:
        super().__init__(device)
        capacity = 9 * problem.elements + 2 * problem.hidden + 4 + (_BUFFERS + 1) * 2 * MARGIN
        self._flat = torch.full((capacity,), CANARY, dtype=torch.uint8, device=device)
        self._gaps: list[tuple[int, int]] = []
        self._names: list[str] = []
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
        """A poisoned tensor between canaries."""
        tensor = self._carve(shape, dtype, name)
        if tensor is None:
            return super().empty(shape, dtype, name)
        bits = tensor.view(torch.uint8 if dtype.itemsize == 1 else torch.int16)
        bits.fill_(POISONS[0][dtype.itemsize])
        return tensor

    def copy(self, source: Tensor, name: str) -> Tensor:
        """A copy of a tensor between canaries."""
        tensor = self._carve(tuple(source.shape), source.dtype, name)
        return super().copy(source, name) if tensor is None else tensor.copy_(source)

    def canary(self) -> Tensor:
        """The bytes before the first buffer."""
        return self._flat[: self._gaps[0][1]]

    def canaries_lost(self) -> Tensor:
        """How many bytes between the buffers were written, as a tensor on the device."""
        return (self._flat[_index(tuple(self._all_gaps()), self.device)] != CANARY).sum()

    def margins(self) -> list[tuple[Tensor, Tensor]]:
        """The memory around the buffers, and what must be there."""
        whole = canary(self.device)
        return [
            *super().margins(),
            *((self._flat[start:stop], whole[: stop - start]) for start, stop in self._all_gaps()),
        ]

    def _all_gaps(self) -> list[tuple[int, int]]:
        return [*self._gaps, (self._used, min(self._used + MARGIN, len(self._flat)))]

    def trampled(self) -> str | None:
        """The name of a buffer with a write beyond its end or before its start; None when all are intact."""
        for number, (start, stop) in enumerate(self._all_gaps()):
            if bool((self._flat[start:stop] != CANARY).any()):
                return self._names[min(number, len(self._names) - 1)]
        return super().trampled()

    def _carve(self, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor | None:
        nbytes = dtype.itemsize * int(torch.Size(shape).numel())
        start = -(-(self._used + MARGIN) // MARGIN) * MARGIN
        if not nbytes or start + nbytes + MARGIN > len(self._flat):
            return None
        self._gaps.append((self._used, start))
        self._names.append(name)
        self._used = start + nbytes
        return self._flat[start : start + nbytes].view(dtype).view(shape)


@lru_cache(maxsize=256)
def _index(gaps: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in gaps])
