"""E4M3 by a scale that the caller gives, one for the whole tensor: calibrated ahead."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fusecheck.formats.element import E4M3
from fusecheck.numerics.enclosure import Interval
from fusecheck.numerics.nominal import LEAST_NORMAL, look_up
from fusecheck.quantflow import QuantFlow
from fusecheck.quantisers.scaled import TABLE_PAYS, Scaled


@dataclass(frozen=True)
class StaticFp8(Scaled):
    """The given scale is the stored one, [1]: it is no output, and nothing about it is judged."""

    def scales(self, norm: Tensor, flow: QuantFlow, given: float = 1.0, peaks: Tensor | None = None) -> Tensor:
        """The given scale, [1], float32."""
        return torch.tensor([given], dtype=torch.float32, device=norm.device)

    def scale_ends(self, norm: Interval, flow: QuantFlow, given: float = 1.0) -> Interval:
        """The given scale, twice."""
        return (self.scales(norm[0], flow, given),) * 2

    def amax_ends(self, stored: Tensor, flow: QuantFlow, given: float = 1.0) -> Interval:
        """A given scale says nothing of the amax."""
        none = torch.zeros_like(stored, dtype=torch.float64)
        return none, torch.full_like(none, torch.inf)

    def _operand(self, norm: Tensor, flow: QuantFlow) -> Tensor:
        """The norm as it is: a dataflow that flushes says so of its additions and of the scale's reciprocal alone."""
        return norm

    def quotient_ends(
        self, norm: Interval, stored: Tensor, flow: QuantFlow, given: float = 1.0, amax: Interval | None = None
    ) -> Interval:
        """What a subnormal norm may become includes zero, where a kernel that flushes might flush it, too."""
        lo, hi = super().quotient_ends(norm, stored, flow, given, amax)
        if not flow.flush:
            return lo, hi
        flushed = (norm[0] < LEAST_NORMAL) & (norm[1] > -LEAST_NORMAL)
        return torch.where(flushed, lo.clamp(max=0.0), lo), torch.where(flushed, hi.clamp(min=0.0), hi)

    def codes(self, norm: Tensor, stored: Tensor, flow: QuantFlow, given: float = 1.0) -> Tensor:
        """The nominal codes; of many 16-bit numbers by a table of all of them."""
        if norm.element_size() != 2 or norm.numel() < TABLE_PAYS:
            return super().codes(norm, stored, flow, given)
        return look_up(_table(self, float(stored.flatten()[0]), flow, norm.dtype, norm.device), norm)


@lru_cache(maxsize=32)
def _table(quantiser: StaticFp8, scale: float, flow: QuantFlow, native: torch.dtype, device: torch.device) -> Tensor:
    """The code of every native value, [65536] uint8, indexed by the value's 16 bits."""
    bits = torch.arange(65536, dtype=torch.int32, device=device).to(torch.int16)
    stored = torch.tensor([scale], dtype=torch.float32, device=device)
    return Scaled.codes(quantiser, bits.view(native), stored, flow)


STATIC_FP8 = StaticFp8("static-fp8", E4M3, None, torch.float32, ("linear",))
