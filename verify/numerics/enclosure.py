"""Enclosures in float64: intervals that contain every value a conforming kernel may hold.

Lemma numbers are those of the criterion: L0 monotone rounding, L1 float32 sums in any order, L2 native sums in
any order, L3 the exactness certificate, L4 the sum of squares, L5 the reciprocal root, L6 normalise and scale.
All functions work on any shape and device; `lo` and `hi` are float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusecheck.dataflow import Dataflow
from fusecheck.formats.binary import FP32, Format, round_to, trailing_unit, truncate_to, ulp
from fusecheck.numerics import sums

U = 2.0**-24
"""Unit roundoff of float32."""
TINY = 2.0**-125
"""Absolute slack of a product: covers gradual underflow and flush-to-zero (A2)."""
SLACK = 2.0**-48
"""Relative error of this module's own float64 arithmetic (A6)."""
RSQRT = 5 * U
"""Reciprocal root within 2 ulp of the correctly rounded one (A3)."""
QUOTIENT = 5 * U
"""A division within 2 ulp of the correctly rounded one; also a reciprocal within 1 ulp and a product (A4)."""
TRUNCATION = 2.0
"""Toward zero an addition errs by up to two units of what it errs by to nearest (G9)."""

Interval = tuple[Tensor, Tensor]


def is_power_of_two(x: float) -> bool:
    """Whether |x| is one, negative exponents included."""
    return math.isfinite(x) and math.frexp(x)[0] in (0.5, -0.5)


def gamma_factor(count: float) -> float:
    """gamma_k = k u / (1 - k u)."""
    return count * U / (1 - count * U)


def kappa(flow: Dataflow, hidden: int) -> float:
    """Relative error of the sum of squares (L4): gamma_H in any order, gamma_(D+1) at depth D."""
    return gamma_factor(hidden if flow.depth is None else min(hidden, flow.depth + 1))


def sum_ends(partials: Tensor, flow: Dataflow, fmt: Format) -> Interval:
    """The rank sum in any order, as the dataflow rounds it. `partials` is [world_size, ...] float64."""
    total = sums.sum_to_odd(list(partials))
    magnitude = partials.abs().sum(0)
    grid = trailing_unit(partials).amin(0)
    units = 1.0 if flow.sum_rounding == "nearest" else TRUNCATION
    if flow.accumulate == "exact" or len(partials) <= 2:  # one rounding, and that is the last
        error = torch.zeros_like(total)
    elif flow.accumulate == "fp32":
        error = torch.where(magnitude <= 2.0**24 * grid, 0.0, gamma_factor(units * (len(partials) - 1)) * magnitude)
    else:
        error = torch.where(magnitude <= 2.0**fmt.precision * grid, 0.0, _native_error(partials, fmt, units))
    error = error + torch.where(error > 0, SLACK * magnitude, 0.0)
    if flow.flush_subnormals and flow.sum_flushes:
        error = error + torch.where(magnitude < 2.0**-100, len(partials) * 2 * 2.0**-126, 0.0)
    error = torch.where(total.isfinite(), error, 0.0)  # an infinity or NaN among the addends stands for itself
    ends = total - error, total + error
    if flow.accumulate != "native":
        ends = _rounded(ends, flow, FP32)
    if flow.round_sum or flow.accumulate == "native":
        ends = _rounded(ends, flow, fmt)
    if flow.accumulate == "exact" or len(partials) <= 2:
        return ends
    if flow.sum_rounding == "nearest":
        beyond = overflow(FP32 if flow.accumulate == "fp32" else fmt)
        up = total.isfinite() & (partials.clamp(min=0).sum(0) + error >= beyond)
        down = total.isfinite() & (partials.clamp(max=0).sum(0) - error <= -beyond)
        return ends[0].masked_fill(down, -torch.inf), ends[1].masked_fill(up, torch.inf)
    # Toward zero a partial sum that overflows is the largest number, and the next addends start from there.
    overflows = total.isfinite() & (magnitude > fmt.largest)
    return ends[0].masked_fill(overflows, -torch.inf), ends[1].masked_fill(overflows, torch.inf)


def _rounded(ends: Interval, flow: Dataflow, fmt: Format) -> Interval:
    """Ends of a sum after one of its roundings (L0)."""
    if flow.sum_rounding == "nearest":
        return round_to(ends[0], fmt), round_to(ends[1], fmt)
    lo, hi = truncate_to(ends[0], fmt), truncate_to(ends[1], fmt)
    if flow.sum_rounding == "truncate":
        return lo, hi
    return torch.minimum(lo, round_to(ends[0], fmt)), torch.maximum(hi, round_to(ends[1], fmt))


def _native_error(partials: Tensor, fmt: Format, units: float) -> Tensor:
    """L2: |computed - exact| of a sum whose every addition is rounded to `fmt`, in any order, by so many half units."""
    ordered = partials.sort(0).values
    low, high = ordered.cumsum(0), ordered.flip(0).cumsum(0)
    error, peak = torch.zeros_like(partials[0]), torch.zeros_like(partials[0])
    for leaves in range(1, len(partials)):
        node = torch.maximum(high[leaves].abs(), low[leaves].abs())
        peak = node if leaves + 1 == len(partials) else torch.maximum(peak, node)
        bound = peak + error
        error = error + units * (0.5 * ulp(bound * (1 + 2 * U), fmt) + U * bound)
    return error


def _add_outward(a: Tensor, b: Tensor, side: int) -> Tensor:
    """A + b, moved outward only where that float64 addition is inexact."""
    total, error = sums.two_sum(a, b)
    return torch.where(error.isnan() | (error == 0), total, total + side * 2.0**-52 * total.abs())


