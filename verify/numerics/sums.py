"""Sums over ranks, rounded as a dataflow declares: in rank order, or as a switch adds up (criterion, section 4.1).

A float64 sum that is rounded to odd keeps what a later rounding to fewer bits must know, whichever way that rounds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fusecheck.dataflow import Dataflow
from fusecheck.formats.binary import FP32, NATIVE, Format, round_to, trailing_unit, truncate_to
from fusecheck.numerics.nominal import flush


def sum_partials(partials: list[Tensor], flow: Dataflow, *, flushing: bool) -> Tensor:
    """The sum over ranks in rank order; native when it is rounded, else float32. Shapes [rows, hidden]."""
    if flow.accumulate == "exact" or flow.sum_rounding == "truncate":
        return _in_switch(partials, flow, flushing=flushing)
    native = partials[0].dtype
    if flushing:
        total = flush(partials[0].to(torch.float32))
        for partial in partials[1:]:
            total = flush(total + flush(partial.to(torch.float32)))
            total = total.to(native).to(torch.float32) if flow.accumulate == "native" else total
    else:
        first = partials[0] if flow.accumulate == "native" else partials[0].to(torch.float32)
        total = functools.reduce(torch.add, partials[1:], first)
    return total.to(native) if flow.round_sum or flow.accumulate == "native" else total


def _in_switch(partials: list[Tensor], flow: Dataflow, *, flushing: bool) -> Tensor:
    """The same where the sum is rounded once, or toward zero."""
    native = next(fmt for fmt in NATIVE.values() if fmt.dtype is partials[0].dtype)
    rounded: Callable[[Tensor, Format], Tensor] = truncate_to if flow.sum_rounding == "truncate" else round_to
    settle: Callable[[Tensor], Tensor] = flush if flushing else torch.clone
    grid = native if flow.accumulate == "native" else FP32
    addends = [settle(partial.to(torch.float64)) for partial in partials]
    if flow.accumulate == "exact":
        total = settle(rounded(sum_to_odd(addends), grid))
    else:
        total = functools.reduce(lambda a, b: settle(rounded(add_to_odd(a, b), grid)), addends)
    if flow.round_sum or flow.accumulate == "native":
        return rounded(total, native).to(native.dtype)
    return total.to(torch.float32)


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A + b in float64, and what it lacks of the exact sum (Knuth); NaN where that is not finite."""
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


def add_to_odd(a: Tensor, b: Tensor) -> Tensor:
    """A + b, rounded to the float64 with an odd last bit where it is inexact."""
    total, error = two_sum(a, b)
    even = (total.view(torch.int64) & 1) == 0
    beside = torch.nextafter(total, torch.copysign(torch.full_like(total, torch.inf), error))
    return torch.where(even & (error != 0) & total.isfinite(), beside, total)


def sum_to_odd(addends: Sequence[Tensor]) -> Tensor:
    """The exact sum of native values, rounded to odd as `add_to_odd` does; infinities and NaN as IEEE adds them."""
    total = functools.reduce(torch.add, addends)
    stacked = torch.stack(list(addends))
    fits = stacked.abs().sum(0) <= 2.0**53 * trailing_unit(stacked).amin(0)
    wide = (~fits & total.isfinite()).nonzero(as_tuple=True)
    if wide[0].numel():
        total = total.index_put(wide, _expanded([addend[wide] for addend in addends]))
    return total


def _expanded(addends: list[Tensor]) -> Tensor:
    """The same of sums that float64 does not hold, by an expansion without overlap (Shewchuk)."""
    parts: list[Tensor] = []
    for addend in addends:
        carried = addend
        for place, part in enumerate(parts):
            carried, parts[place] = two_sum(carried, part)
        parts.append(carried)
    return functools.reduce(lambda total, part: add_to_odd(part, total), parts)
