"""Comparing two runs of one Problem: bit for bit, and the differences of their codes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fusecheck.dataflow import Dataflow
from fusecheck.formats.element import E4M3
from fusecheck.interface import RankOutputs
from fusecheck.verdict import Element, Tally, differing, raw

COPIED = 2**26
"""Bytes of each side that are compared at a time."""


def code_differences(
    fused: RankOutputs, unfused: RankOutputs, rows: range, tally: Tally, *, within_one: bool
) -> dict[str, int]:
    """Histogram of |code distance| between the two paths.

    Where a whole row of residual_out is equal and finite on both paths, two recipes that sum squares in float32 are
    within one code, so with `within_one` two or more is counted as outside. A norm that reads the sum before it is
    rounded may see a number where the other reads an infinity.
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
    same = (raw(fused.residual[part]) == raw(unfused.residual[part])) & fused.residual[part].isfinite()
    same_row = same.all(-1, keepdim=True)
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


def compare_each(tally: Tally, pairs: Sequence[tuple[str, Tensor, Tensor]], *, payloads: bool, at_once: bool) -> None:
    """`compare_bits` of every pair: what it is, an output of the first call, the same of another.

    With `at_once` the pairs are looked at one by one only where one look at all shows a difference, for on a GPU each
    look waits for the device; in host memory single ones are quicker.
    """
    if at_once and same_bits([(first, second) for _, first, second in pairs]):
        tally.elements += sum(first.numel() for _, first, _ in pairs)
        return
    for what, first, second in pairs:
        compare_bits(tally, what, first, second, payloads=payloads)


def same_bits(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether the tensors of every pair have the same shape, dtype and bits; the device is waited for once."""
    if any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in pairs):
        return False
    flags = [(_joined(a for a, _ in part) != _joined(b for _, b in part)).any() for part in _parts(pairs)]
    return not flags or not bool(flags[0] if len(flags) == 1 else torch.stack(flags).any())


def _parts(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The pairs in groups, as many as are copied at a time."""
    part: list[tuple[Tensor, Tensor]] = []
    held = 0
    for pair in pairs:
        if part and held + pair[0].nbytes > COPIED:
            yield part
            part, held = [], 0
        part.append(pair)
        held += pair[0].nbytes
    if part:
        yield part


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    """The bytes of tensors one behind the other; several may be the same one."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    parts = []
    for tensor in tensors:
        if id(tensor) not in kept:
            flat = tensor.dtype is torch.uint8 and tensor.dim() == 1
            kept[id(tensor)] = tensor, tensor if flat else tensor.contiguous().view(torch.uint8).view(-1)
        parts.append(kept[id(tensor)][1])
    return torch.cat(parts) if len(parts) > 1 else parts[0]


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
