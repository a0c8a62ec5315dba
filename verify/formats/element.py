"""Elements: what a quantiser stores for each activation, as a table, with the one-rounding cast to it.

OCP OFP8 E4M3 (fn): bias 7, largest 448, 0x7F and 0xFF are NaN. OCP MX E2M1: bias 1, largest 6, no NaN. Neither has
infinities. Nothing here calls a framework's cast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusecheck.formats.binary import Format, nearest_whole, round_to, tie_addend
from fusecheck.quantflow import CodeOfNan, Ties


@dataclass(frozen=True)
class Element(Format):
    """A format of `bits` bits: a sign, an exponent, and `precision` - 1 bits of mantissa.

    Attributes:
        bits: of a code.
        nan: the magnitude code that is no number; None where each one has a value.
    """

    bits: int
    nan: int | None

    @property
    def overflows(self) -> bool:
        """Never by itself: whether a cast saturates is declared."""
        return False

    @property
    def sign(self) -> int:
        """The bit of a negative code."""
        return 1 << (self.bits - 1)

    @property
    def largest_code(self) -> int:
        """The code of the largest value."""
        return self.sign - 1 if self.nan is None else self.nan - 1

    @property
    def per_byte(self) -> int:
        """How many codes share a byte."""
        return 8 // self.bits

    def value(self, code: int) -> float:
        """The real number that a code stands for; NaN for a code that is none."""
        sign = -1.0 if code & self.sign else 1.0
        steps = 1 << (self.precision - 1)
        exponent, mantissa = divmod(code & (self.sign - 1), steps)
        if code & (self.sign - 1) == self.nan:
            return math.nan
        if exponent == 0:
            return sign * mantissa * self.quantum
        return sign * (steps + mantissa) * self.quantum * 2.0 ** (exponent - 1)

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The value of each code."""
        return tuple(self.value(code) for code in range(2 * self.sign))

    @cached_property
    def overflow_tie(self) -> float:
        """Halfway from the largest value to the next that the exponent would allow: E4M3 464, E2M1 7."""
        return self.largest + (self.largest - self.values[self.largest_code - 1]) / 2

    @cached_property
    def midpoints(self) -> tuple[float, ...]:
        """Where the cast of a positive number may turn: between neighbours, and the overflow tie."""
        between = ((self.values[c] + self.values[c + 1]) / 2 for c in range(self.largest_code))
        return (*between, self.overflow_tie)

    def decode(self, codes: Tensor) -> Tensor:
        """The values of uint8 codes, one a byte, float64."""
        return _table(self, codes.device)[codes.to(torch.int64)]

    def encode(
        self, x: Tensor, *, saturate: bool = True, code_of_nan: CodeOfNan = "nan", ties: Ties = "even"
    ) -> Tensor:
        """Cast float64 to codes (uint8, one a byte) with one rounding; the sign of zero is kept.

        Args:
            x: any shape, float64.
            saturate: beyond the largest value (after rounding), infinities included, becomes it; else NaN.
            code_of_nan: what NaN becomes; `nan` is the largest value where the format has no NaN.
            ties: to the even code, away from zero, or toward it.
        """
        rounded = round_to(x, self, ties)
        magnitude = rounded.abs()
        mantissa = self.precision - 1
        normal = (magnitude.view(torch.int64) >> (52 - mantissa)) - ((1022 + self.emin) << mantissa)
        tiny = (magnitude / self.quantum).nan_to_num(0, 0, 0).to(torch.int64)
        code = torch.where(magnitude >= 2.0**self.emin, normal, tiny)
        code = torch.where(magnitude > self.largest, self._beyond(saturate=saturate), code)
        code = torch.where(torch.signbit(x), code | self.sign, code)
        return torch.where(x.isnan(), self._of_nan(code_of_nan), code).to(torch.uint8)

    def _beyond(self, *, saturate: bool) -> int:
        return self.largest_code if saturate or self.nan is None else self.nan

    def _of_nan(self, code_of_nan: CodeOfNan) -> int:
        number = self.largest_code if self.nan is None else self.nan
        return {"nan": number, "+max": self.largest_code, "-max": self.largest_code | self.sign}[code_of_nan]

    def encode_float32(
        self, x: Tensor, *, saturate: bool = True, code_of_nan: CodeOfNan = "nan", ties: Ties = "even"
    ) -> Tensor:
        """`encode` for float32 input, on 32-bit integers: the same codes, in half the memory."""
        below, rule = self._below, (saturate, code_of_nan, ties)
        if x.device.type != "cpu":
            return _look_up_torch(_codes_on(x.device, self, *rule), x, below)
        bits = x.contiguous().view(torch.int32).numpy().view(np.uint32)
        # Upper bits twice, and one more where a lower bit is set: a NaN of all ones wraps to the index of another NaN.
        index = bits + np.uint32((1 << below) - 1)
        index >>= np.uint32(below)
        index += bits >> np.uint32(below)
        table = _codes_by_upper_bits(self, *rule)
        return torch.from_numpy(np.asarray(table.take(index)))

    @property
    def _below(self) -> int:
        """Bits of a float32 below the first that the cast of a normal number drops: only whether any is set matters."""
        return 23 - self.precision

    def is_nan(self, codes: Tensor) -> Tensor:
        """Which uint8 codes are NaN, of either sign."""
        if self.nan is None:
            return torch.zeros_like(codes, dtype=torch.bool)
        return (codes & (self.sign - 1)) == self.nan

    def ordinal(self, codes: Tensor) -> Tensor:
        """Signed index of each code by value, int16: both zeros 0, the largest at +-`largest_code`, NaN one beyond."""
        wide = codes.to(torch.int16)
        magnitude = wide & (self.sign - 1)
        return torch.where(wide >= self.sign, -magnitude, magnitude)

    def code_at(self, index: int) -> int:
        """The code at a signed ordinal; 0x00 for 0.

        Raises:
            ValueError: the ordinal is beyond that of the largest value.
        """
        last = self.largest_code
        if abs(index) > last:
            raise ValueError(f"got ordinal {index}, expected -{last} to {last}")
        return index if index >= 0 else self.sign | -index

    def neighbours(self, code: int) -> tuple[int, int]:
        """The codes next below and next above by value; saturating at the largest.

        Raises:
            ValueError: the code is a NaN.
        """
        if code & (self.sign - 1) == self.nan:
            raise ValueError(f"got code {code:#04x}, a NaN, expected one with a value")
        index = code if code < self.sign else self.sign - code
        last = self.largest_code
        return self.code_at(max(index - 1, -last)), self.code_at(min(index + 1, last))

    def pack(self, codes: Tensor) -> Tensor:
        """Codes one a byte to codes as they are stored, uint8, [..., n / per_byte]: the first in the lowest bits."""
        if self.per_byte == 1:
            return codes
        return codes[..., ::2] | (codes[..., 1::2] << self.bits)

    def unpack(self, stored: Tensor) -> Tensor:
        """The inverse of `pack`, of any one-byte dtype: uint8 codes, [..., n]."""
        codes = stored.view(torch.uint8)
        if self.per_byte == 1:
            return codes
        return torch.stack((codes & (2**self.bits - 1), codes >> self.bits), dim=-1).flatten(-2)


