"""Expert tensors of a Problem: what an MoE collective sums into each rank's addend."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch
from torch import Tensor

from fusecheck.inputs.cells import Cells, hash64
from fusecheck.operations import Collective
from fusecheck.problem import Problem
from fusecheck.stages.experts import Experts

TERMS = 4
"""Experts of a reduction, and routes of a token."""
ROUTED_SCALING = 2.5
"""DeepSeek-V3's; applied by the finalize collective."""
_WEIGHT, _SHARED, _MISSING = 201, 202, 203

Addend = Callable[[Cells, int, int], Tensor]
"""An input family's: (cells, rank, world size) -> [rows, hidden]."""


def expert_inputs(problem: Problem, addend: Addend, rank: int, device: torch.device) -> Experts:
    """The expert tensors of one rank; each term is an addend of the input family, with data of its own.

    A reduction weighs by float32, its terms' weights add up to about one. Finalize gathers by a permutation that is not
    the identity, and one route in eight is missing. The shared expert is on rank 0 alone.
    """

    def cells(term: int, rows: int) -> Cells:
        return Cells(hash64(problem.seed, 200, term), 0, rows, problem.hidden, problem.format, device)

    tokens, native = problem.tokens, problem.format.dtype
    shared = addend(cells(_SHARED, tokens), 0, problem.world_size) if rank == 0 else None
    drawn = cells(_WEIGHT, tokens)
    weight = torch.cat([0.5 + drawn.row_bits(term).to(torch.float32) / 2**16 for term in range(TERMS)], dim=-1) / TERMS
    if problem.op.collective is Collective.MOE_REDUCTION:
        each = torch.stack([addend(cells(term, tokens), rank, problem.world_size) for term in range(TERMS)])
        return Experts(each, weight.T.contiguous(), None, shared)
    table = addend(cells(0, tokens * TERMS), rank, problem.world_size)
    count = tokens * TERMS
    stride = next(step for step in range(hash64(problem.seed, 204) % count + 3, 4 * count + 8) if gcd(step, count) == 1)
    rows = (torch.arange(count, device=device) * stride + 1) % count
    rows = rows.to(torch.int32).view(tokens, TERMS)
    missing = torch.cat([drawn.row_bits(_MISSING + route) % 8 == 0 for route in range(TERMS)], dim=-1)
    return Experts(table, weight.to(native), rows.masked_fill(missing, -1), shared, ROUTED_SCALING)
