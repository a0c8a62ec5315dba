"""Comparing two runs of one Problem: bit for bit, and the differences of their codes."""

from __future__ import annotations

import torch
from torch import Tensor

from fusecheck.formats.element import E4M3
from fusecheck.interface import RankOutputs
from fusecheck.verdict import Element, Tally, differing, raw


def code_differences(
    fused: RankOutputs, unfused: RankOutputs, rows: range, tally: Tally, *, within_one: bool
) -> dict[str, int]:
    """Histogram of |code distance| between the two paths.

    Where a whole row of residual_out is equal on both paths, two recipes that sum squares in float32 are within one
    code, so with `within_one` two or more is counted as outside.
    """
    if fused.quant is None or unfused.quant is None or not rows:
        return {}
    part = slice(rows.start, rows.stop)
    ours, theirs = (raw(x.quant[part]) for x in (fused, unfused) if x.quant is not None)
    if torch.equal(ours, theirs):
        return {"0": ours.numel()}
    distance = (E4M3.ordinal(ours) - E4M3.ordinal(theirs)).abs()
    if not within_one:
        return _histogram(distance)
    same_row = (raw(fused.residual[part]) == raw(unfused.residual[part])).all(-1, keepdim=True)
    numbers = ~(E4M3.is_nan(ours) | E4M3.is_nan(theirs))
    tally.outside += int(((distance > 1) & same_row & numbers).sum())
    return _histogram(distance)


def _histogram(distance: Tensor) -> dict[str, int]:
    values, counts = torch.unique(distance, return_counts=True)
    return {str(int(v)): int(c) for v, c in zip(values, counts, strict=True)}


def compare_bits(tally: Tally, name: str, first: Tensor, second: Tensor) -> None:
    """Count the elements in which two outputs differ in bits as outside."""
    tally.elements += first.numel()
    where = differing(first, second)
    if where is None:
        return
    tally.off_nominal += len(where[0])
    tally.outside += len(where[0])
    row, column = int(where[0][0]), int(where[1][0])
    bits = [f"{int(raw(x)[row, column]) & 0xFFFF:#06x}" for x in (second, first)]
    tally.shown.append(Element(row, column, bits[0], bits[1], f"{name} of a second run"))
