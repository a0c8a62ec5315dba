"""Stage `norm`: the normalised activations, from the residual stream as observed."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fusecheck.dataflow import Dataflow
from fusecheck.formats.binary import FP32, round_to
from fusecheck.numerics import enclosure, nominal
from fusecheck.numerics.enclosure import Interval
from fusecheck.quantflow import Reads
from fusecheck.quantisers.scales import narrowed_root
from fusecheck.stages import values
from fusecheck.stages.judgement import Element, Stage
from fusecheck.stages.operands import Operands, Where
from fusecheck.stages.residual import Residual


class Norm:
    """The norm of some rows.

    Args:
        flow: the declared arithmetic.
        operands: of exactly these rows.
        before: the stage of the residual stream.
        residual_out: what the kernel returned there, [rows, hidden], native, if it did.
    """

    stage = Stage.NORM

    def __init__(self, flow: Dataflow, operands: Operands, before: Residual, residual_out: Tensor | None) -> None:
        self.flow, self.operands, self._before, self._observed = flow, operands, before, residual_out

    @property
    def _statistics_rounded(self) -> bool:
        read = self.flow.statistics
        return self.flow.norm_reads_rounded if read is None else read == "rounded"

    @cached_property
    def unrounded(self) -> Tensor:
        """The nominal norm before its last rounding, [rows, hidden], float32."""
        stream = self._before.read(self._observed, rounded=self.flow.norm_reads_rounded)
        measured = self._before.read(self._observed, rounded=self._statistics_rounded)
        root = nominal.inverse_root(measured, self.operands.eps, self.flow, self.operands.native)
        return nominal.normalise(stream, root, self.operands.weight, self.flow, self.operands.native)

    @cached_property
    def _rounded(self) -> Tensor:
        return self.unrounded.to(self.operands.native)

    def nominal(self) -> Tensor:
        """The nominal norm, [rows, hidden], native."""
        return self._rounded

    def unrounded_ends(self, where: Where, amax: Interval | None = None) -> Interval:
        """Enclosure of the norm before its last rounding at some elements, [n] each.

        Args:
            where: the elements.
            amax: what is known of the largest magnitude of each row, [rows, 1] each, such as from its scale (G6).
        """
        rows, place = torch.unique(where[0], return_inverse=True)
        stream = self._before.read_ends(self._observed, rows, rounded=self.flow.norm_reads_rounded)
        measured = self._before.read_ends(self._observed, rows, rounded=self._statistics_rounded)
        squares = enclosure.squares_ends(measured, self.flow, self.operands.format)
        root = enclosure.root_ends(squares, self.operands.hidden, self.operands.eps, self.flow)
        if amax is not None and not self.flow.round_normed:
            root = narrowed_root(root, self._peak(stream), (amax[0][rows], amax[1][rows]))
        here = (place, where[1])
        return enclosure.norm_ends(
            (stream[0][here], stream[1][here]),
            (root[0][place, 0], root[1][place, 0]),
            self.operands.weight[where[1]].to(torch.float64),
            self.flow,
            self.operands.format,
        )

    def _peak(self, stream: Interval) -> Interval:
        """Ends of the largest |t * weight| of whole rows, [n, 1] each."""
        lo, hi = stream
        weight = self.operands.weight.to(torch.float64).abs()
        least = torch.where((lo <= 0) & (hi >= 0), 0.0, torch.minimum(lo.abs(), hi.abs()))
        most = torch.maximum(lo.abs(), hi.abs())
        return (least * weight).amax(-1, keepdim=True), (most * weight).amax(-1, keepdim=True)

    def ends(self, where: Where) -> Interval:
        """Enclosure of norm_out at some elements, [n] each."""
        lo, hi = self.unrounded_ends(where)
        return round_to(lo, self.operands.format), round_to(hi, self.operands.format)

    def admits(self, got: Tensor, nominal: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """See `values.admits`."""
        return values.admits(got, nominal, lo, hi, self.flow)

    def told(self, row: int, column: int, got: Tensor, nominal: Tensor, ends: tuple[Tensor, Tensor]) -> Element:
        """See `values.told`."""
        return values.told(self.operands, (row, column), got, nominal, ends)

    def read(self, norm_out: Tensor | None, reads: Reads) -> Tensor:
        """What the quantiser nominally reads, [rows, hidden]: native, the observed norm itself if given; or float32."""
        if reads == "unrounded":
            return self.unrounded
        return self._rounded if norm_out is None else norm_out

    def read_ends(self, norm_out: Tensor | None, where: Where, reads: Reads, amax: Interval | None = None) -> Interval:
        """Enclosure of what the quantiser reads at some elements, [n] each, given the observed norm if there is one.

        `amax` is what is known of the largest magnitude of each row, as for `unrounded_ends`.
        """
        if reads == "unrounded":
            lo, hi = self.unrounded_ends(where, amax)
            return round_to(lo, FP32), round_to(hi, FP32)
        if norm_out is None:
            return self.ends(where)
        point = norm_out[where].to(torch.float64)
        return point, point
