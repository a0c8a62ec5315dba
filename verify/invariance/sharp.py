"""Rows whose norm shows one rounding more or less in the sum of squares.

A number of bf16 hides a change of 2^-24. But an element whose norm t * r * w lies at the midpoint of two numbers of its
format is rounded up or down by it. So a reciprocal root r is taken for which some products t * w lie there, on either
side, and these products are put into the row. One large element makes every addition on its way round at the place of
the last bit of the sum; the others are Gaussian, and a few small ones fill the sum up to what makes r the root.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fusecheck.formats.binary import Format

NEAR = 2.0**-23.5
"""A norm so near to a midpoint, as a share of itself, shows a step or two of float32."""

FILLERS = 8
"""Elements that fill up the sum of squares; each leaves about 2^-7 of what was missing."""

LARGEST = 1.0
"""Of `hidden`, the square of the large element: the sum is a little larger, with no power of two in between."""

ROOTS, WEIGHTS = 384, 32
"""How many roots just below 1 are looked at, and how many different weights."""


def sharpened(base: Tensor, weight: Tensor, eps: float, form: Format, number: int) -> Tensor:
    """The row `base` with some elements replaced.

    Args:
        base: Gaussian, [hidden], native.
        weight: gamma plus the weight bias, [hidden], float32.
        eps: added to the mean of squares.
        form: the activations' format.
        number: of the row; neighbouring ones have roots of their own.

    Returns:
        [hidden], native, on the device of `base`.
    """
    device, hidden = base.device, len(base)
    base, weight = base.cpu().double(), weight.cpu().double()
    weights, inverse = torch.unique(weight, return_inverse=True)
    roots = _roots(tuple(weights[:: max(1, len(weights) // WEIGHTS)].tolist()), form)
    root = roots[number % len(roots)]
    wanted = hidden * (root**-2 - eps)
    row = (
        (base * (0.25 * (wanted - LARGEST * hidden) / base.square().sum().clamp(min=1e-30)).sqrt())
        .to(form.dtype)
        .double()
    )
    apart, significand = (each[inverse] for each in _nearest(weights * root, form))
    fillers = list(range(0, hidden, max(2, hidden // FILLERS)))[:FILLERS]
    sharp = apart.abs() < NEAR
    sharp[fillers] = False
    sharp &= sharp.cumsum(0) <= hidden // 16
    placed = torch.copysign(significand * torch.exp2(torch.floor(torch.log2(row.abs().clamp(2.0**-5, 0.2)))), row)
    row = torch.where(sharp, placed, row)
    row[fillers] = 0
    rest = ~sharp
    rest[fillers] = False
    free = rest.nonzero()[:, 0].tolist()
    large = free.pop((number * 977 + 5) % len(free))
    row[large] = _above((LARGEST * hidden) ** 0.5, form)
    while (missing := wanted - float(row.square().sum())) < 0:
        row[free] = row[free] / 2  # exact; only where what was put in outweighs the sum
        row = torch.where(sharp, row / 2, row)
    for column in fillers:
        row[column] = _below(max(missing, 0.0) ** 0.5, form)
        missing -= float(row[column]) ** 2
    return row.to(form.dtype).to(device)


def _below(value: float, form: Format) -> float:
    """The largest number of the format that is not above a value of at least 0."""
    rounded = torch.tensor(value, dtype=torch.float64).to(form.dtype)
    if float(rounded) > value:
        rounded = (rounded.view(torch.int16) - 1).view(form.dtype)
    return float(rounded)


def _above(value: float, form: Format) -> float:
    """The smallest number of the format that is above a value of at least 0."""
    below = torch.tensor(_below(value, form), dtype=form.dtype)
    return float((below.view(torch.int16) + 1).view(form.dtype))


@lru_cache(maxsize=16)
def _roots(weights: tuple[float, ...], form: Format) -> list[float]:
    """Roots just below 1 for which products lie at midpoints, the best first: near ones on either side."""
    roots = 0.97 - torch.arange(ROOTS, dtype=torch.float64) * 2.0**-14 * 1.0009765625
    roots = roots.float().double()
    scores = []
    for root in roots:
        apart, _ = _nearest(torch.tensor(weights, dtype=torch.float64) * root, form)
        near = apart[apart.abs() < NEAR]
        scores.append(min(int((near >= 0).sum()), int((near <= 0).sum())) + 0.01 * len(near))
    order = sorted(range(ROOTS), key=lambda each: -scores[each])
    return [float(roots[each]) for each in order[:64]]


def _nearest(factor: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """For each factor the significand in [1, 2) that brings the product nearest to a midpoint, and how near.

    Returns:
        The distance, as a share of the product and with its sign; the significand.
    """
    steps = 2 ** (form.precision - 1)
    significands = 1 + torch.arange(steps, dtype=torch.float64) / steps
    product = torch.frexp((factor[:, None] * significands).abs()).mantissa * 2.0**form.precision
    apart = ((product - product.floor()) - 0.5) / product
    which = apart.abs().argmin(-1, keepdim=True)
    return apart.gather(-1, which)[:, 0], significands[which[:, 0]]
