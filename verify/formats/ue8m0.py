"""UE8M0: a byte b that stands for 2^(b - 127); 255 is NaN. There is no sign, no zero and no infinity."""

from __future__ import annotations

import torch
from torch import Tensor

NAN = 255
BIAS = 127


def decode(stored: Tensor) -> Tensor:
    """The values of uint8 bytes, float64; 255 is NaN."""
    power = torch.ldexp(torch.ones_like(stored, dtype=torch.float64), stored.to(torch.int32) - BIAS)
    return torch.where(stored == NAN, torch.nan, power)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32) & 0x7FFFFFFF


def ceil(x: Tensor) -> Tensor:
    """The byte of the least power of two that is not below each non-negative float32, int32; NaN and infinity: 255."""
    bits = _bits(x)
    lifted = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    byte = torch.where(bits <= 1 << 22, 0, lifted)  # 2^-127 is a subnormal float32, and the least power
    return torch.where(bits >= 0x7F800000, NAN, byte)


def floor(x: Tensor) -> Tensor:
    """The exponent field of each non-negative float32, int32: the greatest power of two not above a normal number."""
    return _bits(x) >> 23


def even(x: Tensor, precision: int) -> Tensor:
    """`floor` of each non-negative float32, first rounded to `precision` bits by adding half of the last one."""
    return (_bits(x) + (1 << (23 - precision))) >> 23
