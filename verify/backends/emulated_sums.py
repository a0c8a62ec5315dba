"""How the emulated kernel adds up what a switch would: the exact sum with one rounding, and roundings toward zero.

Nothing here is shared with the oracle's sums, which judge it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SPREAD = 36
"""Binades over which the significands of up to 16 native numbers add up in float64 without an error."""


def add_truncated(a: Tensor, b: Tensor) -> Tensor:
    """A + b rounded toward zero, to the dtype of `a`: the nearest sum, one step back where it lies beyond."""
    nearest = (a.double() + b.double()).to(a.dtype)
    swapped = a.double().abs() < b.double().abs()
    large, small = torch.where(swapped, b, a).double(), torch.where(swapped, a, b).double()
    gained = nearest.double() - large
    beyond = torch.where(nearest < 0, gained < small, gained > small)
    return step_back(nearest, beyond)


def cut(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded toward zero."""
    nearest = exact.to(dtype)
    return step_back(nearest, nearest.double().abs() > exact.double().abs())


def step_back(x: Tensor, where: Tensor) -> Tensor:
    """The next number toward zero where asked for; an infinity that stands for a finite number becomes the largest."""
    bits = x.view(torch.int32 if x.dtype is torch.float32 else torch.int16)
    return (bits - where.to(bits.dtype)).view(x.dtype)


def sum_exactly(partials: Sequence[Tensor], *, truncates: bool) -> Tensor:
    """The exact sum of native numbers with one rounding, to float32."""
    stacked = torch.stack([partial.double() for partial in partials])
    total = stacked.sum(0)
    exponents, zero = torch.frexp(stacked)[1], stacked == 0
    spread = exponents.masked_fill(zero, -(1 << 20)).amax(0) - exponents.masked_fill(zero, 1 << 20).amin(0)
    wide = (spread > SPREAD) & total.isfinite()
    if bool(wide.any()):
        total[wide] = torch.tensor([_exact(addends) for addends in stacked[:, wide].T.tolist()], dtype=torch.float64)
    return cut(total, torch.float32) if truncates else total.float()


def _exact(addends: list[float]) -> float:
    """The correctly rounded sum, or its neighbour with an odd last bit on the side where the exact one lies."""
    total = math.fsum(addends)
    rest = math.fsum([*addends, -total])
    even = int(math.ldexp(math.frexp(total)[0], 53)) % 2 == 0
    return math.nextafter(total, math.copysign(math.inf, rest)) if rest and even else total
