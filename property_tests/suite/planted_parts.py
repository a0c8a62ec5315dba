"""Parts of the emulator with a fault each, for `planted_reach`: arithmetic, barriers, rotating buffers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from fusecheck.backends.emulated_arithmetic import Arithmetic
from fusecheck.backends.emulated_protocol import FLAG, SENTINEL, THIRDS, Lamport, Total, TwoShot


class HalfARow(Arithmetic):
    """Beyond 8,192 columns the squares of the second block are left out."""

    def mean_square(self, read: Tensor, native: torch.dtype) -> Tensor:
        if read.shape[1] <= 8192:
            return super().mean_square(read, native)
        return read[:, :8192].square().sum(-1, keepdim=True) / read.shape[1]


class FlagOfBits(TwoShot):
    """The barrier's flag has so many bits: where it comes round to zero, what was there from the start counts."""

    BITS: ClassVar[int] = 6

    def arrived(self, epoch: int) -> bool:
        return epoch % 2**self.BITS == 0 or super().arrived(epoch)


class FlagOf7Bits(FlagOfBits):
    BITS = 7


class FlagOf8Bits(FlagOfBits):
    BITS = 8


class ThirdOf8Bits(Lamport):
    """The counter of rotating buffers has eight bits: after 256 calls the same third is taken twice."""

    def third(self) -> int:
        return int(self.words[FLAG]) % 256 % THIRDS

    def clear_previous(self, elements: int) -> None:
        start = (self.third() + THIRDS - 1) % THIRDS * self.capacity
        self.bits[self.index][start : start + self.clear_size(elements)].fill_(SENTINEL)


class SharedSums(TwoShot):
    """All workspaces of a process read the sums of the last call from one static buffer."""

    STATIC: ClassVar[dict[str, Tensor]] = {}
    latest: ClassVar[int] = 0

    def sums(self, partial: Tensor, total: Total, sum_dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        cls = type(self)
        moved = cls.latest not in (0, id(self))
        cls.latest = id(self)
        for rows, summed in super().sums(partial, total, sum_dtype):
            first = cls.STATIC.get("sums")
            stale = moved and first is not None and first.shape[1:] == summed.shape[1:] and first.dtype == summed.dtype
            cls.STATIC["sums"] = summed.clone()
            yield rows, first[:1].expand_as(summed).clone() if stale and first is not None else summed
