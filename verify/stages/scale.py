"""Stage `scale`: the scales of the codes, from the norm as observed or enclosed (G1, G3, G7, G8)."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fusecheck.formats.element import E4M3
from fusecheck.numerics.enclosure import Interval
from fusecheck.quantflow import QuantFlow
from fusecheck.quantisers import scales
from fusecheck.quantisers.quantiser import Quantiser
from fusecheck.stages.judgement import Element, Stage
from fusecheck.stages.norm import Norm
from fusecheck.stages.operands import Operands, Where


class Scale:
    """The scales of some rows, [rows, groups].

    Args:
        operands: of exactly these rows.
        quantiser: the format.
        rules: its declared arithmetic.
        before: the stage of the norm.
        norm_out: what the kernel returned there, [rows, hidden], native, if it did.
    """

    stage = Stage.SCALE

    def __init__(
        self, operands: Operands, quantiser: Quantiser, rules: QuantFlow, before: Norm, norm_out: Tensor | None
    ) -> None:
        self.operands, self.quantiser, self.rules = operands, quantiser, rules
        self._before, self._observed = before, norm_out
        self.size = operands.hidden // quantiser.groups(operands.hidden)

    def read(self) -> Tensor:
        """What the quantiser nominally reads, [rows, hidden]."""
        return self._before.read(self._observed, self.rules.reads)

    def element_ends(self, where: Where, stored: Tensor | None = None) -> Interval:
        """Enclosure of what the quantiser reads at some elements, of the shape of their indices.

        Where that is the unrounded norm, the `stored` scales of whole rows, [rows, 1], bound the root of each (G6).
        """
        known = None
        if stored is not None and stored.shape[1] == 1:
            known = self.quantiser.amax_ends(stored, self.rules, self.operands.scale)
        return self._before.read_ends(self._observed, where, self.rules.reads, known)

    def group_ends(self, where: Where) -> Interval:
        """The same for all elements of some groups, [n, size] each; `where` is of [rows, groups]."""
        lanes = torch.arange(self.size, device=where[1].device)
        columns = where[1][:, None] * self.size + lanes
        return self.element_ends((where[0][:, None].expand_as(columns), columns))

    def amax_ends(self, where: Where) -> Interval:
        """Enclosure of the largest magnitude of some groups, [n, 1] each."""
        if self._observed is None or self.rules.reads != "rounded" or self.rules.amax_nan == "order":
            return scales.amax_ends(self.group_ends(where), 1, self.rules)
        grouped = scales.in_groups(self._observed, self.operands.hidden // self.size)
        largest = scales.amax(grouped[where], 1, self.rules).to(torch.float64)  # a number: the maximum has no order
        return largest, largest

    @cached_property
    def _peaks(self) -> Tensor:
        return scales.peaks(self.read(), self.operands.hidden // self.size)

    @cached_property
    def special(self) -> Tensor:
        """Which groups hold a NaN or an infinity, or nothing but zeros, [rows, groups], bool."""
        return ~self._peaks.isfinite() | (self._peaks == 0)

    def nominal(self) -> Tensor:
        """The nominal scales, [rows, groups], float32 or bytes."""
        return self.quantiser.scales(self.read(), self.rules, self.operands.scale, self._peaks)

    def ends(self, where: Where) -> Interval:
        """The least and greatest admissible scale of some groups, [n] each."""
        lo, hi = self.quantiser.scale_ends_of(self.amax_ends(where), self.rules, self.operands.scale)
        return lo[:, 0], hi[:, 0]

    def admits(self, got: Tensor, nominal: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """Which stored scales are inside."""
        return self.quantiser.admits(got, nominal, (lo, hi), self.rules)

    def told(self, row: int, column: int, got: Tensor, nominal: Tensor, ends: tuple[Tensor, Tensor]) -> Element:
        """A scale outside its enclosure, with the largest magnitude of its group."""
        del nominal
        where = torch.tensor([row], device=got.device), torch.tensor([column], device=got.device)
        low, high = self.amax_ends(where)
        first = column * self.size
        context = f"scale of columns {first}..{first + self.size - 1}, amax in [{float(low):.6g}, {float(high):.6g}]"
        wanted = f"{self.word(ends[0])}..{self.word(ends[1])}"
        return Element(row, column, self.word(got), wanted, f"{context}  {self.operands.at(row, first)}")

    def word(self, scale: Tensor) -> str:
        """A stored scale with its bits."""
        if scale.dtype is torch.float32:
            return f"{int(scale.view(torch.int32)) & 0xFFFFFFFF:#010x} ({float(scale):.8g})"
        byte = int(scale)
        power = "nan" if byte == 255 else f"2^{byte - 127}"
        return f"{byte:#04x} ({power if self.rules.pow2 != 'no' else f'{E4M3.values[byte]:g}'})"
