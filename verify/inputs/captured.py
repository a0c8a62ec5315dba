"""Operands of a real model: what the kernel got at one site of the golden model on real questions.

`golden/model/activations.safetensors` holds `partial` [8 sites, 8 ranks, 24 tokens, 512], `residual` [8, 24, 512],
`gamma` [8, 512] and `scale` [8], which is 1 at the last site, whose reader takes no codes. A case is of one site, by
its seed: its rows are the site's recorded rows in turn, its gamma is that of the norm, its scale that of the reader. A
wider case repeats the columns, a narrower one takes the first. For fewer ranks than eight, neighbouring ranks' addends
are added in float32 and rounded; for sixteen, each is halved.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fusecheck.errors import UsageError
from fusecheck.inputs.cells import CALL_STEP, Cells, hash64

RECORDING = Path(str(files("fusecheck.golden"))) / "model" / "activations.safetensors"
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


def site_of(seed: int) -> int:
    """The site of a case with this seed; all calls of a schedule are of one, as they have one scale."""
    return hash64(seed % CALL_STEP, 12) % len(recording()["scale"])


def captured_scale(seed: int) -> float:
    """The scale of the case's site."""
    return float(recording()["scale"][site_of(seed)])


@lru_cache(maxsize=64)
def _addends(rank: int, world_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One rank's addends of all recorded rows, [sites, tokens, columns]."""
    partial = recording()["partial"]
    if world_size > RANKS:
        share = partial[:, rank * RANKS // world_size] * (RANKS / world_size)
    else:
        step = RANKS // world_size
        share = partial[:, rank * step : (rank + 1) * step].sum(1)
    return share.to(device, dtype)


@lru_cache(maxsize=16)
def _recorded(name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    return recording()[name].to(device, dtype)


def _laid_out(table: Tensor, cells: Cells) -> Tensor:
    """The site's recorded rows from a seeded one on, in the case's width."""
    rows = (cells.row[:, 0] + hash64(cells.seed, 11) % table.shape[1]) % table.shape[1]
    return to_width(table[site_of(cells.seed)].index_select(0, rows), cells.hidden)


def to_width(rows: Tensor, hidden: int) -> Tensor:
    """Rows [count, width] with their columns repeated or cut to [count, hidden]."""
    return rows.repeat(1, -(-hidden // rows.shape[1]))[:, :hidden].contiguous()


def captured(cells: Cells, rank: int, world_size: int) -> Tensor:
    """A rank's addend, [rows, hidden]."""
    return _laid_out(_addends(rank, world_size, cells.format.dtype, cells.device), cells)


def captured_residual(cells: Cells) -> Tensor:
    """The residual, [rows, hidden]."""
    return _laid_out(_recorded("residual", cells.format.dtype, cells.device), cells)


def captured_gamma(cells: Cells) -> Tensor:
    """The norm's weight, [1, hidden]."""
    gamma = _recorded("gamma", cells.format.dtype, cells.device)
    return to_width(gamma[site_of(cells.seed)][None], cells.hidden)
