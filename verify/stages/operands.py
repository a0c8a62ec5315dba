"""What a stage reads besides the outputs: the operands of some rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fusecheck.dataflow import Dataflow
from fusecheck.formats.binary import NATIVE, Format
from fusecheck.numerics import nominal
from fusecheck.operations import Operation

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
        op: what is computed of them; its residual, norm and quantiser matter here.
    """

    partials: list[Tensor]
    residual: Tensor
    gamma: Tensor
    scale: float
    eps: float
    weight_bias: float = 0.0
    op: Operation = Operation.RESIDUAL_RMS_NORM_OUT_QUANT_FP8

    @property
    def native(self) -> torch.dtype:
        """The activations' dtype."""
        return self.residual.dtype

    @property
    def hidden(self) -> int:
        """Elements of a row."""
        return self.residual.shape[-1]

    @cached_property
    def format(self) -> Format:
        """The activations' format."""
        return next(fmt for fmt in NATIVE.values() if fmt.dtype is self.native)

    @cached_property
    def weight(self) -> Tensor:
        """Gamma plus the weight bias in float32, [hidden]."""
        return nominal.weight(self.gamma, self.weight_bias)

    def flushing(self, flow: Dataflow) -> bool:
        """Whether an addition may meet a subnormal that the dataflow flushes."""
        return flow.flush_subnormals and self._may_flush

    @cached_property
    def _may_flush(self) -> bool:
        return nominal.may_flush([*self.partials, self.residual] if self.op.residual else self.partials)

    def at(self, row: int, column: int) -> str:
        """The inputs of one element, as the report line shows them."""
        partials = ", ".join(f"{float(partial[row, column]):.6g}" for partial in self.partials)
        residual = f" residual={float(self.residual[row, column]):.6g}" if self.op.residual else ""
        gamma = f" gamma={float(self.gamma[column]):.6g}" if self.op.norm else ""
        return f"in=[{partials}]{residual}{gamma} scale={self.scale:.8g}"
