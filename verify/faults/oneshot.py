"""Faults of the one-shot protocol: what is published, when a wait ends, what is cleared. One hook of `Lamport` each."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from fusecheck.backends.emulated_protocol import FLAG, SENTINEL, THIRDS, Lamport, Total
from fusecheck.interface import Limits, Rank

SKEW_SECONDS = 0.03
"""How long the last rank is held up where a fault needs ranks out of step; harmless in a right kernel."""

LEAST_NORMAL = 2.0**-126
BLOCK_ROWS, RESIDENT = 4, 4
"""KP-19: rows of a block, and blocks that run at a time."""


class ClearsFewer(Lamport):
    """KP-01: the previous third is cleared by the smaller of the two calls' sizes."""

    def clear_size(self, elements: int) -> int:
        """What both calls have in common."""
        return min(super().clear_size(elements), elements)


class FlushesSentinel(Lamport):
    """KP-02: the sentinel is recognised by a comparison that flushes subnormals, so that negative ones look like it."""

    def __init__(self, rank: Rank, limits: Limits) -> None:
        self.native = limits.dtype
        super().__init__(rank, limits)

    def is_sentinel(self, bits: Tensor) -> bool:
        """Whether any element is a negative zero after flushing."""
        value = bits.view(self.native).float()
        return bool(((value.abs() < LEAST_NORMAL) & value.signbit()).any())


class PublishesNegativeZero(Lamport):
    """KP-03: a true -0.0 is published as it is, and looks like an element that has not arrived."""

    def canonicalise(self, bits: Tensor) -> Tensor:
        """Leave the bits alone."""
        return bits


class SentinelByValue(Lamport):
    """KP-03: the sentinel is recognised by its value, so that +0.0 looks like it."""

    def is_sentinel(self, bits: Tensor) -> bool:
        """Whether any element is a zero of either sign."""
        return bool(((bits & 0x7FFF) == 0).any())


class CanonicalisesHalf(Lamport):
    """KP-03: of two adjacent lanes only the first is canonicalised."""

    def canonicalise(self, bits: Tensor) -> Tensor:
        """Every second element."""
        made = bits.clone()
        made[::2].masked_fill_(made[::2] == SENTINEL, 0)
        return made


class SlotOfCapture(Lamport):
    """KP-10: the rotating buffer is chosen at capture; a replay of the same call takes the same one again."""

    def __init__(self, rank: Rank, limits: Limits) -> None:
        self.captured: dict[int, int] = {}
        self.elements = 0
        super().__init__(rank, limits)

    def publish(self, partial: Tensor) -> None:
        """Note the size, which names the graph, then publish."""
        self.elements = partial.numel()
        super().publish(partial)

    def third(self) -> int:
        """The third that the first call of this size had."""
        return self.captured.setdefault(self.elements, super().third())


class OneBuffer(Lamport):
    """KP-11: a single buffer, used again before anybody knows that it has been read."""

    def third(self) -> int:
        """Always the first."""
        return 0


class ClearsNextThird(Lamport):
    """KP-15: what is cleared, after the exchange, is the buffer that fast peers are already writing to."""

    def clear_previous(self, elements: int) -> None:
        """Clear the next third, late on the last rank."""
        del elements
        if self.index == self.world_size - 1:
            time.sleep(SKEW_SECONDS)
        start = (int(self.words[FLAG]) + 1) % THIRDS * self.capacity
        self.bits[self.index][start : start + self.capacity].fill_(SENTINEL)


class SplitsEpoch(Lamport):
    """KP-16: one block advances the epoch before the others have picked their buffer."""

    def publish(self, partial: Tensor) -> None:
        """On the last rank, the second half of the rows goes to the next third."""
        if self.index != self.world_size - 1 or partial.shape[0] < 2:
            super().publish(partial)
            return
        bits, half = self.canonicalise(partial.reshape(-1).view(torch.int16)), partial.numel() // 2
        for peer in range(self.world_size):
            self.slot(peer, bits.numel())[:half].copy_(bits[:half])
        self.words[FLAG] += 1
        for peer in range(self.world_size):
            self.slot(peer, bits.numel())[half:].copy_(bits[half:])
        self.words[FLAG] -= 1


class RefillsAtStart(Lamport):
    """KP-17: the buffer is initialised again at the start of each call, over what fast peers have written."""

    def publish(self, partial: Tensor) -> None:
        """Fill the own third with the sentinel first."""
        start = self.third() * self.capacity
        self.bits[self.index][start : start + partial.numel() * self.world_size].fill_(SENTINEL)
        super().publish(partial)


class TooFewResidents(Lamport):
    """KP-19: blocks publish when they start, wait for their peers' blocks, and not all of them are resident."""

    def sums(self, partial: Tensor, total: Total, sum_dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Run `RESIDENT` blocks at a time, in an order that the scheduler is free to choose."""
        del sum_dtype
        tokens = partial.shape[0]
        blocks = [slice(t, min(t + BLOCK_ROWS, tokens)) for t in range(0, tokens, BLOCK_ROWS)]
        blocks = blocks[::-1] if self.index % 2 else blocks
        for first in range(0, len(blocks), RESIDENT):
            resident = blocks[first : first + RESIDENT]
            for rows in resident:
                self.publish_rows(partial, rows)
            for rows in resident:
                yield rows, total(self.receive(partial, rows))
        elements = partial.numel() * self.world_size
        self.clear_previous(elements)
        self.rotate(elements)
        self.signal()

    def publish_rows(self, partial: Tensor, rows: slice) -> None:
        """P1 for one block."""
        hidden = partial.shape[1]
        bits = self.canonicalise(partial[rows].reshape(-1).view(torch.int16))
        for peer in range(self.world_size):
            self.slot(peer, partial.numel())[rows.start * hidden : rows.stop * hidden].copy_(bits)


class MisreadsPointers(Lamport):
    """LW-01: the table of peers' pointers is written with room for 16 ranks and read with the world size's spacing."""

    def slot(self, peer: int, elements: int) -> Tensor:
        """Through the table; an entry that was never written points into the own buffer."""
        third, rank = divmod(self.third() * self.world_size + peer, 16)
        start = third * self.capacity + self.index * elements
        return self.bits[rank if rank < self.world_size else self.index][start : start + elements]


class WrapsCapacity(Lamport):
    """LW-02: the size of a rotating buffer overflows; 2^31 bytes in the original, 2^13 (2^12 elements) here."""

    def __init__(self, rank: Rank, limits: Limits) -> None:
        super().__init__(rank, limits)
        self.capacity %= 2**12


class FlushesOtherSlot(Lamport):
    """LW-07: a captured sequence predicts one slot for its k-th call and takes another."""

    def arrivals(self, elements: int) -> Tensor:
        """Read where call 2 k + 1 would be."""
        start = (2 * int(self.words[FLAG]) + 1) % THIRDS * self.capacity
        return self.bits[self.index][start : start + self.world_size * elements].view(self.world_size, elements)
