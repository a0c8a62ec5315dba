"""A quantiser whose scales come from the largest magnitude of each group; what its kinds have in common.

The nominal value of each step lies in its enclosure by construction: both go through the same monotone steps, and an
interval is only widened. G-numbers are those of the criterion.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fusecheck.errors import UsageError
from fusecheck.formats import ue8m0
from fusecheck.formats.binary import FP32, round_to
from fusecheck.formats.element import Element
from fusecheck.numerics.enclosure import QUOTIENT, Interval, corners, widen
from fusecheck.numerics.nominal import flush, look_up
from fusecheck.quantflow import QuantFlow
from fusecheck.quantisers import scales
from fusecheck.quantisers.layouts import Layout, layout_of

TABLE_PAYS = 2**16
"""Elements from which looking codes up in a table of all native values is cheaper than forming each."""
LARGEST_DIVISOR = 2.0**126
"""Beyond it `div.approx` gives zero, as PTX documents, and `rcp.approx.ftz` flushes its subnormal reciprocal."""
TINIEST = 2.0**-149
"""The least positive float32."""


@dataclass(frozen=True)
class Factor:
    """What the elements of a group are multiplied by, or divided by; every tensor float64, [..., groups].

    Attributes:
        nominal: a float32 value.
        ends: what a conforming kernel may use instead.
        divides: whether it divides.
        slack: the relative error of the operation itself, beyond its rounding.
    """

    nominal: Tensor
    ends: Interval
    divides: bool = False
    slack: Tensor | None = None


@dataclass(frozen=True)
class Scaled:
    """The common arithmetic; arguments and results as `Quantiser` says."""

    name: str
    element: Element
    group: int | None
    scale_dtype: torch.dtype
    layouts: tuple[str, ...]

    def groups(self, hidden: int) -> int:
        """How many scales a row of `hidden` elements has."""
        if self.group is None:
            return 1
        if hidden % self.group:
            raise UsageError(f"hidden={hidden}, expected a multiple of {self.name}'s group of {self.group}")
        return hidden // self.group

    # ------------------------------------------------------------------ scales (G1, G3, G7)

    def scales(self, norm: Tensor, flow: QuantFlow, given: float = 1.0, peaks: Tensor | None = None) -> Tensor:
        """The nominal scales of whole groups, [..., groups]."""
        largest = scales.read_amax(scales.amax(norm, self.groups(norm.shape[-1]), flow, peaks), flow)
        return self._store(scales.quotient(largest, self.element.largest, flow), largest, flow, given)

    def scale_ends(self, norm: Interval, flow: QuantFlow, given: float = 1.0) -> Interval:
        """The least and greatest admissible scale of whole groups, [..., groups] each."""
        return self.scale_ends_of(scales.amax_ends(norm, self.groups(norm[0].shape[-1]), flow), flow, given)

    def scale_ends_of(self, amax: Interval, flow: QuantFlow, given: float = 1.0) -> Interval:
        """The same from ends of the amax, float64, [..., groups] each."""
        low, high = (scales.read_amax(end.to(torch.float32), flow) for end in amax)
        lone = (low == 0) & (high > 0) & (flow.zero_group == "one")  # zero would have a rule of its own
        low = torch.where(lone, TINIEST, low)
        pair = scales.quotient_ends((low.double(), high.double()), self.element.largest, flow)
        lo, hi = (self._store(q.to(torch.float32), a, flow, given) for q, a in zip(pair, (low, high), strict=True))
        one = self._store(torch.zeros_like(low), torch.zeros_like(low), flow, given)
        return torch.where(lone, lo.minimum(one), lo), torch.where(lone, hi.maximum(one), hi)

    def _store(self, quotient: Tensor, largest: Tensor, flow: QuantFlow, given: float) -> Tensor:
        """The scale as stored; NVFP4 brings in the given factor here."""
        stored = self.scale_dtype is torch.uint8
        return scales.finish(quotient, largest, self.element, flow, bytes_stored=stored)

    def admits(self, stored: Tensor, nominal: Tensor, ends: Interval, flow: QuantFlow) -> Tensor:
        """Which stored scales are admissible, bool."""
        lo, hi = ends
        inside = (lo <= stored) & (stored <= hi)
        if stored.dtype is torch.float32 and flow.pow2 != "no":
            inside &= (stored == lo) | (stored == hi) | scales.is_power(stored)
        return inside | (stored.isnan() & nominal.isnan())

    def amax_ends(self, stored: Tensor, flow: QuantFlow, given: float = 1.0) -> Interval:
        """The amax that each stored scale leaves possible, float64."""
        value = self.values(stored, flow)
        if flow.pow2 == "no":
            return scales.largest_of((value, value), self.element.largest, flow)
        if flow.pow2 != "rceil":
            return torch.zeros_like(value), torch.full_like(value, torch.inf)
        return scales.largest_of((value / 2, value), self.element.largest, flow)

    def values(self, stored: Tensor, flow: QuantFlow) -> Tensor:
        """The numbers that stored scales stand for in the kernel, float64, [..., groups]."""
        if stored.dtype is torch.float32:
            return stored.to(torch.float64)
        if flow.amax_nan == "propagate":
            return ue8m0.decode(stored)
        return torch.ldexp(torch.ones_like(stored, dtype=torch.float64), stored.to(torch.int32) - ue8m0.BIAS).where(
            stored != ue8m0.NAN,
            torch.inf,  # made of bits, this exponent is an infinity's
        )

    # ------------------------------------------------------------------ codes (G2, G4, G5)

    def _factor(self, stored: Tensor, flow: QuantFlow, given: float, amax: Interval | None) -> Factor:
        if amax is not None:
            return _factor_of_amax(amax, self.element.largest, flow)
        scale = self.values(stored, flow)
        factor = factor_of_scale(flush(scale) if flow.flush else scale, flow)
        if flow.zero_group != "byte0" or stored.dtype is not torch.uint8:
            return factor
        dead = (stored == 0) | (stored == flow.scale_top)
        zero = torch.where(dead, 0.0, factor.nominal)
        return Factor(zero, (zero, zero))

    def _operand(self, norm: Tensor, flow: QuantFlow) -> Tensor:
        """What is divided or multiplied."""
        return flush(norm) if flow.flush else norm

    def _nominal_factor(self, norm: Tensor, stored: Tensor, flow: QuantFlow, given: float) -> Factor:
        amax = None
        if flow.codes_from == "amax":
            largest = scales.amax(norm, stored.shape[-1], flow)
            amax = largest, largest
        return self._factor(stored, flow, given, amax)

    def quotients(self, norm: Tensor, stored: Tensor, flow: QuantFlow, given: float = 1.0) -> Tensor:
        """What the nominal cast reads, float32, [..., hidden]."""
        factor = self._nominal_factor(norm, stored, flow, given)
        return _by_factor(self._operand(norm.to(torch.float32), flow), factor)

    def quotient_ends(
        self, norm: Interval, stored: Tensor, flow: QuantFlow, given: float = 1.0, amax: Interval | None = None
    ) -> Interval:
        """Ends of what the cast reads, float64, [..., groups * k] each."""
        groups = stored.shape[-1]
        if flow.codes_from == "amax" and amax is None:
            amax = scales.amax_ends(norm, groups, flow)
        factor = self._factor(stored, flow, given, amax if flow.codes_from == "amax" else None)
        least, most = (scales.in_groups(self._operand(end, flow), groups) for end in norm)
        low, high = (end[..., None] for end in factor.ends)
        if factor.divides:
            lo, hi = least / low, most / low
            lo, hi = torch.minimum(lo, hi), torch.maximum(lo, hi)
        else:
            lo, hi = corners(least, most, low, high)
        undefined = (least < most) & lo.isnan()  # 0 times infinity at one end alone
        lo, hi = lo.masked_fill(undefined, -torch.inf), hi.masked_fill(undefined, torch.inf)
        if factor.slack is not None and bool(factor.slack.any()):
            lo, hi = _widened(lo, hi, factor.slack[..., None])
        return round_to(lo.flatten(-2), FP32), round_to(hi.flatten(-2), FP32)

    def codes(self, norm: Tensor, stored: Tensor, flow: QuantFlow, given: float = 1.0) -> Tensor:
        """The nominal codes, uint8, one a byte, [..., hidden]; of many 16-bit numbers by a table of all of them."""
        factor = self._nominal_factor(norm, stored, flow, given)
        scaled = _scaled_exactly(norm, factor, flow) if stored.dtype is torch.uint8 else None
        if scaled is not None:
            return look_up(_cast_table(self.element, flow, norm.dtype, norm.device), scaled)
        wide = norm.to(torch.float32)
        idle = _moderate(factor.nominal, 2.0**-64, 2.0**64)  # what would be flushed becomes the same zero
        return self._cast(_by_factor(wide if idle else self._operand(wide, flow), factor), flow)

    def _cast(self, quotient: Tensor, flow: QuantFlow) -> Tensor:
        return self.element.encode_float32(
            quotient, saturate=flow.saturate, code_of_nan=flow.code_of_nan, ties=flow.ties
        )

    def code_ends(
        self, norm: Interval, stored: Tensor, flow: QuantFlow, given: float = 1.0, amax: Interval | None = None
    ) -> Interval:
        """Ordinals of the least and greatest admissible code, int16."""
        lo, hi = self.quotient_ends(norm, stored, flow, given, amax)
        ends = self._cast(torch.stack((lo, hi)).to(torch.float32), flow)
        low, high = self.element.ordinal(ends)
        return low, high

    # ------------------------------------------------------------------ layout

    def layout(self, tokens: int, hidden: int, flow: QuantFlow, name: str | None = None) -> Layout:
        """Where each scale of a call lies."""
        columns = self.groups(hidden)
        if name is not None and name not in self.layouts:
            raise UsageError(f"layout={name!r}, expected one that {self.name} has: {', '.join(self.layouts)}")
        return layout_of(name or self.layouts[0], tokens, columns, self.scale_dtype, flow)


def _by_factor(norm: Tensor, factor: Factor) -> Tensor:
    """Float32 numbers over or times what the nominal kernel makes of the scales."""
    nominal = factor.nominal.to(torch.float32)[..., None]
    grouped = scales.in_groups(norm, factor.nominal.shape[-1])
    return (grouped / nominal if factor.divides else grouped * nominal).flatten(-2)


def _moderate(by: Tensor, least: float, most: float) -> bool:
    """Whether all are zero or within these."""
    return bool(((by == 0) | ((by >= least) & (by <= most))).all())


def _scaled_exactly(norm: Tensor, factor: Factor, flow: QuantFlow) -> Tensor | None:
    """The norm by its factors in its own 16 bits, where all of them are moderate powers of two; else None.

    A product with one is exact there but for what is far below half of the least code, or beyond the largest.
    """
    if norm.element_size() != 2 or norm.numel() < TABLE_PAYS or flow.pow2 == "no" or flow.codes_from == "amax":
        return None
    by = (1 / factor.nominal if factor.divides else factor.nominal).to(norm.dtype)
    if not _moderate(by, *((2.0**-14, 2.0**15) if norm.dtype is torch.float16 else (2.0**-64, 2.0**64))):
        return None
    return (scales.in_groups(norm, by.shape[-1]) * by[..., None]).flatten(-2)


@lru_cache(maxsize=32)
def _cast_table(element: Element, flow: QuantFlow, native: torch.dtype, device: torch.device) -> Tensor:
    """The code of every native value, [65536] uint8, indexed by the value's 16 bits."""
    values = torch.arange(65536, dtype=torch.int32, device=device).to(torch.int16).view(native).to(torch.float32)
    return element.encode_float32(values, saturate=flow.saturate, code_of_nan=flow.code_of_nan, ties=flow.ties)


