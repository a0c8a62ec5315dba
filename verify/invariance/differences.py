"""By how much two outputs of one row differ: numbers in units in the last place, codes in codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusecheck.formats.element import E4M3
from fusecheck.verdict import raw


def apart(first: Tensor, second: Tensor) -> dict[str, Any]:
    """How many elements differ, and the largest difference; JSON-ready.

    Args:
        first: an output of some rows, any dtype.
        second: the same of another call.

    Returns:
        `elements` that differ, `of` how many, `most` and its `unit` (`ulp`, or `codes`); `most` is None where a NaN
        takes the place of a number.
    """
    steps = (_ordinals(first) - _ordinals(second)).abs()
    nan = _nan(first) != _nan(second)
    unit = "ulp" if first.is_floating_point() and first.dtype is not torch.float8_e4m3fn else "codes"
    most = None if bool(nan.any()) else int(steps.max())
    return {"elements": int((steps > 0).sum()), "of": first.numel(), "most": most, "unit": unit}


def _ordinals(tensor: Tensor) -> Tensor:
    """Whole numbers that neighbouring values differ by one in, and the two zeros too."""
    if not tensor.is_floating_point():
        return tensor.to(torch.int64)
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}
    bits = tensor.contiguous().view(integers[tensor.element_size()]).to(torch.int64)
    lowest = -(1 << (8 * tensor.element_size() - 1))
    return torch.where(bits < 0, lowest - bits - 1, bits)


def _nan(tensor: Tensor) -> Tensor:
    if tensor.dtype is torch.float8_e4m3fn:
        return E4M3.is_nan(raw(tensor))
    return tensor.isnan() if tensor.is_floating_point() else torch.zeros_like(tensor, dtype=torch.bool)
