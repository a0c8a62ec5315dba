"""Stages `quant` and `code`: the codes, from the norm as observed or enclosed, and from the scales as stored.

`quant` is that of a scale that the caller gives, `code` that of scales which the kernel made. A code that fits a wrong
scale is not blamed: the scale's own stage is (the pair contract, G2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusecheck.formats.element import E4M3, Element
from fusecheck.numerics.enclosure import Interval
from fusecheck.stages.judgement import Element as Shown
from fusecheck.stages.judgement import Stage, raw
from fusecheck.stages.operands import Operands, Where
from fusecheck.stages.scale import Scale


class Code:
    """The codes of some rows, by scales that the kernel stored or by the one that the caller gave.

    Args:
        operands: of exactly these rows.
        scales: the stage of the scales, which knows quantiser and norm.
        stored: the scales as stored, [rows, groups]; None: the given one.
    """

    def __init__(self, operands: Operands, scales: Scale, stored: Tensor | None) -> None:
        self.operands, self._scales = operands, scales
        self.stage = Stage.QUANT if stored is None else Stage.CODE
        self._given = stored is None
        self._stored = _one_for_all(operands) if stored is None else stored

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

    def quotient_ends(self, where: Where) -> Interval:
        """Enclosure of what the cast reads at some elements, [n] each."""
        norm, stored, amax = self._arguments(where)
        lo, hi = self._scales.quantiser.quotient_ends(norm, stored, self._scales.rules, self.operands.scale, amax)
        return lo[:, 0], hi[:, 0]

    def ends(self, where: Where) -> Interval:
        """Ordinals of the least and greatest admissible code at some elements, [n] each, int16."""
        norm, stored, amax = self._arguments(where)
        lo, hi = self._scales.quantiser.code_ends(norm, stored, self._scales.rules, self.operands.scale, amax)
        return lo[:, 0], hi[:, 0]

    def admits(self, got: Tensor, nominal: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """See `admits_codes`."""
        return admits_codes(raw(got), raw(nominal), lo, hi, self._scales.quantiser.element)

    def told(self, row: int, column: int, got: Tensor, nominal: Tensor, ends: tuple[Tensor, Tensor]) -> Shown:
        """A code outside its enclosure, with the quotient that it should be of, and the scale beside it."""
        low, high = self.quotient_ends(_one(row, column, got.device))
        context = f"y/scale in [{float(low):.6g}, {float(high):.6g}]  "
        if not self._given:
            context += f"scale {self._scales.word(self._stored[row, column // self._scales.size])}  "
        context += self.operands.at(row, column)
        return _told(self._scales.quantiser.element, (row, column), int(raw(got)), int(raw(nominal)), ends, context)


def _one_for_all(operands: Operands) -> Tensor:
    """The given scale beside every row, [rows, 1], float32."""
    given = torch.tensor([operands.scale], dtype=torch.float32, device=operands.residual.device)
    return given.expand(len(operands.residual), 1)


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