def stream_ends(total: Interval, residual: Tensor, flow: Dataflow, fmt: Format) -> Interval:
    """What the norm reads, before conditioning: the sum plus the residual, rounded as declared (L0)."""
    lo = round_to(_add_outward(total[0], residual, -1), FP32)
    hi = round_to(_add_outward(total[1], residual, +1), FP32)
    if flow.flush_subnormals:
        small = 2.0**-126
        lo = torch.where((lo > 0) & (lo < small), 0.0, torch.where((lo < 0) & (lo > -small), 0.0, lo))
        hi = torch.where((hi > 0) & (hi < small), 0.0, torch.where((hi < 0) & (hi > -small), 0.0, hi))
    if flow.norm_reads_rounded:
        lo, hi = round_to(lo, fmt), round_to(hi, fmt)
    return lo, hi


def overflow(fmt: Format) -> float:
    """The least number that rounds to an infinity: half a unit beyond the largest."""
    return fmt.largest + 2.0 ** (math.floor(math.log2(fmt.largest)) - fmt.precision)


def preimage(rounded: Tensor, fmt: Format) -> Interval:
    """The values that round to `rounded`: to an infinity all from the overflow threshold on; a NaN is itself."""
    outward = torch.where(rounded.isfinite(), 0.5 * ulp(rounded, fmt), 0.0)
    mantissa, _ = torch.frexp(rounded)
    halved = (mantissa.abs() == 0.5) & (rounded.abs() > 2.0**fmt.emin)  # below a power of two the grid is finer
    inward = torch.where(halved, 0.5 * outward, outward)
    negative = rounded < 0
    lo, hi = rounded - torch.where(negative, outward, inward), rounded + torch.where(negative, inward, outward)
    beyond = overflow(fmt)
    return torch.where(rounded == torch.inf, beyond, lo), torch.where(rounded == -torch.inf, -beyond, hi)


def squares_ends(stream: Interval, flow: Dataflow, fmt: Format) -> Interval:
    """The exact sum of squares per row, [..., 1], over the stream's interval; squares rounded if declared."""
    lo, hi = stream
    least = torch.where((lo <= 0) & (hi >= 0), 0.0, torch.minimum(lo * lo, hi * hi))
    most = torch.maximum(lo * lo, hi * hi)
    if flow.round_squares:
        least, most = round_to(round_to(least, FP32), fmt), round_to(round_to(most, FP32), fmt)
    elif not flow.scaled_squares and bool((most > FP32.largest).any()):
        least, most = round_to(least, FP32), round_to(most, FP32)  # an overflowing square is infinite
    return least.sum(-1, keepdim=True), most.sum(-1, keepdim=True)


def mean_error(flow: Dataflow, hidden: int) -> float:
    """Relative error of v / H (L5): two roundings where 1 / H is rounded, or a division within 2 ulp."""
    exact = flow.mean_rule == "exact" or (flow.exact_pow2 and is_power_of_two(hidden))
    return gamma_factor(2) if exact else QUOTIENT


def mean_ends(squares: Interval, hidden: int, eps: float, flow: Dataflow) -> Interval:
    """V / H + eps as float32 holds it, from the exact sum of squares v (L4, and the first half of L5).

    What underflows in a row that was scaled is below hidden * 2^-125 of the sum, and so within SLACK.
    """
    relative, divided = kappa(flow, hidden), mean_error(flow, hidden)
    least = (squares[0] * (1 - relative) * (1 - SLACK) - hidden * TINY).clamp(min=0.0)
    most = squares[1] * (1 + relative) * (1 + SLACK) + hidden * TINY
    if not flow.scaled_squares:
        most = torch.where(most > FP32.largest * (1 + U), torch.inf, most)
        least = torch.where(least > FP32.largest * (1 + U), torch.inf, least)
    low = (least / hidden * (1 - divided) + eps * (1 - U)) * (1 - U)
    high = (most / hidden * (1 + divided) + eps * (1 + U)) * (1 + U)
    return low, high


def root_ends(squares: Interval, hidden: int, eps: float, flow: Dataflow) -> Interval:
    """rsqrt(v / H + eps), L4 and L5."""
    low, high = mean_ends(squares, hidden, eps, flow)
    return (1 - RSQRT) * high.rsqrt(), (1 + RSQRT) * low.rsqrt()


def widen(lo: Tensor, hi: Tensor, relative: float | Tensor) -> Interval:
    """Outward by a relative error and an underflow; an end that is zero or infinite stays."""
    low, high = lo - relative * lo.abs() - TINY, hi + relative * hi.abs() + TINY
    return torch.where((lo == 0) | lo.isinf(), lo, low), torch.where((hi == 0) | hi.isinf(), hi, high)


def corners(lo: Tensor, hi: Tensor, low_factor: Tensor, high_factor: Tensor) -> Interval:
    """The product of an interval and an interval of one sign or both."""
    products = torch.stack((lo * low_factor, lo * high_factor, hi * low_factor, hi * high_factor))
    return products.amin(0), products.amax(0)


def norm_ends(stream: Interval, root: Interval, factor: Tensor, flow: Dataflow, fmt: Format) -> Interval:
    """T * r * gamma before the last rounding (L6). `factor` is the float32 weight, float64 here."""
    lo, hi = corners(*stream, *root)
    if not flow.round_normed:
        return widen(*corners(lo, hi, factor, factor), 2.01 * U)
    lo, hi = widen(lo, hi, 1.01 * U)
    lo, hi = corners(round_to(lo, fmt), round_to(hi, fmt), factor, factor)
    exact = round_to(factor, fmt) == factor  # two native numbers have an exact product in float32
    return widen(lo, hi, torch.where(exact, 0.0, 1.01 * U))
