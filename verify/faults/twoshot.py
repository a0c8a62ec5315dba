"""Faults of the two-shot protocol: barriers, stale reads, the split of the tokens. One hook of `TwoShot` each."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fusecheck.backends.emulated_protocol import (
    ARRIVED,
    Total,
    TwoShot,
    row_blocks,
)
from fusecheck.faults.oneshot import SKEW_SECONDS
from fusecheck.interface import Limits, Rank

STALE_BYTES = 4096
"""KP-06: partial sums larger than this are read stale; about 1.2 MB in the original."""

IDLE_SECONDS = 0.02
"""KP-08: a pause that makes the next call a cold one."""


class NoExitBarrier(TwoShot):
    """KP-05: one stage that reads the peers' inputs, and returns without waiting until they have read its own."""

    def sums(self, partial: Tensor, total: Total, sum_dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Every rank reduces all rows; the last one is slow to read."""
        del sum_dtype
        self.copy_in(partial)
        self.barrier("copied")
        if self.index == self.world_size - 1:
            time.sleep(SKEW_SECONDS)
        for rows in row_blocks(0, *partial.shape):
            yield rows, total(self.gather(partial, rows))
        self.signal()


class ReadsBeforeFlag(TwoShot):
    """KP-06: the payload is loaded before the flag that says that it is there."""

    early: list[Tensor] | None = None

    def copy_in(self, partial: Tensor) -> None:
        """Load the peers' payload as soon as the own is stored."""
        super().copy_in(partial)
        large = partial.nbytes > STALE_BYTES
        self.early = [self.copied(peer, partial).clone() for peer in range(self.world_size)] if large else None

    def gather(self, partial: Tensor, rows: slice) -> list[Tensor]:
        """What was loaded early."""
        return super().gather(partial, rows) if self.early is None else [peer[rows] for peer in self.early]


class FlagBeforeStore(TwoShot):
    """KP-07: the counter is incremented without release, and becomes visible before the sums of the last rank."""

    def __init__(self, rank: Rank, limits: Limits) -> None:
        self.pending: list[tuple[slice, Tensor, int, torch.dtype]] = []
        super().__init__(rank, limits)

    def push(self, rows: slice, summed: Tensor, tokens: int, sum_dtype: torch.dtype) -> None:
        """Leave the stores in the write buffer."""
        self.pending.append((rows, summed, tokens, sum_dtype))

    def arrive(self, epoch: int) -> None:
        """Raise the flags, then let the stores drain."""
        super().arrive(epoch)
        if self.pending and self.index == self.world_size - 1:
            time.sleep(SKEW_SECONDS)
        for stores in self.pending:
            super().push(*stores)
        self.pending.clear()


class ColdStart(TwoShot):
    """KP-08: the start barrier is relaxed, and the first call after an idle gap reads before peers have written."""

    last = 0.0

    def barrier(self, phase: str) -> None:
        """Do not wait at the first barrier of a cold call."""
        cold = phase == "copied" and time.monotonic() - self.last > IDLE_SECONDS
        if cold:
            self.arrive(self.next_epoch())
        else:
            super().barrier(phase)
        if phase == "reduced":
            self.last = time.monotonic()


class BakedEpoch(TwoShot):
    """KP-09: the round's number is a host scalar, baked into a captured call; a replay accepts the old flags."""

    def __init__(self, rank: Rank, limits: Limits) -> None:
        self.captured: set[tuple[str, int]] = set()
        self.elements = 0
        super().__init__(rank, limits)

    def copy_in(self, partial: Tensor) -> None:
        """Note the call's shape, which names its graph."""
        self.elements = partial.numel()
        super().copy_in(partial)

    def barrier(self, phase: str) -> None:
        """Wait in the first call of a shape; its flags satisfy every later one."""
        if (phase, self.elements) not in self.captured:
            super().barrier(phase)
            self.captured.add((phase, self.elements))


class FlagBytesRace(TwoShot):
    """KP-14: the flags of all ranks are bytes of one word, and a rank's store writes the whole word."""

    def arrive(self, epoch: int) -> None:
        """Read a peer's word, change the own byte, write the word back."""
        shift = 8 * self.index
        for header in self.headers:
            word = int(header[ARRIVED])
            time.sleep(0.0005)
            word = word & ~(0xFF << shift) | epoch % 256 << shift
            header[ARRIVED] = np.array(word & (2**64 - 1), np.uint64).astype(np.int64)

    def arrived(self, epoch: int) -> bool:
        """Whether every byte has this epoch or a later one."""
        word = int(self.words[ARRIVED])
        flags = [word >> 8 * peer & 0xFF for peer in range(min(self.world_size, 8))]
        return all((flag - epoch) % 256 < 128 for flag in flags)


class FlagStride(TwoShot):
    """LW-03: the flags are written as int64 and read as int32."""

    def arrived(self, epoch: int) -> bool:
        """Read words of half the size."""
        flags = self.words[ARRIVED:].view(np.int32)
        return bool((flags[: self.world_size] >= epoch).all())


class UnequalGrids(TwoShot):
    """LW-04: ranks choose different numbers of blocks, and each block waits for its peer."""

    def barrier(self, phase: str) -> None:
        """One block more on the last rank."""
        super().barrier(phase)
        if phase != "open" and self.index == self.world_size - 1:
            super().barrier(phase)


class WaitsForWorld(TwoShot):
    """LW-05: the rendezvous is over the whole world, of which this is one group of two."""

    def arrived(self, epoch: int) -> bool:
        """Wait for twice as many ranks."""
        return bool((self.words[ARRIVED : ARRIVED + 2 * self.world_size] >= epoch).all())


class AliasedPeer(TwoShot):
    """LW-06: rank 0's mapping of the last rank's buffer is another rank's."""

    def copied(self, peer: int, like: Tensor) -> Tensor:
        """Read the neighbour's buffer for the last one."""
        wrong = self.index == 0 and peer == self.world_size - 1 and peer > 0
        return super().copied(peer - 1 if wrong else peer, like)


class ForgetsRemainder(TwoShot):
    """LW-09: the first token of a rank is computed without the remainder."""

    def token_shard(self, rank: int, tokens: int) -> tuple[int, int]:
        """Begin at rank * share."""
        share, rest = divmod(tokens, self.world_size)
        return rank * share, rank * share + share + (rank < rest)


class DropsRemainder(TwoShot):
    """LW-09: tokens beyond world_size * (tokens // world_size) are nobody's."""

    def token_shard(self, rank: int, tokens: int) -> tuple[int, int]:
        """Equal shares only."""
        share = tokens // self.world_size
        return rank * share, (rank + 1) * share


class RemainderToLast(TwoShot):
    """LW-09: the first tokens are computed for a remainder at the front, the ends for one at the back."""

    def token_shard(self, rank: int, tokens: int) -> tuple[int, int]:
        """Begin as the right kernel does, end elsewhere."""
        share, rest = divmod(tokens, self.world_size)
        begin = rank * share + min(rank, rest)
        return begin, min(tokens, begin + share + (rest if rank == self.world_size - 1 else 0))
