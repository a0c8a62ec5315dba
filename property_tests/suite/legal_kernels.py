"""Random kernels that keep a declared dataflow: the swarm that every sound bound must contain.

A dataflow leaves a kernel free in the order of its additions, in the last bits of its root and of an
undeclared division, and in the association of its products. `run` draws all of these at random and
computes in float32. It imports nothing of the verifier but the declaration, so that it can refute it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fusecheck.dataflow import Dataflow

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Generator = np.random.Generator

ORDERS = ("sequential", "permuted", "fma", "ascending", "descending", "pairwise", "threads", "library")
"""In which order the squares are added up."""


@dataclass(frozen=True)
class Inputs:
    """Operands of one call; every array is float32 and holds values of the native format.

    Attributes:
        partials: [world_size, tokens, hidden].
        residual: [tokens, hidden].
        gamma: [hidden].
        weight_bias: added to gamma in float32.
        eps: rounded to float32 by the kernel.
        scale: a float32 value.
        native: the activations' dtype.
    """

    partials: Floats
    residual: Floats
    gamma: Floats
    weight_bias: float
    eps: float
    scale: float
    native: torch.dtype


@dataclass(frozen=True)
class Outputs:
    """What one kernel computed, every array [tokens, hidden] float32 but for the codes.

    Attributes:
        residual: residual_out, values of the native format.
        unrounded_norm: the norm before its last rounding.
        quotient: what the cast reads.
        codes: E4M3, uint8.
    """

    residual: Floats
    unrounded_norm: Floats
    quotient: Floats
    codes: npt.NDArray[np.uint8]


def to_native(x: Floats, native: torch.dtype) -> Floats:
    """Round float32 to the native format and back, as a kernel's cast does."""
    rounded: Floats = torch.from_numpy(np.ascontiguousarray(x)).to(native).to(torch.float32).numpy()
    return rounded


def cast(x: Floats) -> npt.NDArray[np.uint8]:
    """Cast float32 to E4M3 codes, saturating."""
    clamped = torch.from_numpy(np.ascontiguousarray(x)).clamp(-448.0, 448.0)
    codes: npt.NDArray[np.uint8] = clamped.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return codes


def _flushed(x: Floats) -> Floats:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.float32(0), x)


def _adder(*, flushes: bool) -> Callable[[Floats, Floats], Floats]:
    if flushes:
        return lambda a, b: _flushed(_flushed(a) + _flushed(b))
    return lambda a, b: a + b


def chopped(x: Doubles, rest: Doubles, native: torch.dtype) -> Floats:
    """Float64 toward zero, to a format; `rest` is what it lacks of the exact value."""
    info = torch.finfo(native)
    _, exponent = np.frexp(x)
    unit = np.ldexp(info.eps / 2, np.maximum(exponent, round(math.log2(info.smallest_normal)) + 1))
    cut = np.trunc(x / unit) * unit
    on_grid = (cut == x) & (rest * x < 0)
    below = np.where(np.abs(np.frexp(x)[0]) == 0.5, unit / 2, unit)  # the grid is finer below a power of two
    kept = np.where(on_grid, cut - np.copysign(below, x), cut)
    return np.where(np.isfinite(x), np.clip(kept, -info.max, info.max), x).astype(np.float32)


def _added(addends: list[Floats]) -> tuple[Doubles, Doubles]:
    """The exact sum of float32 numbers: a float64, and what it lacks, or the sign of that."""
    wide = np.stack(addends).astype(np.float64)
    total = wide.sum(0)
    rest = np.zeros_like(total)
    _, exponent = np.frexp(wide)
    least = np.where(wide == 0, 1 << 20, exponent).min(0)
    for place in np.argwhere((np.where(wide == 0, -(1 << 20), exponent).max(0) - least > 25) & np.isfinite(total)):
        at = (slice(None), *place)
        total[at[1:]] = math.fsum(wide[at])
        rest[at[1:]] = math.fsum([*wide[at], -total[at[1:]]])
    return total, rest


def round_sum(x: Floats, rounding: str, native: torch.dtype) -> Floats:
    """A finished sum in the native format."""
    return chopped(x.astype(np.float64), np.zeros(x.shape), native) if rounding == "truncate" else to_native(x, native)


def sum_exactly(addends: list[Floats], rounding: str) -> Floats:
    """The true sum with one rounding to float32."""
    total, rest = _added(addends)
    if rounding == "truncate":
        return chopped(total, rest, torch.float32)
    toward = np.where(rest > 0, np.inf, -np.inf)
    even = (total.view(np.int64) & 1) == 0
    return np.where((rest != 0) & even, np.nextafter(total, toward), total).astype(np.float32)


