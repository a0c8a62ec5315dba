"""Judging activations: which values are inside, and the words for one that is not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusecheck.dataflow import Dataflow
from fusecheck.formats.binary import Format
from fusecheck.stages.judgement import Element
from fusecheck.stages.operands import Operands


def admits(got: Tensor, nominal: Tensor, lo: Tensor, hi: Tensor, flow: Dataflow) -> Tensor:
    """Which observed values are inside: NaN only where the nominal is, or infinities of both signs may have met.

    Both zeros are, unless their sign is kept.
    """
    value = got.to(torch.float64)
    inside = (lo <= value) & (value <= hi)
    if flow.zero_sign == "kept":
        zero = (value == 0) & (nominal == 0)
        inside &= ~zero | (torch.signbit(got) == torch.signbit(nominal))
    return inside | (value.isnan() & (nominal.isnan() | ((lo == -torch.inf) & (hi == torch.inf))))


def describe(value: float, fmt: Format) -> str:
    """A native value with its bits."""
    bits = torch.tensor(value, dtype=torch.float64).to(fmt.dtype).view(torch.int16)
    return f"0x{int(bits) & 0xFFFF:04x} ({value:.6g})"


def told(
    operands: Operands, place: tuple[int, int], got: Tensor, nominal: Tensor, ends: tuple[Tensor, Tensor]
) -> Element:
    """An activation outside its enclosure."""
    fmt, low, high = operands.format, float(ends[0]), float(ends[1])
    wanted = describe(float(nominal), fmt) if math.isnan(low + high) else f"{describe(low, fmt)}..{describe(high, fmt)}"
    return Element(*place, describe(float(got), fmt), wanted, operands.at(*place))
