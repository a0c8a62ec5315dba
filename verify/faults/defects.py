"""Small numerical defects for `fusecheck faults --sensitivity`, each with what a criterion of this kind rejects.

The rows and the expected counts are those of the criterion's validation: 8 runs of 64 x 4096 elements on 4 ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusecheck.backends.emulated_arithmetic import Arithmetic, Row
from fusecheck.faults.casts import CastsUnsaturated, ClampsAt240, RoundsScaled, TiesAway
from fusecheck.interface import RankInputs


class ScalesBy(Arithmetic):
    """All quotients are too large by a factor."""

    factor = 1.0

    def scale(self, normed: Tensor, row: Row) -> Tensor:
        """Multiply by the factor after the division."""
        return super().scale(normed, row).mul_(self.factor)


def scaled_by(factor: float) -> type[ScalesBy]:
    """The defect with this factor, rounded to float32 with the product."""
    return type("ScalesBy", (ScalesBy,), {"factor": factor})


def step_up(x: Tensor, share: float) -> Tensor:
    """Move a share of the elements one bf16 unit in the last place away from zero; 0 moves a single one."""
    unit = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 8).copysign(x)
    if share >= 1:
        return x + unit
    if share == 0:
        moved = x.clone()
        moved[0, 0] += unit[0, 0]
        return moved
    chosen = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) < share
    return torch.where(chosen, x + unit, x)


class MovesResidual(Arithmetic):
    """The rounded sum is off by one unit in the last place."""

    share = 1.0

    def add_residual(self, total: Tensor, residual: Tensor) -> Tensor:
        """Round, then step."""
        return step_up(super().add_residual(total, residual).to(residual.dtype).float(), self.share)


class MovesOneResidual(MovesResidual):
    """One element of it."""

    share = 0.0


class MovesNorm(Arithmetic):
    """The norm is off by one bf16 unit in the last place."""

    share = 1.0

    def normalise(self, read: Tensor, inverse: Tensor, weight: Tensor, native: torch.dtype) -> Tensor:
        """Step."""
        return step_up(super().normalise(read, inverse, weight, native), self.share)


class MovesSomeNorms(MovesNorm):
    """One per cent of it."""

    share = 0.01


class MovesOneNorm(MovesNorm):
    """One element of it."""

    share = 0.0


class Truncates(Arithmetic):
    """The cast rounds toward zero."""

    def cast(self, scaled: Tensor) -> Tensor:
        """Cut the significand to 4 bits first."""
        value = super().saturate(scaled)
        exponent = torch.frexp(value).exponent.sub_(1).clamp_(min=-6)
        steps = torch.ldexp(value.abs(), 3 - exponent).floor_()
        return super().cast(torch.ldexp(steps, exponent - 3).copysign(value))


class FlushesCodes(Arithmetic):
    """Subnormal codes become zero."""

    def cast(self, scaled: Tensor) -> Tensor:
        """Zero below the least normal."""
        codes = super().cast(scaled).view(torch.uint8)
        return torch.where((codes & 0x78) == 0, codes & 0x80, codes).view(torch.float8_e4m3fn)


class MeanOverOneLess(Arithmetic):
    """The mean is over hidden - 1 elements."""

    def mean_square(self, read: Tensor, native: torch.dtype) -> Tensor:
        """Too large by 1 / (hidden - 1)."""
        hidden = read.shape[1]
        return super().mean_square(read, native) * (hidden / (hidden - 1))


class OmitsEps(Arithmetic):
    """No eps is added."""

    def epsilon(self, inputs: RankInputs) -> float:
        """Zero."""
        return 0.0 * inputs.eps


@dataclass(frozen=True)
class Defect:
    """One row.

    Attributes:
        name: of the row.
        expected: runs of 8 that are rejected by the codes alone (any order; depth declared), and by all outputs.
        arithmetic: what the kernel computes with.
        computes: where its dataflow differs from the declared one.
        declares: where the declared dataflow differs from the base.
        scale: `amax`, `one`, or `eighth` of amax.
        factor: of partial sums and residual.
    """

    name: str
    expected: tuple[int, int, int]
    arithmetic: type[Arithmetic] = Arithmetic
    computes: Mapping[str, Any] = field(default_factory=dict)
    declares: Mapping[str, Any] = field(default_factory=dict)
    scale: str = "amax"
    factor: float = 1.0


_ROUNDED = {"round_norm": True}

DEFECTS: tuple[Defect, ...] = (
    Defect("none: the right kernel", (0, 0, 0)),
    Defect("scale x 1.0001", (0, 8, 8), scaled_by(1.0001)),
    Defect("scale x 1.001", (8, 8, 8), scaled_by(1.001)),
    Defect("scale x 1.01", (8, 8, 8), scaled_by(1.01)),
    Defect("scale x 1.05", (8, 8, 8), scaled_by(1.05)),
    Defect("scale x 1.2", (8, 8, 8), scaled_by(1.2)),
    Defect("t off by 1 bf16 ulp, all", (8, 8, 8), MovesResidual),
    Defect("t off by 1 bf16 ulp, 1 element", (0, 0, 8), MovesOneResidual),
    Defect("y off by 1 bf16 ulp, all", (8, 8, 8), MovesNorm),
    Defect("y off by 1 bf16 ulp, 1 %", (8, 8, 8), MovesSomeNorms),
    Defect("y off by 1 bf16 ulp, 1 element", (1, 1, 8), MovesOneNorm),
    Defect("y rounded to bf16, undeclared", (8, 8, 8), computes=_ROUNDED),
    Defect("cast through bf16", (8, 8, 8), RoundsScaled),
    Defect("ranks accumulated in bf16, undeclared", (8, 8, 8), computes={"accumulate": "native"}),
    Defect("sum rounded before the residual, undeclared", (8, 8, 8), computes={"round_sum": True}),
    Defect("norm reads unrounded t, undeclared", (8, 8, 8), computes={"norm_reads_rounded": False}),
    Defect("t r rounded before gamma, undeclared", (8, 8, 8), computes={"round_normed": True}),
    Defect("cast truncates", (8, 8, 8), Truncates),
    Defect("cast flushes subnormals", (8, 8, 8), FlushesCodes),
    Defect("cast saturates at 240", (8, 8, 8), ClampsAt240),
    Defect("mean over hidden - 1", (0, 8, 8), MeanOverOneLess),
    Defect("eps omitted", (0, 0, 1), OmitsEps),
    Defect("cast rounds half away, scale 1, bf16 y", (8, 8, 8), TiesAway, declares=_ROUNDED, scale="one"),
    Defect("scale x 1.00001, scale 1, bf16 y", (8, 8, 8), scaled_by(1.00001), declares=_ROUNDED, scale="one"),
    Defect("multiplies, scale 1, bf16 y", (0, 0, 0), computes={"scaling": "multiply"}, declares=_ROUNDED, scale="one"),
    Defect("cast without saturation, scale / 8", (8, 8, 8), CastsUnsaturated, scale="eighth"),
    Defect("eps omitted, x ~ 1e-3", (8, 8, 8), OmitsEps, factor=1e-3),
)
"""The rows, in the order of the criterion's table."""
