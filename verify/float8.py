"""E4M3 (fn) as a table, and the one-rounding cast to it.

OCP OFP8: one sign, four exponent (bias 7) and three mantissa bits; largest 448;
0x7F and 0xFF are NaN; no infinities. Nothing here calls a framework's cast.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusecheck.dataflow import CodeOfNan
from fusecheck.numerics.rounding import E4M3, round_to

LARGEST = 448.0
LARGEST_CODE = 0x7E
NAN_CODE = 0x7F
SIGN = 0x80
OVERFLOW_TIE = 464.0
"""Halfway between 448 and the next value the exponent would allow; rounds to even, which is 448."""


def value(code: int) -> float:
    """The real number that a code stands for; NaN for 0x7F and 0xFF."""
    sign = -1.0 if code & SIGN else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 7
    if code & 0x7F == NAN_CODE:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


VALUES: tuple[float, ...] = tuple(value(code) for code in range(256))
"""The value of each of the 256 codes."""

MIDPOINTS: tuple[float, ...] = (
    *((VALUES[c] + VALUES[c + 1]) / 2 for c in range(LARGEST_CODE)),
    OVERFLOW_TIE,
)
"""Where the cast of a positive number may turn: between neighbours, and the overflow tie."""


@cache
def _values(device: torch.device) -> Tensor:
    return torch.tensor(VALUES, dtype=torch.float64, device=device)


def decode(codes: Tensor) -> Tensor:
    """The values of uint8 codes, float64."""
    return _values(codes.device)[codes.to(torch.int64)]


def encode(x: Tensor, *, saturate: bool = True, code_of_nan: CodeOfNan = "nan") -> Tensor:
    """Cast float64 to E4M3 codes (uint8) with one rounding, ties to even; the sign of zero is kept.

    Args:
        x: any shape, float64.
        saturate: beyond +-448 (after rounding), infinities included, becomes +-448; else NaN.
        code_of_nan: what NaN becomes.
    """
    rounded = round_to(x, E4M3)
    magnitude = rounded.abs()
    normal = (magnitude.view(torch.int64) >> 49) - ((1023 - 7) << 3)
    code = torch.where(magnitude >= 2.0**-6, normal, (magnitude * 512).nan_to_num(0, 0, 0).to(torch.int64))
    code = torch.where(magnitude > LARGEST, LARGEST_CODE if saturate else NAN_CODE, code)
    code = torch.where(torch.signbit(x), code | SIGN, code)
    nan = {"nan": NAN_CODE, "+max": LARGEST_CODE, "-max": LARGEST_CODE | SIGN}[code_of_nan]
    return torch.where(x.isnan(), nan, code).to(torch.uint8)


def is_nan(codes: Tensor) -> Tensor:
    """Which uint8 codes are NaN, of either sign."""
    return (codes & 0x7F) == NAN_CODE


def ordinal(codes: Tensor) -> Tensor:
    """Signed index of each code by value, int16: both zeros 0, +-448 at +-126, NaN codes at +-127."""
    wide = codes.to(torch.int16)
    magnitude = wide & 0x7F
    return torch.where(wide >= SIGN, -magnitude, magnitude)


def code_at(index: int) -> int:
    """The code at a signed ordinal; 0x00 for 0.

    Raises:
        ValueError: the ordinal is beyond +-126.
    """
    if abs(index) > LARGEST_CODE:
        raise ValueError(f"got ordinal {index}, expected -126 to 126")
    return index if index >= 0 else SIGN | -index


def neighbours(code: int) -> tuple[int, int]:
    """The codes next below and next above by value; saturating at +-448.

    Raises:
        ValueError: the code is a NaN.
    """
    if code & 0x7F == NAN_CODE:
        raise ValueError(f"got code {code:#04x}, a NaN, expected one with a value")
    index = code if code < SIGN else SIGN - code
    return code_at(max(index - 1, -LARGEST_CODE)), code_at(min(index + 1, LARGEST_CODE))


def encode_float32(x: Tensor, *, saturate: bool = True, code_of_nan: CodeOfNan = "nan") -> Tensor:
    """`encode` for float32 input, on 32-bit integers: the same codes, in half the memory."""
    if x.device.type != "cpu":
        return _encode_bits(x, saturate=saturate, code_of_nan=code_of_nan)
    bits = x.contiguous().view(torch.int32).numpy().view(np.uint32)
    index = (bits >> np.uint32(_BELOW)) << np.uint32(1)
    index = index | ((bits & np.uint32((1 << _BELOW) - 1)) != 0)
    return torch.from_numpy(np.asarray(_codes_by_upper_bits(saturate, code_of_nan).take(index)))


_BELOW = 19
"""Bits of a float32 below the first that the cast of a normal number drops: it only matters whether any is set."""


@cache
def _codes_by_upper_bits(saturate: bool, code_of_nan: CodeOfNan) -> NDArray[np.uint8]:  # noqa: FBT001
    """The code of every float32, [2^14]: by sign, exponent, four mantissa bits, and whether any lower bit is set."""
    upper = np.arange(1 << (32 - _BELOW), dtype=np.uint32) << np.uint32(_BELOW)
    values = torch.from_numpy(np.stack((upper, upper | np.uint32(1)), axis=-1).view(np.float32))
    codes = _encode_bits(values, saturate=saturate, code_of_nan=code_of_nan)
    return np.asarray(codes.numpy().reshape(-1))


def _encode_bits(x: Tensor, *, saturate: bool, code_of_nan: CodeOfNan) -> Tensor:
    bits = x.contiguous().view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    tiny = torch.round(x.abs().clamp_(max=1.0) * 512).to(torch.int32)
    code = torch.where(magnitude >= 0x3C800000, normal, tiny)  # 2^-6
    code = torch.where(code > LARGEST_CODE, LARGEST_CODE if saturate else NAN_CODE, code)
    code = torch.where(bits < 0, code | SIGN, code)
    nan = {"nan": NAN_CODE, "+max": LARGEST_CODE, "-max": LARGEST_CODE | SIGN}[code_of_nan]
    return torch.where(magnitude > 0x7F800000, nan, code).to(torch.uint8)