def sum_partials(inputs: Inputs, flow: Dataflow, rng: Generator) -> Floats:
    """Add over ranks: in rank order, or in a random sequence, or by a random tree; or exactly."""
    flushes = flow.flush_subnormals and flow.sum_flushes
    add = _adder(flushes=flushes)
    ways = ("nearest", "truncate") if flow.sum_rounding == "either" else (flow.sum_rounding,)

    def step(a: Floats, b: Floats) -> Floats:
        rounding = ways[rng.integers(len(ways))]
        if rounding == "truncate":
            wide, rest = _added([_flushed(a), _flushed(b)] if flushes else [a, b])
            cut = chopped(wide, rest, inputs.native if flow.accumulate == "native" else torch.float32)
            return _flushed(cut) if flushes else cut
        total = add(a, b)
        return to_native(total, inputs.native) if flow.accumulate == "native" else total

    items = list(inputs.partials)
    if flow.accumulate == "exact":
        total = sum_exactly([_flushed(item) for item in items] if flushes else items, ways[rng.integers(len(ways))])
        items = [_flushed(total) if flushes else total]
    elif flow.order == "any":
        items = [items[i] for i in rng.permutation(len(items))]
        while len(items) > 1 and rng.random() < 0.7:
            i, j = sorted(rng.choice(len(items), 2, replace=False))
            later, earlier = items.pop(j), items.pop(i)
            items.append(step(earlier, later))
    total = items[0]
    for item in items[1:]:
        total = step(total, item)
    return round_sum(total, ways[rng.integers(len(ways))], inputs.native) if flow.round_sum else total


def _halve(values: Floats) -> tuple[Floats, int]:
    """Add neighbours of a row together until one is left; the number of levels with it."""
    depth = 0
    while values.shape[1] > 1:
        if values.shape[1] % 2:
            values = np.pad(values, ((0, 0), (0, 1)))
        half = values.shape[1] // 2
        values = values[:, :half] + values[:, half:]
        depth += 1
    return values[:, 0], depth


def _in_threads(squares: Floats, rng: Generator) -> tuple[Floats, int]:
    """Each thread adds vectors of eight in sequence, then a butterfly over the threads."""
    rows, hidden = squares.shape
    threads = 2 ** int(rng.integers(0, min(11, 1 + max(0, hidden.bit_length() - 4))))
    padded = np.pad(squares, ((0, 0), (0, -hidden % (8 * threads)))).reshape(rows, -1, threads, 8)
    serial = padded.transpose(0, 2, 1, 3).reshape(rows, threads, -1)
    each = np.add.accumulate(serial, axis=2, dtype=np.float32)[:, :, -1]
    total, depth = _halve(each)
    return total, depth + serial.shape[2] - 1


def sum_squares(x: Floats, how: str, native: torch.dtype | None, rng: Generator) -> tuple[Floats, int]:
    """Add the squares of each row up in float32.

    Args:
        x: [tokens, hidden].
        how: one of ORDERS.
        native: round each square to this first, or None.
        rng: draws the permutation and the number of threads.

    Returns:
        the sums, [tokens], and the number of additions above any square at most.
    """
    rows, hidden = x.shape
    serial = hidden - 1
    if how == "fma" and native is None:  # float64 holds the square exactly; one rounding a step
        total = np.zeros(rows)
        for column in np.ascontiguousarray(x.T).astype(np.float64):
            total = (column * column + total).astype(np.float32).astype(np.float64)
        return total.astype(np.float32), serial
    squares = x * x
    if native is not None:
        squares = to_native(squares, native)
    if how == "library":
        return torch.from_numpy(squares).sum(dim=1).numpy(), serial
    if how == "pairwise":
        return _halve(squares)
    if how == "threads":
        return _in_threads(squares, rng)
    if how == "permuted":
        squares = squares[:, rng.permutation(hidden)]
    elif how in ("ascending", "descending"):
        squares = np.sort(squares, axis=1)
        squares = squares[:, ::-1] if how == "descending" else squares
    return np.add.accumulate(squares, axis=1, dtype=np.float32)[:, -1], serial


def _nudge(x: Floats, ulps: int, rng: Generator) -> Floats:
    """Move every number by up to so many units in the last place; zeros stay."""
    steps = rng.integers(-ulps, ulps + 1, x.shape, dtype=np.int32) * (x != 0)
    moved: Floats = (np.ascontiguousarray(x).view(np.int32) + steps).view(np.float32)
    return moved


def mean_square(sums: Floats, hidden: int, eps: float, flow: Dataflow, rng: Generator) -> Floats:
    """Sum / hidden + eps as the declared rule forms it, [tokens]."""
    mean: Floats = sums / np.float32(hidden)
    if flow.mean_rule == "approx":
        exact = flow.exact_pow2 and hidden & (hidden - 1) == 0
        mean = mean if exact else _nudge(mean, 2, rng)
    elif rng.random() < 0.5:
        mean = sums * (np.float32(1) / np.float32(hidden))
    shifted: Floats = mean + np.float32(eps)
    return shifted


