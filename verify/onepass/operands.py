"""Operands of a case on a CUDA rank: Gaussian ones by one kernel each, the others by `fusecheck.inputs.rank_inputs`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusecheck.formats.binary import Format
from fusecheck.inputs.cells import hash64, normal_table
from fusecheck.inputs.gammas import GAMMA_SEED
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import RankInputs
from fusecheck.problem import Problem

_RESIDUAL = 100
"""The residual's stream of random bits, as in `families`."""


@dataclass(frozen=True)
class Made:
    """What a rank made for one case.

    Attributes:
        inputs: this rank's operands, all rows.
        partials: every rank's addend for this rank's share of the rows, [world_size, share, hidden].
    """

    inputs: RankInputs
    partials: Tensor


def make(problem: Problem, index: int, share: range, device: torch.device) -> Made:
    """The operands of a case; bit for bit those of `fusecheck.inputs.rank_inputs`."""
    source = Inputs(problem, device)
    if problem.family != "gaussian" or problem.hidden % 2:
        inputs = source.of_rank(index)
        others = (
            inputs.partial[share.start : share.stop] if r == index else source.partial(r, share)
            for r in range(problem.world_size)
        )
        return Made(inputs, torch.stack(list(others)))
    table = normal_table(float((2 * problem.world_size) ** -0.5), problem.format, device)
    rows = range(problem.tokens)
    partials = torch.empty(problem.world_size, len(share), problem.hidden, dtype=problem.format.dtype, device=device)
    for rank in range(problem.world_size):
        _fill(partials[rank], problem.seed, rank, share, table)
    partial = torch.empty(problem.tokens, problem.hidden, dtype=problem.format.dtype, device=device)
    residual = torch.empty_like(partial)
    _fill(partial, problem.seed, index, rows, table)
    _fill(residual, problem.seed, _RESIDUAL, rows, normal_table(0.5**0.5, problem.format, device))
    inputs = RankInputs(
        partial, residual, _gamma(problem, source, device), _scale(problem, device), problem.eps, problem.weight_bias
    )
    return Made(inputs, partials)


def _gamma(problem: Problem, source: Inputs, device: torch.device) -> Tensor:
    if problem.gamma != "spread":
        return source.gamma()
    gamma = torch.empty(1, problem.hidden, dtype=problem.format.dtype, device=device)
    _fill(gamma, hash64(problem.seed, GAMMA_SEED), 0, range(1), _spread_table(problem.format, device))
    return gamma[0]


def _scale(problem: Problem, device: torch.device) -> Tensor:
    """The scale, filled on the device: a copy from the host would wait for it."""
    return torch.full((1,), float(np.float32(problem.scale)), dtype=torch.float32, device=device)


@lru_cache(maxsize=8)
def _spread_table(fmt: Format, device: torch.device) -> Tensor:
    """1 + every value of the table that gamma is drawn from, as `families` rounds it."""
    values = normal_table(0.15, fmt, device).view(fmt.dtype)
    return (1 + values.to(torch.float32)).to(fmt.dtype).view(torch.int16)


def _fill(out: Tensor, seed: int, stream: int, rows: range, table: Tensor) -> None:
    """Draw rows of a stream of random bits through a table of values."""
    if not len(rows):
        return
    from fusecheck.onepass import kernels

    words = out.shape[-1] // 2
    base = hash64(seed, stream)
    signed = base - 2**64 if base >= 2**63 else base
    launch: Any = kernels.generate
    launch[(len(rows),)](
        out.view(torch.int32), table, signed, rows.start, words, WORDS=power_of_two(words), num_warps=4
    )


def power_of_two(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()
