"""What the ranks of an evaluated model tell each other outside the kernel: through their group, or their board."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor

from fusecheck.interface import Rank


def sum_over_ranks(x: Tensor, rank: Rank) -> Tensor:
    """The sum of every rank's tensor; `x` may be overwritten."""
    if rank.world_size == 1:
        return x
    board = getattr(rank, "board", None)
    if board is not None:
        total: Tensor = functools.reduce(torch.add, board.gather(rank.index, x))
        return total
    dist.all_reduce(x, group=rank.group)
    return x


def told_by_first(x: Tensor, rank: Rank) -> Tensor:
    """Rank 0's tensor, on every rank; all have its shape and dtype. `x` may be overwritten."""
    if rank.world_size == 1:
        return x
    board = getattr(rank, "board", None)
    if board is not None:
        first: Tensor = board.gather(rank.index, x)[0]
        return first
    dist.broadcast(x, 0, group=rank.group)
    return x


def every_rank(x: Tensor, rank: Rank) -> list[Tensor]:
    """Every rank's tensor, in rank order; all have its shape and dtype."""
    if rank.world_size == 1:
        return [x]
    board = getattr(rank, "board", None)
    if board is not None:
        found: list[Tensor] = board.gather(rank.index, x)
        return found
    # As bytes: gloo knows few dtypes.
    whole = x.contiguous().view(torch.uint8)
    gathered = [torch.empty_like(whole) for _ in range(rank.world_size)]
    dist.all_gather(gathered, whole, group=rank.group)
    return [part.view(x.dtype) for part in gathered]
