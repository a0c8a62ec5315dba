"""A second oracle in exact rationals: it judges the float64 one, and shares no code with it.

Written from the definition of the op and from the lemmas of the criterion alone; slow, one row at a time, for
small rows. Two things are computed for a row of H elements over R ranks:

* the nominal: every declared rounding applied to the exact value, everything else left exact;
* the enclosure: the ends that every conforming kernel lies between (u = 2^-24, g_k = k u / (1 - k u)):
  the sum over ranks within g_(R-1) sum|x| in float32, or within the tree bound E_R in the native
  format (both twice as wide where additions may truncate), or at a point where the order is declared, the
  exact sum is, or the addends prove every order exact; the sum of
  squares within g_(D+1); the mean within g_2, or 5u where its division is approximate; eps and its addition
  within u each; the root within 5u; the two products
  within 2.01 u; the scaling within 5u, or at a point where it is declared.

Subnormals, infinities and NaN are outside its scope.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from fusecheck.dataflow import Dataflow
from fusecheck.property_tests.suite.rational_numbers import (
    FP32,
    Ends,
    Grid,
    Real,
    Root,
    half_ulp,
    last_place,
    nearest,
    ordinal,
    preimage,
    toward_zero,
)

U = Fraction(1, 1 << 24)
TINY = Fraction(1, 1 << 125)
"""What underflow, gradual or flushed, can take from a product."""


def gamma(k: int) -> Fraction:
    """The relative error of k successive float32 roundings."""
    return k * U / (1 - k * U)


@dataclass(frozen=True)
class Row:
    """One row's operands, exact.

    Attributes:
        partials: each rank's addends, [world_size][hidden].
        residual: [hidden].
        weight: gamma plus the weight bias as float32 has it, [hidden].
        eps: as the caller gives it.
        scale: the dequantisation scale.
        native: the activations' format.
    """

    partials: list[list[Fraction]]
    residual: list[Fraction]
    weight: list[Fraction]
    eps: Fraction
    scale: Fraction
    native: Grid

    @property
    def hidden(self) -> int:
        """Elements of the row."""
        return len(self.residual)


# ------------------------------------------------------------------ the sum over ranks


def _roundings(flow: Dataflow) -> Sequence[Callable[[Real, Grid], Fraction]]:
    """How a rounding of a sum may go."""
    return {"nearest": [nearest], "truncate": [toward_zero], "either": [nearest, toward_zero]}[flow.sum_rounding]


def _rounded(ends: tuple[Fraction, Fraction], grid: Grid, flow: Dataflow) -> tuple[Fraction, Fraction]:
    each = [[way(end, grid) for way in _roundings(flow)] for end in ends]
    return min(each[0]), max(each[1])


def _is_exact(addends: list[Fraction], precision: int) -> bool:
    """Whether every order of addition is exact: the addends' magnitudes fit into `precision` bits of one grid."""
    units = [last_place(a) for a in addends if a]
    return not units or sum(abs(a) for a in addends) <= 2**precision * min(units)


def _tree_bound(addends: list[Fraction], grid: Grid, halves: int) -> Fraction:
    """E_R: the error of any tree whose every node errs by so many half units of `grid`, perhaps by way of float32."""
    ascending = sorted(addends)
    error, peak = Fraction(0), Fraction(0)
    for m in range(2, len(addends) + 1):
        node = max(abs(sum(ascending[-m:], Fraction(0))), abs(sum(ascending[:m], Fraction(0))))
        peak = max(peak, node) if m < len(addends) else node
        reach = peak + error
        error += halves * (half_ulp(reach * (1 + 2 * U), grid) + U * reach)
    return error


def sum_ends(row: Row, flow: Dataflow, i: int) -> tuple[Fraction, Fraction]:
    """Enclose element i of the sum over ranks as it meets the residual."""
    addends = [partial[i] for partial in row.partials]
    total, grid = sum(addends, Fraction(0)), row.native if flow.accumulate == "native" else FP32
    halves = 1 if flow.sum_rounding == "nearest" else 2
    if flow.accumulate != "exact" and flow.order == "rank" and flow.sum_rounding != "either":
        return (sum_nominal(row, flow, i),) * 2
    if flow.accumulate == "exact" or len(addends) <= 2 or _is_exact(addends, grid.precision):
        error = Fraction(0)  # one addition has one order
    elif grid is FP32:
        error = gamma(halves * (len(addends) - 1)) * sum((abs(a) for a in addends), Fraction(0))
    else:
        error = _tree_bound(addends, grid, halves)
    ends = _rounded((total - error, total + error), grid, flow)
    return _rounded(ends, row.native, flow) if flow.round_sum else ends