def as_float32(x: Tensor) -> Tensor:
    """Float64 rounded to float32 once, float64."""
    return x.to(torch.float32).to(torch.float64)


def reciprocal_ends(inverse: Tensor, scale: Tensor, flow: QuantFlow) -> Interval:
    """An approximate reciprocal, from the correctly rounded one (A4)."""
    slack = torch.where(inverse.isfinite(), _unless_exact(scales.RECIPROCAL, scale, flow), 0.0)
    return inverse * (1 - slack), inverse * (1 + slack)


def _unless_exact(slack: float, divisor: Tensor, flow: QuantFlow) -> Tensor:
    """The slack for each divisor, float64: 0 where an approximate quotient or reciprocal is declared exact."""
    every = torch.full_like(divisor, slack)
    return every.masked_fill(scales.is_power(divisor.abs()), 0.0) if flow.exact_pow2 else every


def quotient_slack(divisor: Tensor, flow: QuantFlow) -> Tensor:
    """The relative error of a division beyond its rounding: none where the rule is exact."""
    if flow.code_rule not in ("approx", "either"):
        return torch.zeros_like(divisor)
    return _unless_exact(QUOTIENT, divisor, flow)


def factor_of_scale(scale: Tensor, flow: QuantFlow) -> Factor:
    """The factor that the declared rule makes of a scale, a float32 value in float64 (G2, G4)."""
    rule = flow.code_rule
    slack = quotient_slack(scale, flow)
    if rule in ("divide", "approx"):
        return Factor(scale, (scale, scale), divides=True, slack=slack)
    inverse = as_float32(1 / scale)
    inverse = flush(inverse) if flow.flush else inverse
    if rule == "rcp":
        return Factor(inverse, reciprocal_ends(inverse, scale, flow))
    if rule == "either":
        return Factor(inverse, (1 / scale, 1 / scale), slack=slack)
    return Factor(inverse, (inverse, inverse))


def _factor_of_amax(amax: Interval, top: float, flow: QuantFlow) -> Factor:
    """The element's largest value over the amax, which an approximate division may miss (G5)."""
    low, high = (scales.read_amax(end.to(torch.float32), flow).double() for end in amax)
    least = as_float32(top / high * (1 - quotient_slack(high, flow)))
    most = as_float32(top / low * (1 + quotient_slack(low, flow)))
    nominal = as_float32(top / low)
    if flow.code_rule == "approx":
        least, most, nominal = (
            each.masked_fill(by > LARGEST_DIVISOR, 0.0) for each, by in ((least, high), (most, low), (nominal, low))
        )
    return Factor(nominal, (least, most))


def _widened(lo: Tensor, hi: Tensor, relative: Tensor) -> Interval:
    """Outward where there is a relative error; what has none stays."""
    low, high = widen(lo, hi, relative)
    return torch.where(relative == 0, lo, low), torch.where(relative == 0, hi, high)
