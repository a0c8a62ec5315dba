"""Comparing two runs of one Problem: bit for bit, and the differences of their codes."""

from __future__ import annotations

import torch
from torch import Tensor

from fusecheck.dataflow import Dataflow
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


def one_nan(output: Tensor) -> Tensor:
    """A tensor in which every NaN has the same bits, for which NaN it is, nobody promises; integers as they are."""
    if output.dtype is torch.float8_e4m3fn:
        bits = raw(output)
        return torch.where(E4M3.is_nan(bits), 0x7F, bits).view(output.dtype)
    return torch.where(output.isnan(), torch.nan, output) if output.is_floating_point() else output


def comparable(outputs: dict[str, Tensor], flow: Dataflow) -> dict[str, Tensor]:
    """The outputs as they are compared bit by bit with those of other ranks or calls."""
    if flow.nan_payload == "kept":
        return outputs
    return {name: one_nan(tensor) for name, tensor in outputs.items()}


def compare_bits(tally: Tally, what: str, first: Tensor, second: Tensor, *, payloads: bool = False) -> None:
    """Count the elements in which two outputs differ as outside.

    Args:
        tally: to add to.
        what: which output, and of which call the second one is.
        first: the output of the first call; it stands as admissible.
        second: the same of another call.
        payloads: two NaN differ where their bits do.
    """
    tally.elements += first.numel()
    where = differing(first, second)
    if where is not None and not payloads:
        where = differing(one_nan(first), one_nan(second))
    if where is None:
        return
    tally.off_nominal += len(where[0])
    tally.outside += len(where[0])
    row, column = int(where[0][0]), int(where[1][0])
    bits = [f"{int(raw(x)[row, column]) & 0xFFFF:#06x}" for x in (second, first)]
    tally.shown.append(Element(row, column, bits[0], bits[1], what))
