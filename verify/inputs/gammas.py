"""The kinds of norm weight, [1, hidden]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fusecheck.inputs.captured import captured_gamma
from fusecheck.inputs.cells import Cells, hash64
from fusecheck.inputs.edges import edge_weights
from fusecheck.inputs.one_special import special_gamma
from fusecheck.inputs.special_groups import group_weights

GAMMA_SEED = 0x9A
"""Makes the seed of a drawn gamma from that of the Problem."""


def _normal(cells: Cells, deviation: float) -> Tensor:
    return replace(cells, seed=hash64(cells.seed, GAMMA_SEED)).normal(0, deviation)


def _spread(cells: Cells) -> Tensor:
    return (1 + _normal(cells, 0.15).to(torch.float32)).to(cells.format.dtype)


def _signed(cells: Cells) -> Tensor:
    return torch.where(cells.column % 16 == 5, 0.0, _normal(cells, 1.0)).to(cells.format.dtype)


GAMMAS: dict[str, Callable[[Cells], Tensor]] = {
    "spread": _spread,
    "ones": lambda cells: torch.ones(1, cells.hidden, dtype=cells.format.dtype, device=cells.device),
    "small": lambda cells: _normal(cells, 0.02),
    "signed": _signed,
    "captured": captured_gamma,
    "special": lambda cells: special_gamma(_spread(cells), cells),
    "edges": edge_weights,
    "groups": lambda cells: group_weights(_spread(cells), cells),
}
"""Kinds of norm weight: near one; all one; |gamma| << 1 (for a weight bias of 1); both signs and zeros; a model's; with
lanes that are no finite numbers; with groups on the boundaries of scales; with groups that are special."""
