"""Faults of the additions: over the ranks (A1, A2), of the residual (A3). Each overrides one hook of `Arithmetic`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusecheck.backends.emulated_arithmetic import E4M3_MAX, Arithmetic


class KeepsSumWide(Arithmetic):
    """KA-01: the sum goes to the residual addition in float32, without the rounding to native (A2)."""

    def round_sum(self, accumulator: Tensor, native: torch.dtype) -> Tensor:
        """Return the float32 sum as it is."""
        del native
        return accumulator


class AccumulatesNative(Arithmetic):
    """KA-02: every addition over the ranks is rounded to native, where float32 is declared."""

    def accumulate(self, partials: Sequence[Tensor]) -> Tensor:
        """Add in the partial sums' own dtype."""
        first, *others = (partials[rank] for rank in self.rank_order())
        accumulator = first.clone()
        for partial in others:
            accumulator = self.add_partial(accumulator, partial)
        return accumulator


class AccumulatesCodes(Arithmetic):
    """KA-25: the collective accumulates in E4M3."""

    def add_partial(self, accumulator: Tensor, partial: Tensor) -> Tensor:
        """Round every partial result to E4M3."""
        added = accumulator.float() + partial.float()
        return accumulator.copy_(added.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float())


class StartsAtOwnRank(Arithmetic):
    """KP-12: each rank adds the peers starting from itself, so that ranks round differently."""

    def rank_order(self) -> list[int]:
        """Begin at the own index."""
        return [(self.index + step) % self.world_size for step in range(self.world_size)]


class OrderByHistory(Arithmetic):
    """KP-13: the order of the additions depends on what the process has done before."""

    made = 0

    def rank_order(self) -> list[int]:
        """Rotate by the number of sums so far, which is equal on all ranks."""
        type(self).made += 1
        return [(type(self).made + step) % self.world_size for step in range(self.world_size)]


class TacticByCoin(Arithmetic):
    """AC-01: a tuner picks, call by call, between tactics whose accumulation differs in precision."""

    picked = 0

    def accumulate(self, partials: Sequence[Tensor]) -> Tensor:
        """Take the other precision in one call of two; a seeded coin, equal on all ranks."""
        type(self).picked += 1
        if (type(self).picked * 0x9E3779B1 >> 16) & 1:
            return super().accumulate(partials)
        total = partials[0].clone()
        for partial in partials[1:]:
            total = self.add_partial(total, partial)
        return total


class RareCorruption(Arithmetic):
    """AC-07: a few calls in a thousand return one wrong row, without an error."""

    calls = 0

    def total(self, partials: Sequence[Tensor]) -> Tensor:
        """Lose rank 0's partial sum in the first row of one block in thirty."""
        total = super().total(partials)
        type(self).calls += 1
        if type(self).calls % 30 == 0:
            total[0] = total[0] - partials[0][0].to(total.dtype)
        return total
