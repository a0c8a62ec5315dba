"""Binary formats and one-rounding casts from float64, written on the bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusecheck.quantflow import Ties


@dataclass(frozen=True)
class Format:
    """A binary floating-point format.

    Attributes:
        name: as Problems name it.
        precision: significand bits, the hidden one included.
        emin: exponent of the least normal number.
        largest: the largest finite value.
        dtype: the torch dtype.
    """

    name: str
    precision: int
    emin: int
    largest: float
    dtype: torch.dtype

    @property
    def quantum(self) -> float:
        """The least subnormal."""
        return 2.0 ** (self.emin - self.precision + 1)

    @property
    def overflows(self) -> bool:
        """Whether what rounds beyond `largest` is infinite."""
        return True


BF16 = Format("bf16", 8, -126, float(2**128 - 2**120), torch.bfloat16)
FP16 = Format("fp16", 11, -14, 65504.0, torch.float16)
FP32 = Format("fp32", 24, -126, float(2**128 - 2**104), torch.float32)

NATIVE = {fmt.name: fmt for fmt in (BF16, FP16)}
"""The activation formats by the names that Problems use."""


def nearest_whole(x: Tensor, ties: Ties) -> Tensor:
    """The nearest whole numbers to non-negative ones, of their dtype."""
    if ties == "even":
        return torch.round(x)
    below = torch.floor(x)
    return below + ((x - below >= 0.5) if ties == "away" else (x - below > 0.5))


def tie_addend(bits: Tensor, drop: int, ties: Ties) -> Tensor | int:
    """What to add to a magnitude's bits so that cutting `drop` of them rounds it."""
    half = 1 << (drop - 1)
    return half - 1 + ((bits >> drop) & 1) if ties == "even" else half - (ties == "toward_zero")


def round_to(x: Tensor, fmt: Format, ties: Ties = "even") -> Tensor:
    """Round float64 to `fmt` once; the result is float64.

    Magnitudes that round beyond `fmt.largest` become infinite, except for elements, whose overflow is a
    matter of the cast (`Element.encode`) and which are rounded as if their exponents went on.
    """
    if fmt is FP32 and ties == "even":
        return x.to(torch.float32).to(torch.float64)
    drop = 53 - fmt.precision
    bits = x.contiguous().view(torch.int64)
    normal = ((bits + tie_addend(bits, drop, ties)) & -(1 << drop)).view(torch.float64)
    tiny = torch.copysign(nearest_whole((x / fmt.quantum).abs(), ties), x) * fmt.quantum
    rounded = torch.where(x.abs() < 2.0**fmt.emin, tiny, normal)
    if fmt.overflows:
        rounded = torch.where(rounded.abs() > fmt.largest, torch.copysign(torch.full_like(x, torch.inf), x), rounded)
    return torch.where(x.isnan(), x, rounded)


def truncate_to(x: Tensor, fmt: Format) -> Tensor:
    """Round float64 to `fmt` toward zero; the result is float64. No finite number becomes infinite."""
    drop = 53 - fmt.precision
    normal = (x.contiguous().view(torch.int64) & -(1 << drop)).view(torch.float64)
    tiny = torch.copysign(torch.floor((x / fmt.quantum).abs()), x) * fmt.quantum
    cut = torch.where(x.abs() < 2.0**fmt.emin, tiny, normal).clamp(-fmt.largest, fmt.largest)
    return torch.where(x.isfinite(), cut, x)


def ulp(x: Tensor, fmt: Format) -> Tensor:
    """Spacing of `fmt` in the binade that holds |x|, float64; the least subnormal at and around zero."""
    _, exponent = torch.frexp(x)
    exponent = torch.where(x == 0, fmt.emin, exponent - 1)  # frexp calls the exponent of zero 0
    exponent = exponent.clamp(min=fmt.emin) - fmt.precision + 1
    return torch.ldexp(torch.ones_like(x), exponent)


def trailing_unit(x: Tensor) -> Tensor:
    """The weight of the last set bit of a float64 that float32 can represent; infinite for zero."""
    mantissa, exponent = torch.frexp(x)
    integer = torch.ldexp(mantissa, torch.full_like(exponent, 24)).abs().to(torch.int64)
    low = (integer & -integer).to(torch.float64)
    return torch.where(x == 0, torch.inf, torch.ldexp(low, exponent - 24))
