"""From a group's elements to its scale: the amax, the quotient by the element's largest value, the power of two.

A nominal value and the ends of an enclosure go through the same monotone steps; only the quotient, which may be
approximate, differs. So the nominal lies inside (G1, G3).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fusecheck.formats import ue8m0
from fusecheck.formats.binary import FP32, round_to
from fusecheck.formats.element import Element
from fusecheck.numerics.enclosure import QUOTIENT, SLACK, TINY, Interval, U, widen
from fusecheck.numerics.nominal import flush
from fusecheck.quantflow import QuantFlow

RECIPROCAL = 2 * U
"""An approximate reciprocal, within one unit in the last place of the correctly rounded one (A4)."""
LOGARITHM = 2.0**-16
"""What two units in the last place of a logarithm below 128 come to in its power of two."""


def in_groups(x: Tensor, groups: int) -> Tensor:
    """[..., groups * k] as [..., groups, k]."""
    return x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)


def peaks(norm: Tensor, groups: int) -> Tensor:
    """The largest magnitude of each group, [..., groups], in the dtype of `norm`; NaN where there is one.

    By bits: without the sign they are in the order of the magnitudes, and those of a NaN beyond an infinity's.
    """
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[norm.element_size()]
    bits = norm.view(whole) & torch.iinfo(whole).max
    return in_groups(bits, groups).amax(-1).view(norm.dtype)


def amax(norm: Tensor, groups: int, flow: QuantFlow, known: Tensor | None = None) -> Tensor:
    """The largest magnitude of each group, [..., groups], in the dtype of `norm`; NaN as the flow declares.

    `known` spares finding the `peaks` again.
    """
    largest = peaks(norm, groups) if known is None else known
    spoilt = largest.isnan()
    if flow.amax_nan in ("propagate", "order") or not bool(spoilt.any()):
        return largest
    if flow.amax_nan == "bits":  # a NaN wins, and loses against the least scale
        return torch.where(spoilt, 0.0, largest)
    dropped = in_groups(norm, groups).abs().nan_to_num(0.0, torch.inf).amax(-1)
    return torch.where(spoilt, dropped, largest)


def amax_ends(norm: Interval, groups: int, flow: QuantFlow) -> Interval:
    """Ends of the amax over elements in intervals, float64, [..., groups] each (G7)."""
    lo, hi = norm
    least = torch.where((lo <= 0) & (hi >= 0), 0.0, torch.minimum(lo.abs(), hi.abs()))
    if flow.amax_nan != "order":
        return amax(least, groups, flow), amax(torch.maximum(lo.abs(), hi.abs()), groups, flow)
    dropping = replace(flow, amax_nan="drop")
    low, high = amax(least, groups, dropping), amax(torch.maximum(lo.abs(), hi.abs()), groups, dropping)
    return torch.where(in_groups(lo, groups).isnan().any(-1), 0.0, low), high  # a NaN hides what came before it


def quotient(largest: Tensor, top: float, flow: QuantFlow) -> Tensor:
    """The amax over the element's largest value by the declared rule, float32."""
    limit = torch.tensor(top, dtype=torch.float32, device=largest.device)
    return largest * (1 / limit) if flow.scale_rule in ("multiply", "rcp") else largest / limit


def quotient_ends(largest: Interval, top: float, flow: QuantFlow) -> Interval:
    """The same over an interval of float32 values, float64 in and out."""
    rule = flow.scale_rule
    if rule in ("multiply", "rcp"):
        inverse = float(np.float32(1) / np.float32(top))
        slack = RECIPROCAL if rule == "rcp" else 0.0
        ends = largest[0] * (inverse * (1 - slack)), largest[1] * (inverse * (1 + slack))
    else:
        ends = largest[0] / top, largest[1] / top
        if rule in ("approx", "log2"):
            ends = widen(*ends, QUOTIENT if rule == "approx" else LOGARITHM)
    return round_to(ends[0], FP32).clamp(min=0.0), round_to(ends[1], FP32)


