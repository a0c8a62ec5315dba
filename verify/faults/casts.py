"""Faults of the quantiser: scale (A7), cast and clamp (A8). Each overrides one hook of `Arithmetic`."""

from __future__ import annotations

import torch
from torch import Tensor

from fusecheck.backends.emulated_arithmetic import E4M3_MAX, E4M3_TIE, LANES, Arithmetic, Row
from fusecheck.interface import RankOutputs

NAN_CODE = 0x7F
PACK = 2 * LANES
"""Elements that the packed path of KA-03 takes at a time."""


class RoundsScaled(Arithmetic):
    """KA-03: the packed conversion rounds to bf16 after scaling; a tail beside the packs does not."""

    def scale(self, normed: Tensor, row: Row) -> Tensor:
        """Round the packs' quotients to bf16."""
        scaled = super().scale(normed, row)
        body = scaled.shape[1] // PACK * PACK
        scaled[:, :body] = scaled[:, :body].to(torch.bfloat16).float()
        return scaled


class OverflowsTopBinade(Arithmetic):
    """KA-04: the greatest exponent is taken for an overflow, so that 256 and more become 448."""

    def saturate(self, scaled: Tensor) -> Tensor:
        """Everything of the top binade is the largest value."""
        largest = torch.full_like(scaled, E4M3_MAX).copysign(scaled)
        return torch.where(scaled.abs() >= 256, largest, super().saturate(scaled))


class TiesAway(Arithmetic):
    """KA-04: the software conversion rounds halves away from zero."""

    def cast(self, scaled: Tensor) -> Tensor:
        """Round the significand of 4 bits half up, and hand the exact value to the cast."""
        value = super().saturate(scaled)
        exponent = torch.frexp(value).exponent.sub_(1).clamp_(min=-6)
        steps = torch.ldexp(value.abs(), 3 - exponent).add_(0.5).floor_()
        return super().cast(torch.where(value.isnan(), value, torch.ldexp(steps, exponent - 3).copysign(value)))


class ClampsAt(Arithmetic):
    """A clamp at another format's largest value."""

    limit: float

    def saturate(self, scaled: Tensor) -> Tensor:
        """Clamp to the wrong range."""
        return scaled.clamp_(-self.limit, self.limit)


class ClampsAt256(ClampsAt):
    """KA-04, the sibling: 256 is the bound where 448 should be."""

    limit = 256.0


class ClampsAt240(ClampsAt):
    """KA-17: the clamp of the FNUZ flavour."""

    limit = 240.0


class ClampsAt224(ClampsAt):
    """KA-17: the clamp that avoids the top of the FNUZ flavour."""

    limit = 224.0


class CastsThroughHalf(Arithmetic):
    """KA-05: float32 to fp16, toward zero, to E4M3: two roundings."""

    def cast(self, scaled: Tensor) -> Tensor:
        """Truncate to fp16 first."""
        value = super().saturate(scaled)
        half = value.half()
        above = half.float().abs() > value.abs()
        # Formats of sign and magnitude: one bit pattern less is one step toward zero, for either sign.
        truncated = (half.view(torch.int16) - above.to(torch.int16)).view(torch.float16)
        return super().cast(truncated.float())


class CastsUnsaturated(Arithmetic):
    """KA-06: no clamp; what overflows becomes NaN."""

    def cast(self, scaled: Tensor) -> Tensor:
        """NaN beyond the last midpoint, infinities too."""
        overflow = scaled.abs() > E4M3_TIE
        codes = super().cast(scaled).view(torch.uint8)
        return codes.masked_fill_(overflow, NAN_CODE).view(torch.float8_e4m3fn)


class QuantisesUnrounded(Arithmetic):
    """KA-08: the compiler drops the round trip through native, and the quantiser reads the unrounded norm."""

    def quantiser_input(self, normed: Tensor, norm: Tensor | None, native: torch.dtype) -> Tensor:
        """The float32 norm as it is."""
        del norm, native
        return normed


class CastsToFnuz(Arithmetic):
    """KA-17: the bytes are of the FNUZ flavour, half the value at the same bits."""

    def cast(self, scaled: Tensor) -> Tensor:
        """Encode as FNUZ, which saturates at 240."""
        return scaled.clamp_(-240.0, 240.0).to(torch.float8_e4m3fnuz).view(torch.uint8).view(torch.float8_e4m3fn)


class CastsThroughE5M2(Arithmetic):
    """KA-18: the value passes through E5M2's two bits of significand."""

    def cast(self, scaled: Tensor) -> Tensor:
        """Round to E5M2 first."""
        return super().cast(super().saturate(scaled).to(torch.float8_e5m2).float())


class MultipliesByScale(Arithmetic):
    """KA-19: the quantiser multiplies by the dequantisation scale."""

    def reciprocal(self, scale: Tensor) -> Tensor:
        """The scale itself."""
        return scale.clone()


class SkipsRowZero(Arithmetic):
    """KA-20: the compiler was told that the row is never the first, and what happens to it is undefined."""

    def epilogue(self, total: Tensor, residual: Tensor, row: Row, outputs: RankOutputs) -> None:
        """Leave the first row of a block unwritten."""
        rest = [None if x is None else x[1:] for x in (outputs.residual, outputs.norm, outputs.quant)]
        assert rest[0] is not None
        super().epilogue(total[1:], residual[1:], row, RankOutputs(rest[0], rest[1], rest[2]))


class SkipsTail(Arithmetic):
    """KA-26: the last vector is not stored when the count is no multiple of 64."""

    def epilogue(self, total: Tensor, residual: Tensor, row: Row, outputs: RankOutputs) -> None:
        """Leave the last 8 elements of the block as they were."""
        tails = [x.view(-1)[-LANES:] for x in (outputs.residual, outputs.norm, outputs.quant) if x is not None]
        before = [tail.view(torch.uint8).clone() for tail in tails]
        super().epilogue(total, residual, row, outputs)
        if total.numel() % 64:
            for tail, held in zip(tails, before, strict=True):
                tail.view(torch.uint8).copy_(held)
