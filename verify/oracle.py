"""The oracle: nominal outputs, and enclosures for the elements that differ from them.

It reads inputs and a declared dataflow, and knows no backend. Every stage can be conditioned on the previous
observed output, so that an error is reported where it arises.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fusecheck.dataflow import Dataflow
from fusecheck.formats.binary import FP32, NATIVE, Format, round_to
from fusecheck.numerics import enclosure, nominal
from fusecheck.numerics.enclosure import Interval

TABLE_PAYS = 2**16
"""Elements from which looking codes up in a table of all native values is cheaper than forming each."""

Where = tuple[Tensor, Tensor]
"""Row and column indices of selected elements, each [n], int64."""


@dataclass(frozen=True)
class Operands:
    """The operands of some rows of a call.

    Attributes:
        partials: each rank's addend, [rows, hidden], bf16 or fp16.
        residual: [rows, hidden].
        gamma: [hidden].
        scale: the dequantisation scale, a float32 value.
        eps: added to the mean square.
        weight_bias: added to gamma in float32.
    """

    partials: list[Tensor]
    residual: Tensor
    gamma: Tensor
    scale: float
    eps: float
    weight_bias: float = 0.0


class Oracle:
    """What a kernel that keeps its dataflow may return for these operands.

    Args:
        flow: the declared arithmetic.
        operands: the rows to judge.
    """

    def __init__(self, flow: Dataflow, operands: Operands) -> None:
        self.flow = flow
        self.operands = operands
        self.native = operands.residual.dtype
        self.format: Format = next(fmt for fmt in NATIVE.values() if fmt.dtype is self.native)
        self.hidden = operands.residual.shape[-1]

    @cached_property
    def _flushing(self) -> bool:
        return self.flow.flush_subnormals and nominal.may_flush([*self.operands.partials, self.operands.residual])

    @cached_property
    def _weight(self) -> Tensor:
        return nominal.weight(self.operands.gamma, self.operands.weight_bias)

    @cached_property
    def order_known(self) -> bool:
        """Whether the rank sum is one number by declaration: a named order, or at most one addition."""
        return self.flow.order == "rank" or len(self.operands.partials) <= 2

    @cached_property
    def stream(self) -> Tensor:
        """The nominal residual stream, [rows, hidden]: float32 where the norm reads it unrounded, else native."""
        summing = self._flushing and self.flow.sum_flushes
        total = nominal.sum_partials(self.operands.partials, self.flow, flushing=summing)
        return nominal.add_residual(total, self.operands.residual, self.flow, flushing=self._flushing)

    def residual(self) -> Tensor:
        """The nominal residual_out, [rows, hidden], native."""
        return self.stream.to(self.native)

    def residual_ends(self, where: Where) -> Interval:
        """Enclosure of residual_out at some elements, [n] each."""
        if self.order_known:
            point = self.stream[where].to(self.native).to(torch.float64)
            return point, point
        lo, hi = self._stream_ends(where)
        return round_to(lo, self.format), round_to(hi, self.format)

    def _stream_ends(self, where: Where) -> Interval:
        partials = torch.stack([partial[where] for partial in self.operands.partials]).to(torch.float64)
        residual = self.operands.residual[where].to(torch.float64)
        if self.flow.flush_subnormals:
            partials = nominal.flush(partials) if self.flow.sum_flushes else partials
            residual = nominal.flush(residual)
        total = enclosure.sum_ends(partials, self.flow, self.format)
        if self.flow.flush_subnormals and not self.flow.sum_flushes:
            total = nominal.flush(total[0]), nominal.flush(total[1])
        return enclosure.stream_ends(total, residual, self.flow, self.format)

    def read_by_norm(self, residual_out: Tensor) -> Tensor:
        """The norm's nominal input given the observed residual_out, [rows, hidden].

        Where the norm reads the unrounded sum and the order is not known, the nominal sum moves as far as it
        must to round to what was observed, so that the nominal stays inside its enclosure.
        """
        if self.flow.norm_reads_rounded:
            return residual_out
        if self.order_known or torch.equal(self.stream.to(self.native), residual_out):
            return self.stream
        rows, columns = torch.nonzero(self.stream.to(self.native) != residual_out, as_tuple=True)
        where = (rows, columns)
        lo, hi = self._conditioned_ends(residual_out[where].to(torch.float64), where)
        moved = self.stream.clone()
        moved[where] = self.stream[where].to(torch.float64).clamp(lo, hi).to(torch.float32)
        return moved

    def unrounded_norm(self, residual_out: Tensor) -> Tensor:
        """The nominal norm before its last rounding, [rows, hidden], float32."""
        stream = self.read_by_norm(residual_out)
        root = nominal.inverse_root(stream, self.operands.eps, self.flow, self.native)
        return nominal.normalise(stream, root, self._weight, self.flow, self.native)

    def norm(self, residual_out: Tensor) -> Tensor:
        """The nominal norm given the observed residual_out, [rows, hidden], native."""
        return self.unrounded_norm(residual_out).to(self.native)

    def unrounded_norm_ends(self, residual_out: Tensor, where: Where) -> Interval:
        """Enclosure of the norm before its last rounding at some elements, [n] each."""
        rows, place = torch.unique(where[0], return_inverse=True)
        stream = self._norm_input_ends(residual_out, rows)
        squares = enclosure.squares_ends(stream, self.flow, self.format)
        root = enclosure.root_ends(squares, self.hidden, self.operands.eps, self.flow)
        here = (place, where[1])
        return enclosure.norm_ends(
            (stream[0][here], stream[1][here]),
            (root[0][place, 0], root[1][place, 0]),
            self._weight[where[1]].to(torch.float64),
            self.flow,
            self.format,
        )

    def _norm_input_ends(self, residual_out: Tensor, rows: Tensor) -> Interval:
        """Whole rows of what the norm reads, [rows, hidden] each, conditioned on residual_out."""
        observed = residual_out[rows].to(torch.float64)
        if self.flow.norm_reads_rounded:
            return observed, observed
        if self.order_known:
            point = self.stream[rows].to(torch.float64)
            return point, point
        column = torch.arange(self.hidden, device=rows.device)
        return self._conditioned_ends(observed, (rows[:, None], column[None, :]))

    def _conditioned_ends(self, observed: Tensor, where: Where) -> Interval:
        """The unrounded stream, given what it was rounded to."""
        lo, hi = self._stream_ends(where)
        before, after = enclosure.preimage(observed, self.format)
        return torch.maximum(lo, before), torch.minimum(hi, after)

    def norm_ends(self, residual_out: Tensor, where: Where) -> Interval:
        """Enclosure of norm_out given the observed residual_out, at some elements, [n] each."""
        lo, hi = self.unrounded_norm_ends(residual_out, where)
        return round_to(lo, self.format), round_to(hi, self.format)

    def quotient_ends(self, residual_out: Tensor, norm_out: Tensor | None, where: Where) -> Interval:
        """Enclosure of y / scale at some elements: from the observed norm if the dataflow rounds it and it is given."""
        if self.flow.round_norm and norm_out is not None:
            lo = hi = norm_out[where].to(torch.float64)
        elif self.flow.round_norm:
            lo, hi = self.norm_ends(residual_out, where)
        else:
            lo, hi = self.unrounded_norm_ends(residual_out, where)
            lo, hi = round_to(lo, FP32), round_to(hi, FP32)
        scale = self.operands.scale
        return enclosure.quotient_ends(lo, hi, scale, nominal.reciprocal(scale, self.flow), self.flow)

    def codes(self, residual_out: Tensor, norm_out: Tensor | None) -> Tensor:
        """The nominal codes, [rows, hidden], uint8; from the observed norm if it is given and is what is read."""
        if not self.flow.round_norm:
            return nominal.codes_of_float32(self.unrounded_norm(residual_out), self.operands.scale, self.flow)
        norm = self.norm(residual_out) if norm_out is None else norm_out
        if norm.numel() < TABLE_PAYS:
            return nominal.codes_of_float32(norm.to(torch.float32), self.operands.scale, self.flow)
        table = nominal.code_table(self.operands.scale, self.flow, self.format, norm.device)
        return nominal.look_up(table, norm)

    def code_ends(self, residual_out: Tensor, norm_out: Tensor | None, where: Where) -> tuple[Tensor, Tensor]:
        """Ordinals of the least and greatest admissible code at some elements, [n] each, int16."""
        lo, hi = self.quotient_ends(residual_out, norm_out, where)
        return enclosure.code_ends(lo, hi, self.flow)

    def nominal_quotient(self, y: Tensor) -> Tensor:
        """The nominal y / scale, float64, for reports."""
        return nominal.quotient(y.to(torch.float64), self.operands.scale, self.flow)