def read_amax(largest: Tensor, flow: QuantFlow) -> Tensor:
    """The amax as the quotient reads it: float32, flushed, and not below the least, where that bounds it."""
    value = largest.to(torch.float32)
    value = flush(value) if flow.flush else value
    return value.clamp(min=flow.least) if flow.least_at == "amax" else value


def finish(scale: Tensor, largest: Tensor, element: Element, flow: QuantFlow, *, bytes_stored: bool) -> Tensor:
    """From the quotient (float32) to the scale as stored, float32 or uint8; monotone in both arguments.

    Args:
        scale: the quotient, [..., groups].
        largest: the amax that it was made of, float32.
        element: its largest exponent is what `ceil`, `floor` and `even` take off.
        flow: the declared arithmetic.
        bytes_stored: whether exponents are stored as UE8M0.
    """
    scale = flush(scale) if flow.flush else scale
    if flow.least_at == "scale":
        scale = scale.clamp(min=flow.least)
    if flow.zero_group == "one":
        scale = torch.where(largest == 0, 1.0, scale)
    if flow.pow2 == "no":
        return scale
    byte = _exponent(scale, largest, element, flow)
    byte = torch.where(largest.isinf(), ue8m0.NAN, byte).clamp(0, flow.scale_top)
    byte = torch.where(scale.isnan(), ue8m0.NAN, byte)
    if bytes_stored:
        return byte.to(torch.uint8)
    power = torch.where(byte == ue8m0.NAN, torch.where(scale.isnan(), torch.nan, torch.inf), _power(byte))
    return power.clamp(min=flow.least) if flow.least_at == "after" else power


def _exponent(scale: Tensor, largest: Tensor, element: Element, flow: QuantFlow) -> Tensor:
    if flow.pow2 == "rceil":
        return ue8m0.ceil(scale)
    offset = int(np.frexp(element.largest)[1]) - 1
    if flow.pow2 == "ceil":
        return ue8m0.ceil(largest) - offset
    if flow.pow2 == "floor":
        return ue8m0.floor(largest) - offset
    return ue8m0.even(largest, element.precision) - offset


def _power(byte: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(byte, dtype=torch.float32), byte - ue8m0.BIAS)


def is_power(scale: Tensor) -> Tensor:
    """Which float32 are powers of two, infinity among them."""
    mantissa, _ = torch.frexp(scale)
    return (mantissa == 0.5) | (scale == torch.inf)


def largest_of(stored: Interval, top: float, flow: QuantFlow) -> Interval:
    """The amax that an exactly known scale leaves possible, from the ends of the quotient that it was made of."""
    slack = {"approx": QUOTIENT, "log2": LOGARITHM, "rcp": RECIPROCAL}.get(flow.scale_rule, 0.0) + 1.01 * U
    low, high = stored[0] * top * (1 - slack) - TINY, stored[1] * top * (1 + slack) + TINY
    return torch.where(stored[0] <= flow.least, 0.0, low).clamp(min=0.0), high


def narrowed_root(root: Interval, peak: Interval, largest: Interval) -> Interval:
    """The reciprocal root of a row that the kernel did not return, given the scale that it did (G6).

    The scale came from the amax, and the amax is `peak` times the root: so the root cancels from every quotient, and
    what is left does not hang on the length of the row or the order of its sum.

    Args:
        root: its enclosure from the row, float64, [..., 1] each.
        peak: ends of the largest |t * gamma| of the row, [..., 1] each; equal where the stream was observed.
        largest: the amax that the stored scale leaves possible, [..., 1] each.
    """
    slack = 2.01 * U + SLACK
    low, high = largest[0] / peak[1] * (1 - slack), largest[1] / peak[0] * (1 + slack)
    low, high = torch.maximum(root[0], low), torch.minimum(root[1], high)
    known = (peak[0] > 0) & (largest[0] > 0) & (low <= high)  # a wrong scale says nothing of the root
    return torch.where(known, low, root[0]), torch.where(known, high, root[1])
