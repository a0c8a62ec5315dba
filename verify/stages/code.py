"""Stages `quant` and `code`: the codes, from the norm as observed or enclosed, and from the scales as stored.

`quant` is that of a scale that the caller gives, `code` that of scales which the kernel made. A code that fits a wrong
scale is not blamed: the scale's own stage is (the pair contract, G2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusecheck.dataflow import Dataflow
from fusecheck.formats.element import E4M3, Element
from fusecheck.numerics import enclosure, nominal
from fusecheck.numerics.enclosure import Interval
from fusecheck.quantflow import Reads
from fusecheck.stages.judgement import Element as Shown
from fusecheck.stages.judgement import Stage, raw
from fusecheck.stages.norm import Norm
from fusecheck.stages.operands import Operands, Where
from fusecheck.stages.scale import Scale

TABLE_PAYS = 2**16
"""Elements from which looking codes up in a table of all native values is cheaper than forming each."""


class StaticCode:
    """E4M3 codes of some rows by a given scale.

    Args:
        flow: the declared arithmetic.
        operands: of exactly these rows.
        before: the stage of the norm.
        norm_out: what the kernel returned there, [rows, hidden], native, if it did.
    """

    stage = Stage.QUANT

    def __init__(self, flow: Dataflow, operands: Operands, before: Norm, norm_out: Tensor | None) -> None:
        self.flow, self.operands, self._before, self._observed = flow, operands, before, norm_out
        self._reads: Reads = "rounded" if flow.round_norm else "unrounded"

    def nominal(self) -> Tensor:
        """The nominal codes, [rows, hidden], uint8; from the observed norm if it is given and is what is read."""
        y, scale = self._before.read(self._observed, self._reads), self.operands.scale
        if y.dtype is torch.float32 or y.numel() < TABLE_PAYS:
            return nominal.codes_of_float32(y.to(torch.float32), scale, self.flow)
        return nominal.look_up(nominal.code_table(scale, self.flow, self.operands.format, y.device), y)

    def quotient_ends(self, where: Where) -> Interval:
        """Enclosure of y / scale at some elements, [n] each."""
        lo, hi = self._before.read_ends(self._observed, where, self._reads)
        scale = self.operands.scale
        return enclosure.quotient_ends(lo, hi, scale, nominal.reciprocal(scale, self.flow), self.flow)

    def ends(self, where: Where) -> tuple[Tensor, Tensor]:
        """Ordinals of the least and greatest admissible code at some elements, [n] each, int16."""
        return enclosure.code_ends(*self.quotient_ends(where), self.flow)

    def admits(self, got: Tensor, nominal: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """See `admits_codes`."""
        return admits_codes(raw(got), raw(nominal), lo, hi)

    def told(self, row: int, column: int, got: Tensor, nominal: Tensor, ends: tuple[Tensor, Tensor]) -> Shown:
        """A code outside its enclosure, with the quotient that it should be of."""
        low, high = self.quotient_ends(_one(row, column, got.device))
        context = f"y/scale in [{float(low):.6g}, {float(high):.6g}]  {self.operands.at(row, column)}"
        return _told(E4M3, (row, column), int(raw(got)), int(raw(nominal)), ends, context)


class Code:
    """The codes of some rows by scales that the kernel stored.

    Args:
        operands: of exactly these rows.
        scales: the stage of the scales, which knows quantiser and norm.
        stored: the scales as stored, [rows, groups].
    """

    stage = Stage.CODE

    def __init__(self, operands: Operands, scales: Scale, stored: Tensor) -> None:
        self.operands, self._scales, self._stored = operands, scales, stored

    def nominal(self) -> Tensor:
        """The nominal codes, [rows, hidden], uint8, one a byte."""
        of = self._scales
        return of.quantiser.codes(of.read(), self._stored, of.rules, self.operands.scale)

    def _arguments(self, where: Where) -> tuple[Interval, Tensor, Interval | None]:
        """Ends of the norm, [n, 1] each, the scale beside it, [n, 1], and ends of its group's amax where it matters."""
        group = where[1] // self._scales.size
        lo, hi = self._scales.element_ends(where, self._stored)
        amax = self._scales.amax_ends((where[0], group)) if self._scales.rules.codes_from == "amax" else None
        return (lo[:, None], hi[:, None]), self._stored[where[0], group][:, None], amax

    def ends(self, where: Where) -> Interval:
        """Ordinals of the least and greatest admissible code at some elements, [n] each, int16."""
        norm, stored, amax = self._arguments(where)
        lo, hi = self._scales.quantiser.code_ends(norm, stored, self._scales.rules, self.operands.scale, amax)
        return lo[:, 0], hi[:, 0]

    def admits(self, got: Tensor, nominal: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """See `admits_codes`."""
        return admits_codes(raw(got), nominal, lo, hi, self._scales.quantiser.element)

    def told(self, row: int, column: int, got: Tensor, nominal: Tensor, ends: tuple[Tensor, Tensor]) -> Shown:
        """A code outside its enclosure, with the quotient that it should be of, and the scale beside it."""
        where = _one(row, column, got.device)
        norm, stored, amax = self._arguments(where)
        low, high = self._scales.quantiser.quotient_ends(norm, stored, self._scales.rules, self.operands.scale, amax)
        context = f"y/scale in [{float(low):.6g}, {float(high):.6g}]  scale {self._scales.word(stored[0, 0])}  "
        context += self.operands.at(row, column)
        return _told(self._scales.quantiser.element, (row, column), int(raw(got)), int(raw(nominal)), ends, context)


def _one(row: int, column: int, device: torch.device) -> Where:
    return torch.tensor([row], device=device), torch.tensor([column], device=device)


def admits_codes(got: Tensor, nominal: Tensor, lo: Tensor, hi: Tensor, element: Element = E4M3) -> Tensor:
    """Which observed codes are inside; NaN of either sign only where a NaN code is admissible."""
    place, nan = element.ordinal(got), element.is_nan(got)
    inside = (lo <= place) & (place <= hi) & ~nan
    most = element.largest_code
    return inside | (nan & (element.is_nan(nominal) | (hi > most) | (lo < -most)))


def _told(
    element: Element, place: tuple[int, int], got: int, nominal: int, ends: tuple[Tensor, Tensor], context: str
) -> Shown:
    wanted = f"{_at(element, int(ends[0]))}..{_at(element, int(ends[1]))}"
    if bool(element.is_nan(torch.tensor(nominal))):
        wanted = f"{nominal:#04x} (nan)"
    return Shown(*place, f"{got:#04x} ({element.values[got]:g})", wanted, context)


def _at(element: Element, index: int) -> str:
    """The code at an ordinal; NaN beyond the largest."""
    return "nan" if abs(index) > element.largest_code else f"{element.code_at(index):#04x}"
