"""Rows whose norm is the norm weight itself, up to its sign, and weights whose groups lie on the boundaries of scales.

The residual stream is +-1, so the reciprocal root is one up to eps, and the norm rounds to +-gamma. So the largest
magnitude of each group can be placed exactly: at 1.75 * 2^k, where a UE8M0 exponent of E4M3 turns, at 1.5 * 2^k, where
that of E2M1 does, at their neighbours, in a group of zeros, or below every least scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusecheck.formats.binary import Format, ulp
from fusecheck.inputs.cells import Cells

GROUP = 16
"""The smallest group; larger ones hold several, one of which has their largest magnitude."""
PLACES = (0, 7, 8, 15)
"""Where the largest magnitude of a group stands: first, last, and around the middle of a 16-byte access."""
_SIGN, _KIND, _POWER, _PLACE, _OTHERS = 110, 111, 112, 113, 114


def unit_rows(cells: Cells, rank: int, world_size: int) -> Tensor:
    """+-1 on rank 0, nothing on the others."""
    del world_size
    sign = 1 - 2 * (cells.bits(_SIGN) & 1)
    return (sign * (rank == 0)).to(cells.format.dtype)


def peaks(kind: Tensor, power: Tensor, fmt: Format) -> Tensor:
    """The largest magnitude of groups, float64: by kind on a boundary, a step below, a step above; zero; tiny."""
    middle = torch.where(kind < 3, 1.75, 1.5) * torch.exp2(power)
    step = ulp(middle, fmt) * (kind % 3 - 1)
    placed = torch.where(kind < 6, middle + step, 0.0)
    return torch.where(kind == 7, torch.full_like(placed, 2.0**-20), placed)


def edge_weights(cells: Cells) -> Tensor:
    """The weights, [1, hidden]; besides the largest magnitude of a group, eighths of the power of two below it."""
    group, lane = cells.column // GROUP, cells.column % GROUP

    def of_group(stream: int) -> Tensor:
        return cells.column_bits(stream)[:, (group * GROUP)[0]]

    kind, power = of_group(_KIND) % 8, (of_group(_POWER) % 13 - 6).to(torch.float64)
    peak = peaks(kind, power, cells.format)
    below = torch.exp2(torch.floor(torch.log2(peak.clamp(min=2.0**-20)))) * (cells.column_bits(_OTHERS) % 9) / 8
    place = torch.tensor(PLACES, device=cells.device)[of_group(_PLACE) % len(PLACES)]
    values = torch.where(lane == place, peak, torch.where(kind == 6, 0.0, below))
    return values.to(cells.format.dtype)
