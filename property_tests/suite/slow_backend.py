"""Right kernels whose ranks are out of step: a delay alone is no fault."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from fusecheck.backends.emulated import EmulatedBackend
from fusecheck.backends.emulated_protocol import Lamport, TwoShot

DELAY = 0.01


class SlowLamport(Lamport):
    """The last rank clears late, as in the fault that clears the wrong buffer."""

    def clear_previous(self, elements: int) -> None:
        """Dawdle, then clear what is to be cleared."""
        if self.index == self.world_size - 1:
            time.sleep(DELAY)
        super().clear_previous(elements)


class SlowTwoShot(TwoShot):
    """The last rank reads and pushes late, but within the barriers."""

    def gather(self, partial: Tensor, rows: slice) -> list[Tensor]:
        """Dawdle, then read."""
        if self.index == self.world_size - 1:
            time.sleep(DELAY)
        return super().gather(partial, rows)

    def push(self, rows: slice, summed: Tensor, tokens: int, sum_dtype: torch.dtype) -> None:
        """Dawdle, then push."""
        if self.index == self.world_size - 1:
            time.sleep(DELAY)
        super().push(rows, summed, tokens, sum_dtype)


class SlowBackend(EmulatedBackend):
    """The emulated kernel with both."""

    def __init__(self) -> None:
        super().__init__("trtllm", oneshot=SlowLamport, twoshot=SlowTwoShot)
        self.name = "slow"
