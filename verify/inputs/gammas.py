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


def _for_gamma(cells: Cells) -> Cells:
    return replace(cells, seed=hash64(cells.seed, GAMMA_SEED))


def _gamma_spread(cells: Cells) -> Tensor:
    return (1 + _for_gamma(cells).normal(0, 0.15).to(torch.float32)).to(cells.format.dtype)


def _gamma_ones(cells: Cells) -> Tensor:
    return torch.ones(1, cells.hidden, dtype=cells.format.dtype, device=cells.device)


def _gamma_small(cells: Cells) -> Tensor:
    return _for_gamma(cells).normal(0, 0.02)


def _gamma_signed(cells: Cells) -> Tensor:
    zero = cells.column % 16 == 5
    return torch.where(zero, 0.0, _for_gamma(cells).normal(0, 1.0)).to(cells.format.dtype)


def _gamma_special(cells: Cells) -> Tensor:
    return special_gamma(_gamma_spread(cells), cells)


def _gamma_groups(cells: Cells) -> Tensor:
    return group_weights(_gamma_spread(cells), cells)


GAMMAS: dict[str, Callable[[Cells], Tensor]] = {
    "spread": _gamma_spread,
    "ones": _gamma_ones,
    "small": _gamma_small,
    "signed": _gamma_signed,
    "captured": captured_gamma,
    "special": _gamma_special,
    "edges": edge_weights,
    "groups": _gamma_groups,
}
"""Kinds of norm weight: near one; all one; |gamma| << 1 (for a weight bias of 1); both signs and zeros; a model's; with
lanes that are no finite numbers; with groups on the boundaries of scales; with groups that are special."""
