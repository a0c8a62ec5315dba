"""Faults of quantisers that make their scales: amax, scale, factor, cast, layout. One hook of `Quantising` each."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from fusecheck.backends.emulated_arithmetic import Arithmetic
from fusecheck.backends.emulated_quantise import BIAS, Quantising
from fusecheck.interface import RankOutputs
from fusecheck.quantflow import LEAST_OF_TOKEN

# The amax.


class PerTensor(Quantising):
    """One amax for all rows and groups of a block, where each has its own."""

    def amax(self, grouped: Tensor) -> Tensor:
        """The largest of all."""
        own = super().amax(grouped)
        return own.amax().expand_as(own)


class WrongAxis(Quantising):
    """The amax of a column over the rows, where that of a row is meant."""

    def amax(self, grouped: Tensor) -> Tensor:
        """Of the column that has the row's number."""
        own = super().amax(grouped)
        columns = grouped.abs().amax(0).flatten()
        return columns[torch.arange(own.numel()) % columns.numel()].reshape(own.shape)


class OwnSlice(Quantising):
    """The amax of the slice that one rank owns."""

    def amax(self, grouped: Tensor) -> Tensor:
        """Of the first half of the row."""
        return super().amax(grouped[..., : grouped.shape[-1] // 2])


# The scale.


class Uses224(Quantising):
    """The largest value of the FNUZ flavour that is safe, 224, where E4M3's is 448."""

    def quotient(self, amax: Tensor) -> Tensor:
        """Over 224."""
        return super().quotient(amax) * 2


class CeilsLogarithm(Quantising):
    """The exponent is the ceiling of an approximate logarithm, which lands above a power of two."""

    def exponent(self, quotient: Tensor, amax: Tensor) -> Tensor:
        """One more where the quotient is a power of two."""
        exact = (quotient.view(torch.int32) & 0x7FFFFF) == 0
        return (super().exponent(quotient, amax) + (exact & (amax > 0))).clamp(max=self.rules.scale_top)


class FloorsExponent(Quantising):
    """The exponent is the quotient's, cut off where the ceiling is declared."""

    def exponent(self, quotient: Tensor, amax: Tensor) -> Tensor:
        """The exponent bits."""
        return (super().exponent(quotient, amax) - ((quotient.view(torch.int32) & 0x7FFFFF) != 0).int()).clamp(min=0)


class RoundsExponent(Quantising):
    """The exponent is the nearest one, so that the largest values of about half of the groups clip."""

    def exponent(self, quotient: Tensor, amax: Tensor) -> Tensor:
        """Up from the square root of two."""
        lower = ((quotient.view(torch.int32) & 0x7FFFFF) < 0x3504F3) & (quotient.view(torch.int32) & 0x7FFFFF > 0)
        return (super().exponent(quotient, amax) - lower.int()).clamp(min=0)


class RoundsExponentAt175(Quantising):
    """The exponent goes up from 1.75 * 2^k on, and maxima between 1.5 and 1.75 still clip."""

    def exponent(self, quotient: Tensor, amax: Tensor) -> Tensor:
        """The rule named EVEN."""
        even = replace(self, rules=replace(self.rules, pow2="even"))
        return Quantising.exponent(even, quotient, amax)


class ForgetsTheElement(Quantising):
    """The exponent of the amax itself: the largest exponent of the element is not taken off."""

    def exponent(self, quotient: Tensor, amax: Tensor) -> Tensor:
        """The exponent bits of the amax."""
        return (amax.view(torch.int32) >> 23).clamp(0, self.rules.scale_top)


class RoundsScaleTwice(Quantising):
    """The quotient goes through bf16 before it becomes a power of two."""

    def exponent(self, quotient: Tensor, amax: Tensor) -> Tensor:
        """Of the rounded quotient."""
        return super().exponent(quotient.to(torch.bfloat16).float(), amax)


class LeastAfterwards(Quantising):
    """The least scale bounds the power of two, so that the scale is none."""

    def store(self, quotient: Tensor, amax: Tensor) -> Tensor:
        """At least 1 / (448 * 512)."""
        return super().store(quotient, amax).clamp(min=LEAST_OF_TOKEN)


class NoLeastScale(Quantising):
    """A row of zeros has the scale zero, and 0 / 0 in its codes."""

    def store(self, quotient: Tensor, amax: Tensor) -> Tensor:
        """Zero for zeros."""
        stored = super().store(quotient, amax)
        return torch.where(amax == 0, torch.zeros_like(stored), stored)

    def scaled(self, grouped: Tensor, stored: Tensor, amax: Tensor) -> Tensor:
        """NaN for zeros."""
        return torch.where((amax == 0)[..., None], torch.nan, super().scaled(grouped, stored, amax))


class RoundsStoredScale(Quantising):
    """What is stored is the scale in bf16; the codes were made with the scale itself."""

    def run(self, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Round at the end."""
        stored, codes = super().run(norm)
        return stored.to(torch.bfloat16).to(stored.dtype), codes


class TakesSentinel(Quantising):
    """On the first call the scale is what stands for `not yet known`."""

    called: ClassVar[bool] = False

    def store(self, quotient: Tensor, amax: Tensor) -> Tensor:
        """Minus one, once."""
        stored = super().store(quotient, amax)
        if type(self).called:
            return stored
        type(self).called = True
        return torch.full_like(stored, -1.0)


class IgnoresGivenFactor(Quantising):
    """The factor of the tensor is never applied to the scale."""

    def store(self, quotient: Tensor, amax: Tensor) -> Tensor:
        """As for a factor of one."""
        return Quantising.store(replace(self, given=torch.ones_like(self.given)), quotient, amax)


class OverflowsScale(Quantising):
    """A scale beyond 448 is cast without clamping, to NaN."""

    def store(self, quotient: Tensor, amax: Tensor) -> Tensor:
        """NaN beyond the largest."""
        value = quotient * self.given if self.rules.given == "multiplies" else quotient / self.given
        return super().store(quotient, amax).masked_fill(value > 464, 0x7F)


class InfiniteFactor(Quantising):
    """A zero scale has an infinite reciprocal, and the codes of zeros are made of 0 * Inf."""

    def scaled(self, grouped: Tensor, stored: Tensor, amax: Tensor) -> Tensor:
        """NaN where the scale is zero."""
        return super().scaled(grouped, stored, amax).masked_fill((stored == 0)[..., None], torch.nan)


# The codes.


class CodesByExactScale(Quantising):
    """The codes are made with the scale before it was rounded up, and do not fit the one that is stored."""

    def scaled(self, grouped: Tensor, stored: Tensor, amax: Tensor) -> Tensor:
        """By the quotient."""
        exact = self.quotient(amax).clamp(min=2.0**-126)
        return grouped / exact[..., None]


class TruncatesToExponent(FloorsExponent, CodesByExactScale):
    """A float32 scale that is no power of two is cut to its exponent when it is stored; the codes are its own."""


class NeighboursScale(Quantising):
    """The group before lends its scale: the memory that holds it is read too early."""

    def scaled(self, grouped: Tensor, stored: Tensor, amax: Tensor) -> Tensor:
        """By the scale of the group before."""
        return super().scaled(grouped, stored.roll(1, -1), amax.roll(1, -1))


class OverflowsTopBinade(Quantising):
    """The greatest exponent is taken for an overflow, so that all of it becomes the largest value."""

    def cast(self, scaled: Tensor) -> Tensor:
        """From 256 on: 448."""
        top = torch.full_like(scaled, self.element.largest).copysign(scaled)
        return super().cast(torch.where(scaled.abs() >= 256, top, scaled))


class CastsThroughBf16(Quantising):
    """The quotient is rounded to bf16 before the cast."""

    def cast(self, scaled: Tensor) -> Tensor:
        """Two roundings."""
        return super().cast(scaled.to(torch.bfloat16).float())


class TiesAway(Quantising):
    """Ties are rounded away from zero where ties to even are declared."""

    def cast(self, scaled: Tensor) -> Tensor:
        """Half up."""
        return Quantising.cast(replace(self, rules=replace(self.rules, ties="away")), scaled)


class InfinityIsNan(Quantising):
    """An infinity becomes the NaN code where saturation is declared."""

    def cast(self, scaled: Tensor) -> Tensor:
        """NaN for what is not finite."""
        return super().cast(scaled).masked_fill(~scaled.isfinite(), 0x7F)


class ReadsUnrounded(Arithmetic):
    """One rounding to bf16 is missing before the quantiser."""

    def quantise(self, normed: Tensor, quantising: Quantising, outputs: RankOutputs) -> None:
        """Read the float32 norm."""
        rules = replace(quantising.rules, reads="unrounded")
        super().quantise(normed, replace(quantising, rules=rules), outputs)


# The layout.


class LeavesPadding(Quantising):
    """Padding that must be zero holds what was there."""

    def lay_out(self, scales: Tensor, hidden: int) -> Tensor:
        """Data only, in memory that was used before."""
        layout = self.quantiser.layout(len(scales), hidden, self.rules, self.layout or None)
        stored = layout.allocate(0x7F)
        layout.slots(stored)[layout.places()] = scales
        return stored


class IgnoresRowPadding(Quantising):
    """The columns of packed scales are as far apart as there are tokens, not as the next multiple of four."""

    def lay_out(self, scales: Tensor, hidden: int) -> Tensor:
        """By another stride."""
        layout = self.quantiser.layout(len(scales), hidden, self.rules, self.layout or None)
        stored = layout.allocate(0)
        token, column = torch.meshgrid(*(torch.arange(n) for n in scales.shape), indexing="ij")
        layout.slots(stored)[4 * ((column // 4) * len(scales) + token) + column % 4] = scales
        return stored


class LeaksIntoNeighbour(Quantising):
    """Of packed scales, a bit of each leaks into the byte before it."""

    def lay_out(self, scales: Tensor, hidden: int) -> Tensor:
        """Pack what is not masked."""
        leaked = scales.clone()
        leaked[:, :-1] |= scales[:, 1:] & 1
        return super().lay_out(leaked, hidden)


class Unswizzled(Quantising):
    """The scales are stored row by row in memory that is read by tiles."""

    def lay_out(self, scales: Tensor, hidden: int) -> Tensor:
        """Linear."""
        layout = self.quantiser.layout(len(scales), hidden, self.rules, self.layout or None)
        stored = layout.allocate(0)
        layout.slots(stored)[: scales.numel()] = scales.flatten()
        return stored


class LosesScales(Quantising):
    """From some number of tokens on the scales are never written."""

    limit: ClassVar[int] = 8

    def lay_out(self, scales: Tensor, hidden: int) -> Tensor:
        """Zeros for more than eight tokens."""
        return super().lay_out(scales * (len(scales) <= self.limit), hidden)


class SpillsRows(Quantising):
    """The kernel writes the rows of a whole tile where the call has fewer."""

    def lay_out(self, scales: Tensor, hidden: int) -> Tensor:
        """Fill the padding rows."""
        stored = super().lay_out(scales, hidden)
        layout = self.quantiser.layout(len(scales), hidden, self.rules, self.layout or None)
        layout.slots(stored)[layout.classes() == 2] = BIAS
        return stored