def inverse_root(mean: Floats, rng: Generator) -> Floats:
    """1 / sqrt(mean) within 2 ulp of the correctly rounded value, [tokens]."""
    return _nudge((1 / np.sqrt(mean.astype(np.float64))).astype(np.float32), 2, rng)


def scaled_root(read: Floats, order: str, eps: float, flow: Dataflow, rng: Generator) -> tuple[Floats, int]:
    """The reciprocal root of rows that are scaled down by powers of two before they are squared, and the depth."""
    _, power = np.frexp(np.abs(read).max(axis=1, keepdims=True))
    power = np.maximum(power, 0).astype(np.float64)
    sums, depth = sum_squares((read * 2.0**-power).astype(np.float32), order, None, rng)
    mean = mean_square(sums, read.shape[1], 0.0, flow, rng) + np.float32(eps) * (2.0 ** (-2 * power[:, 0]))
    return (inverse_root(mean.astype(np.float32), rng) * 2.0 ** -power[:, 0]).astype(np.float32), depth


def normalise(read: Floats, root: Floats, weight: Floats, inputs: Inputs, flow: Dataflow, rng: Generator) -> Floats:
    """The norm before its last rounding, in a random association."""
    root = root[:, None]
    if flow.round_normed:
        return to_native(read * root, inputs.native) * weight
    association = rng.integers(3)
    if association == 0:
        return (read * root) * weight
    return read * (root * weight) if association == 1 else (read * weight) * root


def reciprocal(scale: float, flow: Dataflow, rng: Generator) -> np.float32:
    """1 / scale: correctly rounded, or any float32 within one unit in the last place if so declared."""
    rounded: np.float32 = np.float32(1) / np.float32(scale)
    if flow.exact_reciprocal or (flow.exact_pow2 and math.frexp(scale)[0] == 0.5):
        return rounded
    infinity = np.float32(np.inf)
    candidates = [np.nextafter(rounded, -infinity), rounded, np.nextafter(rounded, infinity)]
    unit = float(np.spacing(rounded))
    legal = [c for c in candidates if abs(float(c) - 1 / scale) <= unit]
    chosen: np.float32 = legal[rng.integers(len(legal))]
    return chosen


def quotient(norm: Floats, scale: float, flow: Dataflow, rng: Generator) -> Floats:
    """Norm / scale as declared, or in one of the undeclared ways."""
    ways = ("multiply", "divide", "approximate") if flow.scaling == "either" else (flow.scaling,)
    way = str(rng.choice(ways))
    if way == "multiply":
        return norm * reciprocal(scale, flow, rng)
    exact = norm / np.float32(scale)
    declared = flow.exact_pow2 and math.frexp(scale)[0] == 0.5
    return _nudge(exact, 2, rng) if way == "approximate" and not declared else exact


def choose_order(flow: Dataflow, hidden: int, rng: Generator) -> str:
    """Draw an order of addition that the declared depth allows."""
    shallow = flow.depth is not None and flow.depth < hidden - 1
    return str(rng.choice(("pairwise",) if shallow else ORDERS))


def run(inputs: Inputs, flow: Dataflow, rng: Generator, order: str | None = None) -> tuple[Outputs, int]:
    """Compute one call by a random kernel that keeps the dataflow.

    Args:
        inputs: the operands.
        flow: the declared arithmetic; a declared depth is kept unless `order` says otherwise.
        rng: draws what the dataflow leaves open.
        order: of the additions of squares, one of ORDERS; None draws it.

    Returns:
        the outputs, and the depth of the additions of squares.
    """
    hidden = inputs.residual.shape[1]
    total = sum_partials(inputs, flow, rng)
    wide = _adder(flushes=flow.flush_subnormals)(total, inputs.residual)
    residual = to_native(wide, inputs.native)
    read = residual if flow.norm_reads_rounded else wide
    native = inputs.native if flow.round_squares else None
    order = order or choose_order(flow, hidden, rng)
    measured = read if flow.statistics is None else residual if flow.statistics == "rounded" else wide
    if flow.scaled_squares:
        root, depth = scaled_root(measured, order, inputs.eps, flow, rng)
    else:
        sums, depth = sum_squares(measured, order, native, rng)
        root = inverse_root(mean_square(sums, hidden, inputs.eps, flow, rng), rng)
    weight = inputs.gamma + np.float32(inputs.weight_bias)
    norm = normalise(read, root, weight, inputs, flow, rng)
    z = quotient(to_native(norm, inputs.native) if flow.round_norm else norm, inputs.scale, flow, rng)
    return Outputs(residual, norm, z, cast(z)), depth
