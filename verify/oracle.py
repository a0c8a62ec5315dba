"""The oracle: the stages of an operation, in order.

It reads inputs and a declared dataflow, and knows no backend. Every stage can be conditioned on the previous
observed output, so that an error is reported where it arises.
"""

from __future__ import annotations

from torch import Tensor

from fusecheck.dataflow import Dataflow
from fusecheck.numerics.enclosure import Interval
from fusecheck.operations import GIVEN_SCALE
from fusecheck.quantisers.known import quantiser
from fusecheck.stages.code import Code
from fusecheck.stages.norm import Norm
from fusecheck.stages.operands import Operands, Where
from fusecheck.stages.residual import Residual
from fusecheck.stages.scale import Scale

__all__ = ["Operands", "Oracle", "Where"]


class Oracle:
    """What a kernel that keeps its dataflow may return for these operands.

    Args:
        flow: the declared arithmetic.
        operands: the rows to judge.
    """

    def __init__(self, flow: Dataflow, operands: Operands) -> None:
        self.flow = flow
        self.operands = operands
        self.format = operands.format
        self.stream = Residual(flow, operands)

    def after_residual(self, residual_out: Tensor | None) -> Norm:
        """The stage of the norm, given the observed residual_out."""
        return Norm(self.flow, self.operands, self.stream, residual_out)

    def scales(self, residual_out: Tensor | None, norm_out: Tensor | None) -> Scale:
        """The stage of the scales, given the observed residual_out and norm, where they were returned."""
        return self._scales(self.operands.op.quantiser, residual_out, norm_out)

    def _scales(self, name: str, residual_out: Tensor | None, norm_out: Tensor | None) -> Scale:
        before = self.after_residual(residual_out)
        return Scale(self.operands, quantiser(name), self.flow.quant(name), before, norm_out)

    def static_codes(self, residual_out: Tensor | None, norm_out: Tensor | None) -> Code:
        """The stage of codes by the given scale."""
        return Code(self.operands, self._scales(GIVEN_SCALE, residual_out, norm_out), None)

    def code_stage(self, residual_out: Tensor | None, norm_out: Tensor | None, stored: Tensor | None) -> Code:
        """The stage of the codes, given all that was observed before it; without `stored` scales by the given one."""
        if stored is None:
            return self.static_codes(residual_out, norm_out)
        return Code(self.operands, self.scales(residual_out, norm_out), stored)

    def residual(self) -> Tensor:
        """The nominal residual_out, [rows, hidden], native."""
        return self.stream.nominal()

    def residual_ends(self, where: Where) -> Interval:
        """Enclosure of residual_out at some elements, [n] each."""
        return self.stream.ends(where)

    def unrounded_norm(self, residual_out: Tensor) -> Tensor:
        """The nominal norm before its last rounding, [rows, hidden], float32."""
        return self.after_residual(residual_out).unrounded

    def norm(self, residual_out: Tensor) -> Tensor:
        """The nominal norm given the observed residual_out, [rows, hidden], native."""
        return self.after_residual(residual_out).nominal()

    def unrounded_norm_ends(self, residual_out: Tensor, where: Where) -> Interval:
        """Enclosure of the norm before its last rounding at some elements, [n] each."""
        return self.after_residual(residual_out).unrounded_ends(where)

    def norm_ends(self, residual_out: Tensor, where: Where) -> Interval:
        """Enclosure of norm_out given the observed residual_out, at some elements, [n] each."""
        return self.after_residual(residual_out).ends(where)

    def quotient_ends(self, residual_out: Tensor, norm_out: Tensor | None, where: Where) -> Interval:
        """Enclosure of y / the given scale at some elements: from the observed norm where it is read and given."""
        return self.static_codes(residual_out, norm_out).quotient_ends(where)

    def codes(self, residual_out: Tensor, norm_out: Tensor | None) -> Tensor:
        """The nominal codes by a given scale, [rows, hidden], uint8; from the observed norm where it is read."""
        return self.static_codes(residual_out, norm_out).nominal()

    def code_ends(self, residual_out: Tensor, norm_out: Tensor | None, where: Where) -> tuple[Tensor, Tensor]:
        """Ordinals of the least and greatest admissible code by a given scale at some elements, [n] each, int16."""
        return self.static_codes(residual_out, norm_out).ends(where)
