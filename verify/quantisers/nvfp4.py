"""NVFP4: E2M1 in groups of 16 with an E4M3 scale for each, and one float32 factor g for the tensor.

g multiplies (FlashInfer, TensorRT-LLM, vLLM): scale = E4M3(g * a / 6), code = E2M1(y * (g / scale)); or it divides
(torchao): scale = E4M3(a / 6 / g), code = E2M1(y / (g * scale)). Two codes a byte, the even element in the low half.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fusecheck.formats.element import E2M1, E4M3
from fusecheck.numerics.enclosure import QUOTIENT, TINY, Interval
from fusecheck.numerics.nominal import flush
from fusecheck.quantflow import QuantFlow
from fusecheck.quantisers.scaled import Factor, Scaled, as_float32, factor_of_scale, quotient_slack, reciprocal_ends


class Nvfp4(Scaled):
    """The scale and the factor of the codes are where it differs from the other quantisers (G8)."""

    def _store(self, quotient: Tensor, largest: Tensor, flow: QuantFlow, given: float) -> Tensor:
        factor = torch.tensor(given, dtype=torch.float32, device=quotient.device)
        quotient = flush(quotient) if flow.flush else quotient
        value = quotient / factor if flow.given == "divides" else quotient * factor
        value = (flush(value) if flow.flush else value).clamp(min=flow.least)
        return E4M3.encode_float32(value)

    def values(self, stored: Tensor, flow: QuantFlow) -> Tensor:
        """The numbers that stored scales stand for, float64, [..., groups]."""
        return E4M3.decode(stored)

    def admits(self, stored: Tensor, nominal: Tensor, ends: Interval, flow: QuantFlow) -> Tensor:
        """Which stored scales are admissible, bool; -0 is no scale."""
        nan = E4M3.is_nan(stored)
        return ((ends[0] <= stored) & (stored <= ends[1]) & ~nan) | (nan & E4M3.is_nan(nominal))

    def amax_ends(self, stored: Tensor, flow: QuantFlow, given: float = 1.0) -> Interval:
        """The amax that each stored scale leaves possible, float64: all that round to it, and 9u around."""
        edges = torch.tensor((0.0, *E4M3.midpoints[:-1], torch.inf), dtype=torch.float64, device=stored.device)
        place = stored.to(torch.int64).clamp(max=E4M3.largest_code)
        by = 6 * given if flow.given == "divides" else 6 / given
        low, high = edges[place] * by, edges[place + 1] * by
        low = torch.where(self.values(stored, flow) <= flow.least, 0.0, low)
        return (low * (1 - 2 * QUOTIENT) - TINY).clamp(min=0.0), high * (1 + 2 * QUOTIENT) + TINY

    def _factor(self, stored: Tensor, flow: QuantFlow, given: float, amax: Interval | None) -> Factor:
        scale = self.values(stored, flow)
        if flow.given == "divides":
            return factor_of_scale(as_float32(scale * given), flow)
        safe = torch.where(scale == 0, 1.0, scale)
        if flow.code_rule == "rcp":
            nominal, ends = _nested(safe, given, flow)
        else:
            nominal = as_float32(given / safe)
            slack = quotient_slack(safe, flow)
            ends = as_float32(given / safe * (1 - slack)), as_float32(given / safe * (1 + slack))
        nominal, low, high = (torch.where(scale == 0, 0.0, each) for each in (nominal, *ends))
        return Factor(nominal, (low, high))


def _nested(scale: Tensor, given: float, flow: QuantFlow) -> tuple[Tensor, Interval]:
    """rcp(scale * rcp(given)), nominal and ends."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = scale.new_tensor(float(np.float32(1) / np.float32(given)))
    ends = reciprocal_ends(inverse, scale.new_tensor(given), flow)
    high, nominal, low = (as_float32(1 / as_float32(scale * end)) for end in (ends[0], inverse, ends[1]))
    return nominal, (
        reciprocal_ends(low, as_float32(scale * ends[1]), flow)[0],
        reciprocal_ends(high, as_float32(scale * ends[0]), flow)[1],
    )


NVFP4 = Nvfp4("nvfp4", E2M1, 16, torch.uint8, ("128x4", "8x4", "linear"))
