"""Weights of which some groups hold no ordinary numbers: near the top of the format, an infinity, a NaN, or both.

On rows of +-1 the norm is the weight up to its sign (`edges`), so that such a group stands beside ordinary ones. Bands
of 128 columns, whole groups of most formats, are of one kind each; the last may be narrower.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusecheck.formats.binary import Format
from fusecheck.inputs.cells import Cells, hash64

BAND = 128
KINDS = ("large", "Inf", "NaN", "Inf and NaN")
"""What a band holds. Large: all of it, its largest magnitude finite and beyond the reach of a reciprocal in bf16."""
TURNS = len(KINDS) + 1
"""Seeds in turn: with bands of every kind, and ordinary ones; then so many with one band that is not ordinary."""
PLACES = (0, 7, 8, 15)
"""Where in the first or last sixteen lanes of a band: at their ends, and around the middle of a 16-byte access."""
_ORDINARY = len(KINDS)
_LANE, _PEAK, _SHARE = 120, 121, 122


def top_binade(fmt: Format) -> float:
    """The power of two at which the last binade of a format begins."""
    return 2.0 ** (1 - fmt.emin)


def kinds_of(seed: int, bands: int) -> list[int]:
    """The kind of each band, the number of an ordinary one being that of the kinds; one at least is not ordinary."""
    turn = seed % (TURNS + len(KINDS))
    if turn < TURNS and bands > 1:
        return [(turn + band) % TURNS for band in range(bands)]
    lone = hash64(seed, _LANE) % bands
    return [turn % len(KINDS) if band == lone else _ORDINARY for band in range(bands)]


def turns_for(group: int | None) -> range:
    """The turns that bring every kind of group to every place; of rows without groups, those of one kind each."""
    return range(TURNS) if group is not None else range(TURNS, TURNS + len(KINDS))


def seed_of(draw: int, turn: int) -> int:
    """A seed, from a drawn one, whose turn this is."""
    every = TURNS + len(KINDS)
    return draw // every * every + turn


def held(seed: int, hidden: int, group: int | None) -> Iterator[tuple[str, str]]:
    """The kinds of groups that the weights of a call hold, each with its place in the row.

    Rows without groups hold a kind where every other band is ordinary.
    """
    kinds = kinds_of(seed, -(-hidden // BAND))
    special = [(band, kind) for band, kind in enumerate(kinds) if kind != _ORDINARY]
    if group is None or group >= hidden:
        yield from ((KINDS[kind], "row") for _, kind in special if len(special) == 1)
        return
    for band, kind in special:
        yield KINDS[kind], "first" if band == 0 else "last" if band == len(kinds) - 1 else "middle"


def group_weights(ordinary: Tensor, cells: Cells) -> Tensor:
    """Ordinary weights, [1, hidden], with those bands."""
    made = ordinary.clone()
    for band, kind in enumerate(kinds_of(cells.seed, -(-cells.hidden // BAND))):
        part = made[:, BAND * band : BAND * (band + 1)]
        if kind == KINDS.index("large"):
            part.copy_(_large(cells, BAND * band, part.shape[1]))
        elif kind != _ORDINARY:
            last = part.shape[1] - min(16, part.shape[1]) if band else 0
            lane = last + PLACES[hash64(cells.seed, _LANE, band) % len(PLACES)] % part.shape[1]
            part[0, lane] = torch.inf if kind == KINDS.index("Inf") else torch.nan
            if kind == KINDS.index("Inf and NaN"):
                part[0, lane ^ 1] = torch.inf
    return made


def _large(cells: Cells, first: int, width: int) -> Tensor:
    """Eighths of a value in the upper two binades, that value among the last sixteen lanes, or the first of a row."""
    fmt = cells.format
    top = top_binade(fmt)
    peaks = (top / 2 * (1 + 2.0 ** (1 - fmt.precision)), top, 1.75 * top, fmt.largest)
    peak = peaks[hash64(cells.seed, _PEAK, first) % len(peaks)]
    values = peak * (cells.column_bits(_SHARE)[:, first : first + width] % 9).to(torch.float64) / 8
    start = width - min(16, width) if first else 0
    values[0, start + PLACES[hash64(cells.seed, _LANE, first) % len(PLACES)] % width] = peak
    return values.to(fmt.dtype)
