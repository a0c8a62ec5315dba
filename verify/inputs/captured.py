"""Activations of a real model: what the kernel got at each site of the golden model on real questions.

`golden/model/activations.safetensors` holds `partial` [8 sites, 8 ranks, 24 tokens, 512] and `residual` [8, 24, 512].
Rows of a case are recorded rows in turn, one site after the other; a wider case repeats the columns, a narrower one
takes the first. For fewer ranks than eight, neighbouring ranks' addends are added in float32 and rounded; for sixteen,
each is halved.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from verify.errors import UsageError
from verify.inputs.cells import Cells, hash64

RECORDING = Path(__file__).parents[2] / "golden" / "model" / "activations.safetensors"
RANKS = 8


@lru_cache(maxsize=1)
def recording() -> dict[str, Tensor]:
    """The recorded tensors, float32.

    Raises:
        UsageError: the file is missing or broken.
    """
    try:
        return {name: tensor.float() for name, tensor in load_file(RECORDING).items()}
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{RECORDING}: {error}; family captured needs it: install the package golden with its data"
        ) from None


@lru_cache(maxsize=64)
def _addends(rank: int, world_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One rank's addends of all recorded rows, [tokens * sites, columns]; the sites change fastest."""
    partial = recording()["partial"]
    if world_size > RANKS:
        share = partial[:, rank * RANKS // world_size] * (RANKS / world_size)
    else:
        step = RANKS // world_size
        share = partial[:, rank * step : (rank + 1) * step].sum(1)
    return share.transpose(0, 1).flatten(0, 1).to(device, dtype)


@lru_cache(maxsize=8)
def _residuals(dtype: torch.dtype, device: torch.device) -> Tensor:
    return recording()["residual"].transpose(0, 1).flatten(0, 1).to(device, dtype)


def _laid_out(table: Tensor, cells: Cells) -> Tensor:
    """The recorded rows from a seeded one on, tiled or cropped to the case's width."""
    rows = (cells.row[:, 0] + hash64(cells.seed, 11) % len(table)) % len(table)
    picked = table.index_select(0, rows)
    width = table.shape[1]
    return picked.repeat(1, -(-cells.hidden // width))[:, : cells.hidden].contiguous()


def captured(cells: Cells, rank: int, world_size: int) -> Tensor:
    """A rank's addend, [rows, hidden]."""
    return _laid_out(_addends(rank, world_size, cells.format.dtype, cells.device), cells)


def captured_residual(cells: Cells) -> Tensor:
    """The residual, [rows, hidden]."""
    return _laid_out(_residuals(cells.format.dtype, cells.device), cells)
