"""The input families: how a case's activations are made, and the property that each one has.

A family is chosen so that some parameter of the kernel matters (eps, the order of the sum, a lane, the sign of
zero). A case asserts the property it is named for, on the very tensors it ran with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusecheck.inputs import one_special, properties
from fusecheck.inputs.captured import captured, captured_residual
from fusecheck.inputs.cells import Cells, hash64
from fusecheck.inputs.edges import unit_rows
from fusecheck.inputs.properties import Sample

Addend = Callable[[Cells, int, int], Tensor]
"""(cells, rank, world size) -> that rank's partial sums, [rows, hidden]."""

_RESIDUAL, _SHAPE, _PAIR, _POWER, _LANE, _SIGN = 100, 101, 102, 103, 104, 105
"""Streams of random bits; a rank's own stream is its index."""


@dataclass(frozen=True)
class Family:
    """How to make one kind of activations.

    Attributes:
        name: as Problems name it.
        purpose: the property, as a sentence.
        partial: one rank's addend.
        residual: the residual, equal on all ranks.
        holds: the property of a sample; None when it holds, else what was found.
        scales: the kinds of scale that keep the property, keys of `scales.SCALES`.
        gamma: the kind of norm weight that keeps it, without a weight bias; None where any does.
        finite: no NaN, infinity or overflow on the way.
    """

    name: str
    purpose: str
    partial: Addend
    residual: Callable[[Cells], Tensor]
    holds: Callable[[Sample], str | None]
    scales: tuple[str, ...] = ("random", "power", "tie", "amax", "one")
    gamma: str | None = None
    finite: bool = True


def _deviation(world_size: int) -> float:
    """Of one partial, so that the sum over ranks and the residual each have a variance of one half."""
    return float((2 * world_size) ** -0.5)


def _gaussian(cells: Cells, rank: int, world_size: int) -> Tensor:
    return cells.normal(rank, _deviation(world_size))


def _gaussian_residual(cells: Cells) -> Tensor:
    return cells.normal(_RESIDUAL, 0.5**0.5)


def _times(x: Tensor, factor: Tensor) -> Tensor:
    return (x.to(torch.float32) * factor).to(x.dtype)


TINY_EPS = (0.0, 0.01, 1.0, 100.0)
"""Mean squares of the rows of `tiny-rows`, in units of 1e-5, in turn."""


def _tiny_factor(cells: Cells) -> Tensor:
    roots = torch.tensor([(1e-5 * share) ** 0.5 for share in TINY_EPS], device=cells.device)
    return roots[(cells.row + cells.seed) % len(TINY_EPS)]


def _tiny(cells: Cells, rank: int, world_size: int) -> Tensor:
    return _times(_gaussian(cells, rank, world_size), _tiny_factor(cells))


def _tiny_residual(cells: Cells) -> Tensor:
    return _times(_gaussian_residual(cells), _tiny_factor(cells))


def _cancelling(cells: Cells, rank: int, world_size: int) -> Tensor:
    """A pair of ranks, chosen per column, holds +c and -c on top of the Gaussian values; |c| = 2^12 .. 2^24."""
    base = _gaussian(cells, rank, world_size)
    if world_size == 1:
        return base
    first = cells.column_bits(_PAIR) % world_size
    second = (first + 1 + (cells.column_bits(_PAIR) >> 5) % (world_size - 1)) % world_size
    top = 12 if cells.format.precision == 8 else 3
    power = torch.exp2((12 + cells.column_bits(_POWER) % (top + 1)).to(torch.float32))
    offset = torch.where(first == rank, power, torch.where(second == rank, -power, torch.zeros_like(power)))
    return (base.to(torch.float32) + offset).to(base.dtype)


def _exact(cells: Cells, rank: int, world_size: int) -> Tensor:
    """Integers so small that every partial sum is exact in the native format, in any order."""
    most = (1 << cells.format.precision) // (world_size + 1)
    return (cells.uniform(rank) % (2 * most + 1) - most).to(cells.format.dtype)


def _exact_residual(cells: Cells) -> Tensor:
    return (cells.uniform(_RESIDUAL) % 31 - 15).to(cells.format.dtype)


