"""Stage `residual`: the sum over ranks plus the residual, which the norm reads.

Nominal and ends come from the operands alone. The kernel's residual_out, where it is returned, is judged by them; what
the norm reads is then that value itself, or whatever rounds to it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from fusecheck.dataflow import Dataflow
from fusecheck.formats.binary import round_to
from fusecheck.numerics import enclosure, nominal, sums
from fusecheck.numerics.enclosure import Interval
from fusecheck.stages import values
from fusecheck.stages.judgement import Element, Stage
from fusecheck.stages.operands import Operands, Where


class Residual:
    """The residual stream of some rows.

    Args:
        flow: the declared arithmetic.
        operands: of exactly these rows.
    """

    stage = Stage.RESIDUAL

    def __init__(self, flow: Dataflow, operands: Operands) -> None:
        self.flow, self.operands = flow, operands

    @cached_property
    def order_known(self) -> bool:
        """Whether the rank sum is one number by declaration: how it is rounded, and no order or addition to choose."""
        addends = len(self.operands.partials)
        return addends == 1 or (self.flow.sum_rounding != "either" and (self.flow.order_free or addends == 2))

    @cached_property
    def stream(self) -> Tensor:
        """The nominal residual stream, [rows, hidden]: float32 where the norm reads it unrounded, else native."""
        return self._added(self.flow)

    @cached_property
    def _unrounded(self) -> Tensor:
        return (
            self._added(replace(self.flow, norm_reads_rounded=False)) if self.flow.norm_reads_rounded else self.stream
        )

    def _added(self, flow: Dataflow) -> Tensor:
        flushing = self.operands.flushing(flow)
        total = sums.sum_partials(self.operands.partials, flow, flushing=flushing and flow.sum_flushes)
        if self.operands.op.residual:
            return nominal.add_residual(total, self.operands.residual, flow, flushing=flushing)
        return total.to(self.operands.native if flow.norm_reads_rounded else torch.float32)

    @cached_property
    def _rounded(self) -> Tensor:
        return self.stream.to(self.operands.native)

    def nominal(self) -> Tensor:
        """The nominal residual_out, [rows, hidden], native."""
        return self._rounded

    def ends(self, where: Where) -> Interval:
        """Enclosure of residual_out at some elements, [n] each."""
        if self.order_known:
            point = self._rounded[where].to(torch.float64)
            return point, point
        lo, hi = self._stream_ends(where, self.flow)
        return round_to(lo, self.operands.format), round_to(hi, self.operands.format)

    def admits(self, got: Tensor, nominal: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """See `values.admits`."""
        return values.admits(got, nominal, lo, hi, self.flow)

    def told(self, row: int, column: int, got: Tensor, nominal: Tensor, ends: tuple[Tensor, Tensor]) -> Element:
        """See `values.told`."""
        return values.told(self.operands, (row, column), got, nominal, ends)

    def _stream_ends(self, where: Where, flow: Dataflow) -> Interval:
        partials = torch.stack([partial[where] for partial in self.operands.partials]).to(torch.float64)
        residual = self.operands.residual[where].to(torch.float64)
        residual = residual if self.operands.op.residual else torch.zeros_like(residual)
        if flow.flush_subnormals:
            partials = nominal.flush(partials) if flow.sum_flushes else partials
            residual = nominal.flush(residual)
        total = enclosure.sum_ends(partials, flow, self.operands.format)
        if flow.flush_subnormals and not flow.sum_flushes:
            total = nominal.flush(total[0]), nominal.flush(total[1])
        return enclosure.stream_ends(total, residual, flow, self.operands.format)

    def read(self, observed: Tensor | None, *, rounded: bool) -> Tensor:
        """What is nominally read behind this stage, [rows, hidden], given residual_out where it was returned.

        Where the unrounded sum is read and the order is not known, the nominal sum moves as far as it must to round
        to what was observed, so that the nominal stays inside its enclosure.
        """
        if rounded:
            return self._rounded if observed is None else observed
        if self.order_known or observed is None or torch.equal(self._rounded, observed):
            return self._unrounded
        rows, columns = torch.nonzero(self._rounded != observed, as_tuple=True)
        where = (rows, columns)
        lo, hi = self._conditioned_ends(observed[where].to(torch.float64), where)
        moved = self._unrounded.clone()
        moved[where] = moved[where].to(torch.float64).clamp(lo, hi).to(torch.float32)
        return moved

    def read_ends(self, observed: Tensor | None, rows: Tensor, *, rounded: bool) -> Interval:
        """Whole rows of what is read, [n, hidden] each, given residual_out where it was returned."""
        if self.order_known or (rounded and observed is not None):
            point = self.read(observed, rounded=rounded)[rows].to(torch.float64)
            return point, point
        where = (rows[:, None], torch.arange(self.operands.hidden, device=rows.device)[None, :])
        if observed is None:
            return self._stream_ends(where, replace(self.flow, norm_reads_rounded=rounded))
        return self._conditioned_ends(observed[rows].to(torch.float64), where)

    def _conditioned_ends(self, observed: Tensor, where: Where) -> Interval:
        """The unrounded stream, given what it was rounded to."""
        lo, hi = self._stream_ends(where, replace(self.flow, norm_reads_rounded=False))
        before, after = enclosure.preimage(observed, self.operands.format)
        return torch.maximum(lo, before), torch.minimum(hi, after)