E4M3 = Element("e4m3", 4, -6, 448.0, torch.float8_e4m3fn, bits=8, nan=0x7F)
E2M1 = Element("e2m1", 2, 0, 6.0, torch.uint8, bits=4, nan=None)


@cache
def _table(element: Element, device: torch.device) -> Tensor:
    return torch.tensor(element.values, dtype=torch.float64, device=device)


@cache
def _codes_by_upper_bits(
    element: Element,
    saturate: bool,  # noqa: FBT001
    code_of_nan: CodeOfNan,
    ties: Ties,
) -> NDArray[np.uint8]:
    """The code of every float32: by sign, exponent, one bit more than the mantissa, and whether a lower one is set."""
    below = element._below
    upper = np.arange(1 << (32 - below), dtype=np.uint32) << np.uint32(below)
    values = torch.from_numpy(np.stack((upper, upper | np.uint32(1)), axis=-1).view(np.float32))
    return np.asarray(_encode_bits(element, values, saturate, code_of_nan, ties).numpy().reshape(-1))


@cache
def _codes_on(device: torch.device, element: Element, saturate: bool, code_of_nan: CodeOfNan, ties: Ties) -> Tensor:  # noqa: FBT001
    return torch.from_numpy(_codes_by_upper_bits(element, saturate, code_of_nan, ties)).to(device)


def _look_up_torch(table: Tensor, x: Tensor, below: int) -> Tensor:
    """The same index where there are no unsigned shifts: a mask stands in for them."""
    bits, upper = x.contiguous().view(torch.int32), (1 << (32 - below)) - 1
    index = (((bits + ((1 << below) - 1)) >> below) & upper) + ((bits >> below) & upper)
    return table[index]


def _encode_bits(
    element: Element,
    x: Tensor,
    saturate: bool,  # noqa: FBT001
    code_of_nan: CodeOfNan,
    ties: Ties,
) -> Tensor:
    drop = 24 - element.precision
    bits = x.contiguous().view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + tie_addend(magnitude, drop, ties)) >> drop) - (
        (126 + element.emin) << (element.precision - 1)
    )
    tiny = nearest_whole(x.abs().clamp_(max=2.0**element.emin) / element.quantum, ties)
    least_normal = (127 + element.emin) << 23
    code = torch.where(magnitude >= least_normal, normal, tiny.nan_to_num(0).to(torch.int32))
    code = torch.where(code > element.largest_code, element._beyond(saturate=saturate), code)
    code = torch.where(bits < 0, code | element.sign, code)
    return torch.where(magnitude > 0x7F800000, element._of_nan(code_of_nan), code).to(torch.uint8)