def sum_nominal(row: Row, flow: Dataflow, i: int) -> Fraction:
    """The sum over ranks, in rank order where that is declared, else exact and rounded once."""
    rounded, addends = _roundings(flow)[0], [partial[i] for partial in row.partials]
    grid = row.native if flow.accumulate == "native" else FP32
    total = addends[0]
    if flow.order == "rank" and flow.accumulate != "exact":
        for addend in addends[1:]:
            total = rounded(total + addend, grid)
    else:
        total = rounded(sum(addends, Fraction(0)), grid)
    return rounded(total, row.native) if flow.round_sum else total


def add_residual(row: Row, total: Fraction, i: int) -> tuple[Fraction, Fraction]:
    """Element i of the residual stream as a float32, and rounded, from the sum over ranks."""
    wide = nearest(total + row.residual[i], FP32)
    return wide, nearest(wide, row.native)


def measures_rounded(flow: Dataflow) -> bool:
    """Whether the mean square is that of the rounded stream."""
    return flow.norm_reads_rounded if flow.statistics is None else flow.statistics == "rounded"


# ------------------------------------------------------------------ the norm


def _square_ends(read: list[tuple[Fraction, Fraction]], row: Row, flow: Dataflow) -> tuple[Fraction, Fraction]:
    low = high = Fraction(0)
    for a, b in read:
        smallest = Fraction(0) if a <= 0 <= b else min(a * a, b * b)
        largest = max(a * a, b * b)
        if flow.round_squares:
            smallest, largest = nearest(smallest, row.native), nearest(largest, row.native)
        low, high = low + smallest, high + largest
    return low, high


def root_ends(read: list[tuple[Fraction, Fraction]], row: Row, flow: Dataflow) -> tuple[Root, Root]:
    """Enclose the reciprocal root of mean square plus eps, from the ends of what is squared."""
    low, high = _square_ends(read, row, flow)
    deepest = row.hidden - 1
    kappa = gamma((deepest if flow.depth is None else min(flow.depth, deepest)) + 1)
    underflow = row.hidden * TINY
    low, high = max(low * (1 - kappa) - underflow, Fraction(0)), high * (1 + kappa) + underflow
    rounded = flow.mean_rule == "exact" or (flow.exact_pow2 and row.hidden & (row.hidden - 1) == 0)
    divided = gamma(2) if rounded else 5 * U
    mean_low = (low / row.hidden * (1 - divided) + row.eps * (1 - U)) * (1 - U)
    mean_high = (high / row.hidden * (1 + divided) + row.eps * (1 + U)) * (1 + U)
    return Root(1, (1 - 5 * U) ** 2 / mean_high), Root(1, (1 + 5 * U) ** 2 / mean_low)


def _widen(low: Root, high: Root, relative: Fraction) -> tuple[Root, Root]:
    def outward(x: Root, side: int) -> Root:
        return x.times(1 + relative if x.sign == side else 1 - relative)

    return outward(low, -1), outward(high, 1)


def norm_ends(
    read: list[tuple[Fraction, Fraction]], measured: list[tuple[Fraction, Fraction]], row: Row, flow: Dataflow
) -> list[Ends]:
    """Enclose the norm before its last rounding, element by element, from the ends of what it reads and measures."""
    smallest, largest = root_ends(measured, row, flow)
    ends: list[Ends] = []
    for (a, b), weight in zip(read, row.weight, strict=True):
        low = (smallest if a >= 0 else largest).times(a)
        high = (largest if b >= 0 else smallest).times(b)
        roundings = Fraction(201, 100) * U
        if flow.round_normed:
            low, high = _widen(low, high, Fraction(101, 100) * U)
            low, high = Root.of(nearest(low, row.native)), Root.of(nearest(high, row.native))
            exact = nearest(weight, row.native) == weight  # two native numbers have an exact product in float32
            roundings = Fraction(0) if exact else Fraction(101, 100) * U
        low, high = sorted((low.times(weight), high.times(weight)))
        ends.append(_widen(low, high, roundings))
    return ends


def norm_nominal(read: list[Fraction], measured: list[Fraction], row: Row, flow: Dataflow) -> list[Root]:
    """The norm before its last rounding, with the declared roundings and an exact root."""
    squares = [nearest(t * t, row.native) if flow.round_squares else t * t for t in measured]
    mean = sum(squares, Fraction(0)) / row.hidden + nearest(row.eps, FP32)
    norm: list[Root] = []
    for t, weight in zip(read, row.weight, strict=True):
        normed: Real = Root(1, 1 / mean).times(t)
        if flow.round_normed:
            normed = nearest(normed, row.native)
        norm.append(Root.of(normed).times(weight))
    return norm