def _native_tie(cells: Cells, rank: int, world_size: int) -> Tensor:
    """Sums in [1, 2) on the native grid, to which the residual adds half a unit in the last place."""
    steps = 1 << (cells.format.precision - 1)
    step = (cells.uniform(rank) % (steps // world_size)).to(torch.float32) / steps
    sign = 1 - 2 * (cells.column_bits(_SIGN) & 1)
    return ((step + (rank == 0)) * sign).to(cells.format.dtype)


def _native_tie_residual(cells: Cells) -> Tensor:
    half = 2.0**-cells.format.precision
    return ((cells.uniform(_RESIDUAL) & 1) * 2.0 * half - half).to(cells.format.dtype)


def _outliers(cells: Cells, rank: int, world_size: int) -> Tensor:
    """Heavy tails (a spread of four binades) and one channel in 128 that is 48 times as large, as in LLMs."""
    tail = torch.exp2((cells.uniform(_SHAPE) % 5 - 2).to(torch.float32))
    channel = torch.where(cells.column_bits(_LANE) % 128 == 0, 48.0, 1.0)
    return _times(_gaussian(cells, rank, world_size), tail * channel)


def _rank_tagged(cells: Cells, rank: int, world_size: int) -> Tensor:
    """Rank r contributes +-(r + 1), the sign drawn per cell: a missing, doubled or stale rank shows."""
    sign = 1 - 2 * (cells.bits(_SIGN) & 1)
    return (sign * (rank + 1)).to(cells.format.dtype)


def _one_hot(cells: Cells, rank: int, world_size: int) -> Tensor:
    """One lane per row, the lanes in a seeded order that visits every lane."""
    stride = next(s for s in (hash64(cells.seed) % cells.hidden | 1, 1) if _visits_all(s, cells.hidden))
    lane = (cells.row * stride + hash64(cells.seed, 7)) % cells.hidden
    height = 1 + (cells.row_bits(rank) % 64).to(torch.float32) / 64
    return torch.where(cells.column == lane, height, 0.0).to(cells.format.dtype)


def _visits_all(stride: int, hidden: int) -> bool:
    return bool(torch.gcd(torch.tensor(stride), torch.tensor(hidden)) == 1)


def _constant(cells: Cells, rank: int, world_size: int) -> Tensor:
    height = 0.5 + (cells.row_bits(rank) % 97).to(torch.float32) / 97
    return height.expand(cells.count, cells.hidden).to(cells.format.dtype).contiguous()


def _constant_residual(cells: Cells) -> Tensor:
    return _constant(cells, _RESIDUAL, 1)


def _negative_zero(cells: Cells, rank: int, world_size: int) -> Tensor:
    """Rows in turn: all -0; pairs (+0, -0); one lane of -0 among Gaussian values; +0 and -0 at random."""
    base = _gaussian(cells, rank, world_size)
    minus = torch.full_like(base, -0.0)
    kind = (cells.row + cells.seed) % 4
    odd = cells.column % 2 == 1
    lane = cells.column == cells.row_bits(_LANE) % cells.hidden
    pairs = torch.where(odd, minus, 0.0)
    some = torch.where((cells.bits(_SIGN) & 1).bool(), minus, 0.0)
    rows = torch.where(kind == 0, minus, torch.where(kind == 1, pairs, some))
    return torch.where(kind == 2, torch.where(lane, minus, base), rows)


def _negative_zero_residual(cells: Cells) -> Tensor:
    base = _gaussian_residual(cells)
    minus = torch.full_like(base, -0.0)
    return torch.where((cells.row + cells.seed) % 4 == 2, base, minus)


def _special(cells: Cells, rank: int, world_size: int) -> Tensor:
    """Rows in turn: clean; one NaN; one +Inf; one -Inf; +Inf on one rank and -Inf on another."""
    base = _gaussian(cells, rank, world_size)
    kind = (cells.row + cells.seed) % 5
    lane = cells.column == cells.row_bits(_LANE) % cells.hidden
    if rank == 0:
        values = torch.tensor([0.0, torch.nan, torch.inf, -torch.inf, torch.inf], device=cells.device)
    else:
        values = torch.tensor([0.0, 0.0, 0.0, 0.0, -torch.inf], device=cells.device)
    put = lane & (kind != 0) & ((rank == 0) | ((rank == 1) & (kind == 4)))
    return torch.where(put, values[kind].to(base.dtype), base)


def _one_special(cells: Cells, rank: int, world_size: int) -> Tensor:
    return one_special.rank_rows(_gaussian(cells, rank, world_size), cells, rank, world_size)


def _one_special_residual(cells: Cells) -> Tensor:
    return one_special.residual_rows(_gaussian_residual(cells), cells)


def _subnormal(cells: Cells, rank: int, world_size: int) -> Tensor:
    """Rows in turn: native subnormals of both signs; the same among Gaussian values."""
    base = _gaussian(cells, rank, world_size)
    top = 1 << (cells.format.precision - 1)
    count = (cells.uniform(rank) % (2 * top - 1) - (top - 1)).to(torch.int16)
    bits = torch.where(count < 0, -count | -(2**15), count)
    small = bits.view(cells.format.dtype)
    some = (cells.bits(_SIGN) & 3) == 0
    return torch.where(((cells.row + cells.seed) % 2 == 0) | some, small, base)


def _subnormal_residual(cells: Cells) -> Tensor:
    return torch.where((cells.row + cells.seed) % 2 == 0, cells.zeros(), _gaussian_residual(cells))


def _overflow(cells: Cells, rank: int, world_size: int) -> Tensor:
    """Rows in turn: clean; one lane whose sum overflows the format; a lane whose square overflows float32."""
    base = _gaussian(cells, rank, world_size)
    kind = (cells.row + cells.seed) % 3
    lane = cells.column == cells.row_bits(_LANE) % cells.hidden
    large = torch.where(kind == 1, 0.75 * cells.format.largest, 2.0**100 if cells.format.precision == 8 else 6e4)
    return torch.where(lane & (kind != 0), large.to(base.dtype), base)


def _overflow_residual(cells: Cells) -> Tensor:
    lane = cells.column == cells.row_bits(_LANE) % cells.hidden
    base = _gaussian_residual(cells)
    large = torch.full_like(base, 0.75 * cells.format.largest)
    return torch.where(lane & ((cells.row + cells.seed) % 3 == 1), large, base)


_ALL = ("random", "power", "tie", "amax", "one", "tiny", "huge")

_FAMILIES = (
    Family("gaussian", "rows of unit root mean square", _gaussian, _gaussian_residual, properties.unit_rms, _ALL),
    Family("tiny-rows", "mean squares 0, 1e-7, 1e-5, 1e-3 in turn", _tiny, _tiny_residual, properties.small_rows),
    Family(
        "cancelling",
        "a pair of ranks cancels at 2^12 to 2^24 in every column",
        _cancelling,
        _gaussian_residual,
        properties.cancels,
    ),
    Family("exact", "every partial sum is exact in any order", _exact, _exact_residual, properties.order_free),
    Family(
        "e4m3-ties",
        "normed values on E4M3 midpoints",
        _gaussian,
        _gaussian_residual,
        properties.code_ties,
        ("power", "one"),
        gamma="spread",
    ),
    Family(
        "native-ties",
        "every residual_out is a tie of the activations' format",
        _native_tie,
        _native_tie_residual,
        properties.native_ties,
    ),
    Family(
        "saturating",
        "1 to 5 % of codes saturate",
        _gaussian,
        _gaussian_residual,
        properties.saturates,
        ("saturating",),
        gamma="spread",
    ),
    Family(
        "subnormal-codes",
        "30 % of codes or more are subnormal",
        _gaussian,
        _gaussian_residual,
        properties.subnormal_codes,
        ("subnormal",),
        gamma="spread",
    ),
    Family("outliers", "heavy tails and outlier channels", _outliers, _gaussian_residual, properties.has_outliers),
    Family("rank-tagged", "rank r holds +-(r + 1)", _rank_tagged, _exact_residual, properties.order_free),
    Family("one-hot", "one lane a row, every lane in turn", _one_hot, Cells.zeros, properties.one_lane),
    Family("constant", "rows of one value", _constant, _constant_residual, properties.constant_rows),
    Family(
        "negative-zero",
        "negative zeros in rows, pairs and single lanes",
        _negative_zero,
        _negative_zero_residual,
        properties.negative_zeros,
    ),
    Family(
        "special",
        "one NaN or infinity in four rows of five",
        _special,
        _gaussian_residual,
        properties.special,
        finite=False,
    ),
    Family(
        "one-special",
        "a NaN, an infinity, a value or a sum that overflows, in one operand of each row",
        _one_special,
        _one_special_residual,
        properties.special_in_every_row,
        finite=False,
    ),
    Family(
        "special-gamma",
        "a NaN, infinities and the largest value among the norm weights",
        _gaussian,
        _gaussian_residual,
        properties.special_weights,
        gamma="special",
        finite=False,
    ),
    Family("subnormal", "subnormal activations", _subnormal, _subnormal_residual, properties.subnormal_inputs),
    Family(
        "overflow",
        "a sum or a square that overflows",
        _overflow,
        _overflow_residual,
        properties.overflows,
        finite=False,
    ),
    Family(
        "scale-edges",
        "amax of groups at 1.75 and 1.5 times a power of two and a step beside, at zero, and tiny",
        unit_rows,
        Cells.zeros,
        properties.on_scale_edges,
        gamma="edges",
    ),
    Family(
        "special-groups",
        "groups near the top of the format, or with an infinity, a NaN or both, beside ordinary ones",
        unit_rows,
        Cells.zeros,
        properties.special_groups,
        gamma="groups",
        finite=False,
    ),
    Family(
        "captured",
        "partials, residual, gamma and scale of a site of a real model",
        captured,
        captured_residual,
        properties.like_a_model,
        ("captured",),
        gamma="captured",
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _FAMILIES}
"""The families by name."""
