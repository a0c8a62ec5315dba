"""Stage `quant`: E4M3 codes by a given scale, from the norm as observed or enclosed."""

from __future__ import annotations

import torch
from torch import Tensor

from fusecheck.dataflow import Dataflow
from fusecheck.formats.element import E4M3
from fusecheck.numerics import enclosure, nominal
from fusecheck.numerics.enclosure import Interval
from fusecheck.quantflow import Reads
from fusecheck.stages.judgement import Element, Stage, raw
from fusecheck.stages.norm import Norm
from fusecheck.stages.operands import Operands, Where

TABLE_PAYS = 2**16
"""Elements from which looking codes up in a table of all native values is cheaper than forming each."""


class Code:
    """The codes of some rows.

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

    def told(self, row: int, column: int, got: Tensor, nominal: Tensor, ends: tuple[Tensor, Tensor]) -> Element:
        """A code outside its enclosure, with the quotient that it should be of."""
        wanted = f"{describe_ordinal(int(ends[0]))}..{describe_ordinal(int(ends[1]))}"
        if E4M3.is_nan(raw(nominal)):
            wanted = "0x7f (nan)"
        where = (torch.tensor([row], device=got.device), torch.tensor([column], device=got.device))
        low, high = self.quotient_ends(where)
        context = f"y/scale in [{float(low):.6g}, {float(high):.6g}]  {self.operands.at(row, column)}"
        return Element(row, column, describe_code(int(raw(got))), wanted, context)


def admits_codes(got: Tensor, nominal: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Which observed codes are inside; NaN of either sign only where a NaN code is admissible."""
    place = E4M3.ordinal(got)
    inside = (lo <= place) & (place <= hi) & ~E4M3.is_nan(got)
    may_be_nan = E4M3.is_nan(nominal) | (hi == 127) | (lo == -127)
    return inside | (E4M3.is_nan(got) & may_be_nan)


def describe_code(code: int) -> str:
    """A code with its value."""
    return f"{code:#04x} ({E4M3.values[code]:g})"


def describe_ordinal(index: int) -> str:
    """The code at an ordinal; NaN beyond +-126."""
    return "nan" if abs(index) > 126 else f"{E4M3.code_at(index):#04x}"