# ------------------------------------------------------------------ the quantiser


def _as_read(norm: Real, row: Row, flow: Dataflow) -> Root:
    """The norm as the quantiser reads it: rounded to the native format, or a float32."""
    return Root.of(nearest(norm, row.native if flow.round_norm else FP32))


def quotient_ends(norm: Ends, row: Row, flow: Dataflow) -> Ends:
    """Enclose norm / scale as the cast reads it, from the ends of the norm before its last rounding."""
    low, high = (_as_read(end, row, flow) for end in norm)
    reciprocal = 1 / row.scale
    exact = flow.exact_pow2 and last_place(row.scale) == row.scale
    if flow.scaling == "either":
        low, high = low.times(reciprocal), high.times(reciprocal)
        if not exact:
            low, high = _widen(low, high, 5 * U)
    elif flow.scaling == "divide":
        low, high = low.times(reciprocal), high.times(reciprocal)
    elif flow.exact_reciprocal or exact:
        low, high = low.times(nearest(reciprocal, FP32)), high.times(nearest(reciprocal, FP32))
    else:  # a float32 within one unit in the last place of the exact reciprocal
        ulp = 2 * half_ulp(reciprocal, FP32)
        inner, outer = nearest(reciprocal - ulp, FP32), nearest(reciprocal + ulp, FP32)
        low = low.times(inner if low.sign > 0 else outer)
        high = high.times(outer if high.sign > 0 else inner)
    return nearest(low, FP32), nearest(high, FP32)


def quotient_nominal(norm: Real, row: Row, flow: Dataflow) -> Real:
    """Norm / scale as declared; an undeclared scaling divides."""
    factor = nearest(1 / row.scale, FP32) if flow.scaling == "multiply" else 1 / row.scale
    return nearest(_as_read(norm, row, flow).times(factor), FP32)


# ------------------------------------------------------------------ a whole row


@dataclass(frozen=True)
class Nominal:
    """A row's nominal outputs: residual_out, the norm before its last rounding, and the ordinals of the codes."""

    residual: list[Fraction]
    norm: list[Root]
    ordinals: list[int]


@dataclass(frozen=True)
class Enclosed:
    """A row's ends: of residual_out, of the norm before its last rounding, of norm / scale, and of the ordinals."""

    residual: list[Ends]
    norm: list[Ends]
    quotient: list[Ends]
    ordinals: list[tuple[int, int]]


def nominal(row: Row, flow: Dataflow) -> Nominal:
    """Compute the nominal outputs of a row."""
    wide, out = zip(*(add_residual(row, sum_nominal(row, flow, i), i) for i in range(row.hidden)), strict=True)
    stream = {True: list(out), False: list(wide)}
    norm = norm_nominal(stream[flow.norm_reads_rounded], stream[measures_rounded(flow)], row, flow)
    return Nominal(list(out), norm, [ordinal(quotient_nominal(y, row, flow)) for y in norm])


def stream_ends(row: Row, flow: Dataflow) -> tuple[list[tuple[Fraction, Fraction]], list[Ends]]:
    """Enclose the residual stream as float32, and residual_out."""
    wide: list[tuple[Fraction, Fraction]] = []
    out: list[Ends] = []
    for i in range(row.hidden):
        low, high = (add_residual(row, end, i) for end in sum_ends(row, flow, i))
        wide.append((low[0], high[0]))
        out.append((low[1], high[1]))
    return wide, out


def enclose(row: Row, flow: Dataflow, observed: list[Fraction]) -> Enclosed:
    """Compute the enclosure of a row: of residual_out, and of what follows from the observed residual_out.

    Where the rounded sum is read or squared, it is the observed value itself; else whatever rounds to it and
    the sum allows.
    """
    wide, out = stream_ends(row, flow)
    before = [preimage(t, row.native) for t in observed]
    allowed = [(max(low, a), min(high, b)) for (low, high), (a, b) in zip(wide, before, strict=True)]
    stream = {True: [(t, t) for t in observed], False: allowed}
    norm = norm_ends(stream[flow.norm_reads_rounded], stream[measures_rounded(flow)], row, flow)
    quotient = [quotient_ends(ends, row, flow) for ends in norm]
    return Enclosed(out, norm, quotient, [(ordinal(low), ordinal(high)) for low, high in quotient])
