"""What ranks exchange through memory that they share."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fusecheck.graph.exchange import PAGE, SharedGather

RANKS = 3


class ThreadRank:
    """A rank that is a thread: its memory is every thread's."""

    world_size = RANKS
    device = torch.device("cpu")
    group: ProcessGroup | None = None

    def __init__(self, index: int, memory: list[Tensor]) -> None:
        self.index, self.memory = index, memory

    def symmetric(self, name: str, nbytes: int) -> list[Tensor]:
        """Every rank's buffer."""
        del name
        return [buffer[:nbytes] for buffer in self.memory]


def on_every_rank(act: Callable[[int, SharedGather], list[Tensor]]) -> list[list[Tensor]]:
    """What each rank gets."""
    memory = [torch.zeros(4 * PAGE, dtype=torch.uint8) for _ in range(RANKS)]
    with ThreadPoolExecutor(RANKS) as threads:
        gathers = [threads.submit(SharedGather, ThreadRank(index, memory)) for index in range(RANKS)]
        asked = [threads.submit(act, index, gather.result()) for index, gather in enumerate(gathers)]
        return [each.result() for each in asked]


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, PAGE)])
def test_every_rank_gets_every_ranks_bytes_in_order_each_time(shape: tuple[int, ...]) -> None:
    def act(index: int, gather: SharedGather) -> list[Tensor]:
        rounds = [gather(torch.full(shape, 16 * time + index, dtype=torch.uint8)) for time in range(4)]
        return [each for received in rounds for each in received]

    wanted = [torch.full(shape, 16 * time + index, dtype=torch.uint8) for time in range(4) for index in range(RANKS)]
    for received in on_every_rank(act):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(received, wanted, strict=True))


def test_ranks_that_exchange_different_sizes_say_so() -> None:
    with pytest.raises(RuntimeError, match="a rank exchanges 8 bytes where this one has 7"):
        on_every_rank(lambda index, gather: gather(torch.zeros(7 + index, dtype=torch.uint8)))
