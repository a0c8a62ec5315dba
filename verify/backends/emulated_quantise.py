"""How the emulated kernel makes scales and codes, one overridable method a step, for any quantiser and declaration.

Steps: amax, quotient, store (to the scale as it is stored), factor (from it), scaled, cast. They compute in float32 as
the kernels do, with truncation where a division or a reciprocal need not be correctly rounded. Nothing here is shared
with the quantisers' own rules, which judge it, but the table of the element and the names of the declaration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fusecheck.formats.element import E4M3, Element
from fusecheck.quantflow import QuantFlow
from fusecheck.quantisers.quantiser import Quantiser

BIAS = 127
"""Of UE8M0: byte e stands for 2^(e - 127), 255 for NaN."""
LEAST_NORMAL = 2.0**-126


def truncated(exact: Tensor) -> Tensor:
    """Float64 to float32 toward zero: within one unit in the last place, exact where that can be."""
    nearest = exact.float()
    beyond = nearest.isfinite() & (nearest.double().abs() > exact.abs())
    return torch.where(beyond, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)


@dataclass(frozen=True)
class Quantising:
    """The quantiser of one call.

    Attributes:
        quantiser: element, groups and layouts.
        rules: the declared arithmetic.
        given: the caller's scale, [1], float32.
        native: the activations' dtype.
        layout: the name of the layout of the scales; empty: the quantiser's first.
    """

    quantiser: Quantiser
    rules: QuantFlow
    given: Tensor
    native: torch.dtype
    layout: str = ""

    @property
    def element(self) -> Element:
        """What a code is."""
        return self.quantiser.element

    @property
    def bytes_stored(self) -> bool:
        """Whether scales are stored in a byte each."""
        return self.quantiser.scale_dtype is torch.uint8

    def run(self, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Scales [rows, groups] as they are stored before packing, and codes [rows, hidden], uint8, one a byte.

        Args:
            norm: [rows, hidden], float32; kept.
        """
        grouped = norm.reshape(len(norm), self.quantiser.groups(norm.shape[-1]), -1)
        amax = self.flushed(self.amax(grouped))
        stored = self.store(self.quotient(amax), amax)
        codes = self.cast(self.scaled(self.flushed(grouped), stored, amax))
        return stored, codes.flatten(-2)

    def flushed(self, x: Tensor) -> Tensor:
        """Without float32 subnormals, where the kernel flushes them."""
        return torch.where(x.abs() < LEAST_NORMAL, 0.0, x) if self.rules.flush else x

    # Memory.

    def allocate(self, tokens: int, hidden: int) -> tuple[Tensor, Tensor]:
        """Room for scales [tokens, groups] and for codes [tokens, hidden], one a byte."""
        dtype = torch.uint8 if self.bytes_stored else torch.float32
        groups = self.quantiser.groups(hidden)
        return torch.zeros(tokens, groups, dtype=dtype), torch.zeros(tokens, hidden, dtype=torch.uint8)

    def lay_out(self, scales: Tensor, hidden: int) -> Tensor:
        """The scales as they are stored: packed or swizzled, with the padding that is declared."""
        layout = self.quantiser.layout(len(scales), hidden, self.rules, self.layout or None)
        room = torch.empty(layout.size * layout.slot.itemsize, dtype=torch.uint8, device=scales.device)
        stored = room.view(layout.dtype)
        stored = stored.as_strided(layout.shape, layout.strides)
        layout.write(scales, stored)
        return stored

    def pack(self, codes: Tensor) -> Tensor:
        """The codes as they are stored: E4M3, or two of four bits in a byte, the even one low."""
        if self.element.per_byte == 1:
            return codes.new_empty(codes.shape).copy_(codes).view(torch.float8_e4m3fn)
        pairs = codes[:, ::2] | codes[:, 1::2] << 4
        return pairs.new_empty(pairs.shape).copy_(pairs)

    # The scale.

    def amax(self, grouped: Tensor) -> Tensor:
        """The largest magnitude of each group, [rows, groups]; a NaN is met as declared."""
        magnitude = grouped.abs()
        if self.rules.amax_nan == "order":  # `a > b ? a : b` forgets all that came before a NaN
            later = magnitude.isnan().flip(-1).cumsum(-1).flip(-1) > magnitude.isnan()
            return torch.where(later, 0.0, magnitude).amax(-1)
        largest = magnitude.amax(-1)
        if self.rules.amax_nan == "drop":
            return magnitude.nan_to_num(0.0, math.inf).amax(-1)
        return largest.nan_to_num(0.0, math.inf) if self.rules.amax_nan == "bits" else largest

    def quotient(self, amax: Tensor) -> Tensor:
        """The amax over the element's largest value, [rows, groups]."""
        # On the device: torch divides CUDA tensors by a scalar of the CPU through its reciprocal.
        top = torch.tensor(self.element.largest, device=amax.device)
        amax = amax.clamp(min=self.rules.least) if self.rules.least_at == "amax" else amax
        rule = self.rules.scale_rule
        if rule in ("multiply", "rcp"):
            inverse = truncated(top.double().reciprocal()) if rule == "rcp" else top.reciprocal()
            return self.flushed(amax * inverse)
        return self.flushed(truncated(amax.double() / top.double()) if rule == "approx" else amax / top)

    def store(self, quotient: Tensor, amax: Tensor) -> Tensor:
        """The scale as it is stored, [rows, groups], float32 or bytes."""
        rules = self.rules
        if rules.given in ("multiplies", "divides"):
            by = self.given
            value = quotient * by if rules.given == "multiplies" else quotient / by
            return e4m3_bytes(self.flushed(value).clamp(min=rules.least))
        if rules.least_at == "scale":
            quotient = quotient.clamp(min=rules.least)
        if rules.zero_group == "one":
            quotient = torch.where(amax == 0, 1.0, quotient)
        if rules.pow2 == "no":
            return quotient
        byte = self.exponent(quotient, amax)
        if self.bytes_stored:
            return byte.to(torch.uint8)
        value = torch.ldexp(torch.ones_like(quotient), byte - BIAS)
        value = torch.where(byte == 255, torch.where(quotient.isnan(), math.nan, math.inf), value)
        return value.clamp(min=rules.least) if rules.least_at == "after" else value

    def exponent(self, quotient: Tensor, amax: Tensor) -> Tensor:
        """The byte of the power of two, int32."""
        if self.rules.scale_rule == "log2":
            byte = torch.ceil(torch.log2(quotient)).nan_to_num(0, 255, 0).int() + BIAS
        elif self.rules.pow2 == "rceil":
            bits = quotient.view(torch.int32)
            byte = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
        else:
            least = self.rules.least if self.rules.least_at == "amax" else 0.0
            bits = amax.clamp(min=least).view(torch.int32)
            bits = bits + {"ceil": 0x7FFFFF, "floor": 0, "even": 1 << (23 - self.element.precision)}[self.rules.pow2]
            byte = (bits >> 23) - math.frexp(self.element.largest)[1] + 1
        byte = torch.where(amax == math.inf, 255, byte).clamp(0, self.rules.scale_top)
        return torch.where(quotient.isnan(), 255, byte)

    # The codes.

    def scaled(self, grouped: Tensor, stored: Tensor, amax: Tensor) -> Tensor:
        """What the cast reads, [rows, groups, size]."""
        rules = self.rules
        if rules.codes_from == "amax":
            least = amax.clamp(min=rules.least) if rules.least_at == "amax" else amax
            exact = self.element.largest / least.double()
            if rules.code_rule == "approx":
                exact = torch.where(least > 1 / LEAST_NORMAL, 0.0, truncated(exact).double())
            return grouped * exact.float()[..., None]
        if rules.given in ("multiplies", "divides"):
            return self._by_tensor(grouped, stored)
        scale = self.flushed(self.value(stored))
        if rules.code_rule == "approx":
            scaled = truncated(grouped.double() / scale.double()[..., None])
        elif rules.code_rule in ("divide", "either"):
            scaled = grouped / scale[..., None]
        else:
            exact = scale.double().reciprocal()
            scaled = grouped * self.flushed(truncated(exact) if rules.code_rule == "rcp" else exact.float())[..., None]
        if rules.zero_group != "byte0":
            return scaled
        dead = (stored == 0) | (stored == rules.scale_top)  # these kernels set the factor to zero
        return torch.where(dead[..., None], grouped * 0.0, scaled)

    def value(self, stored: Tensor) -> Tensor:
        """The number that a stored scale stands for, float32."""
        if not self.bytes_stored:
            return stored
        top = math.nan if self.rules.amax_nan == "propagate" else math.inf  # made of bits, 255 is an infinity's
        value = torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.to(torch.int32) - BIAS)
        return torch.where(stored == 255, top, value)

    def _by_tensor(self, grouped: Tensor, stored: Tensor) -> Tensor:
        """NVFP4: by the E4M3 scale and the factor of the tensor."""
        scale, given = stored.view(torch.float8_e4m3fn).double(), self.given.double()
        if self.rules.given == "divides":
            return grouped / (scale.float() * self.given)[..., None]
        if self.rules.code_rule == "rcp":
            factor = truncated((scale.float() * truncated(given.reciprocal())).double().reciprocal())
        else:
            exact = given / scale
            factor = truncated(exact) if self.rules.code_rule == "approx" else exact.float()
        return grouped * torch.where(scale == 0, 0.0, factor)[..., None]

    def cast(self, scaled: Tensor) -> Tensor:
        """The codes, uint8, one a byte."""
        element, rules = self.element, self.rules
        midpoints = torch.tensor(element.midpoints[: element.largest_code], dtype=torch.float32, device=scaled.device)
        magnitude = scaled.abs()
        below = torch.searchsorted(midpoints, magnitude.contiguous())
        above = torch.searchsorted(midpoints, magnitude.contiguous(), right=True)
        chosen = {"even": torch.where(below % 2 == 0, below, above), "away": above, "toward_zero": below}[rules.ties]
        codes = torch.where(torch.signbit(scaled), chosen | element.sign, chosen)
        nan = {"nan": element.nan or element.largest_code, "+max": element.largest_code}
        spoilt = nan.get(rules.code_of_nan, element.largest_code | element.sign)
        return torch.where(scaled.isnan(), spoilt, codes).to(torch.uint8)


def e4m3_bytes(x: Tensor) -> Tensor:
    """E4M3 bytes of non-negative float32, saturating; a NaN stays one."""
    return x.clamp(max=E4M3.largest).to(torch.float8_e4m3fn).view(torch.uint8)
