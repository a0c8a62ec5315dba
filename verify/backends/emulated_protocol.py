"""The fused kernel's two protocols over shared memory, one overridable method a step.

`Lamport` is the one-shot: every rank writes its partial sums into all peers' buffers,
and a receiver knows that an element has arrived when its bits are no longer the
sentinel. `TwoShot` copies, meets at a barrier, reduces its own tokens, pushes the
sums to all, and meets again. Steps and names follow TensorRT-LLM's and FlashInfer's
kernels (publish, canonicalise, wait, clear_previous, rotate, signal, barrier).

All state that outlives a call (flags, epochs, clear sizes) lies in the shared
buffers, as on the GPU. Waits have no deadline: the parent of the ranks has one.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusecheck.interface import Limits, Rank

SENTINEL = -0x8000
"""The bits of -0.0 in bf16 and fp16, as int16: "not yet written"."""

HEADER_BYTES = 4096
"""Room for the control words before the payload; one page, so that the payload stays aligned."""

IN_USE, EPOCH, FLAG, CLEAR_SIZE, COMPLETED = range(5)
"""Control words of a rank's buffer: claimed; barriers passed; the Lamport third; elements to clear; calls done."""

ARRIVED = 16
"""First of the control words in which the peers, in rank order, leave the epoch that they have reached."""

BLOCK_ELEMENTS = 1 << 17
"""Elements of one block of rows: few enough to stay in the cache, enough to hide what a torch call costs."""

THIRDS = 3
"""Rotating Lamport buffers: one being written, one being cleared, one that is clean."""

ONESHOT_BYTES = 64 << 20
"""The most that one rotating third may hold, every rank's rows together; larger calls must go two-shot."""

YIELDS = 20
"""Polls before a waiting rank starts to sleep."""

PAUSE_SECONDS = 20e-6
"""The shortest sleep; the system adds its timer slack, some 50 us."""

Total = Callable[[Sequence[Tensor]], Tensor]
"""Sums the ranks' blocks, [rows, hidden] each, to one."""


class Exchange(Protocol):
    """One protocol of the all-reduce, on one rank."""

    def sums(self, partial: Tensor, total: Total, sum_dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Exchange `partial`, [tokens, hidden], and yield every block of rows with its sum over ranks.

        A collective call. The exchange is complete when the iterator is exhausted.
        """
        ...

    def close(self) -> None:
        """Give the shared buffer back for the next workspace."""
        ...


def row_blocks(begin: int, end: int, hidden: int) -> Iterator[slice]:
    """Cut rows begin..end into blocks of about `BLOCK_ELEMENTS` elements."""
    step = max(1, BLOCK_ELEMENTS // hidden)
    for first in range(begin, end, step):
        yield slice(first, min(first + step, end))


def wait_until(ready: Callable[[], bool]) -> None:
    """Poll until `ready`, giving the core away: first at once, then for a quarter of the time waited, at most 1 ms."""
    for _ in range(YIELDS):
        if ready():
            return
        os.sched_yield()
    began = time.monotonic()
    while not ready():
        time.sleep(min(max(PAUSE_SECONDS, (time.monotonic() - began) / 4), 1e-3))


def fence() -> None:
    """Make earlier stores visible before later ones, also where the processor may reorder them.

    Python offers no fence; two lock round-trips order the stores around them.
    """
    for _ in range(2):
        with threading.Lock():
            pass


class SharedBuffers:
    """Every rank's buffer of one kind: control words and payload, with a barrier over them."""

    def __init__(self, rank: Rank, kind: str, nbytes: int) -> None:
        """Map buffers with `nbytes` of payload a rank; a collective call.

        Sizes are rounded up to few different ones, and a closed workspace's memory is
        taken again, so that many workspaces in one process do not pile up.
        """
        self.index, self.world_size = rank.index, rank.world_size
        step = max(HEADER_BYTES, 1 << nbytes.bit_length() - 3)
        size = HEADER_BYTES + -(-nbytes // step) * step
        for serial in itertools.count():
            buffers = rank.symmetric(f"emulated-{kind}-{size}-{serial}", size)
            self.headers: list[NDArray[np.int64]] = [b[:HEADER_BYTES].view(torch.int64).numpy() for b in buffers]
            self.payloads = [b[HEADER_BYTES:] for b in buffers]
            # Ranks make the same calls in the same order, so that all find the same serial free.
            if not self.words[IN_USE]:
                break
        self.words[IN_USE] = 1

    @property
    def words(self) -> NDArray[np.int64]:
        """This rank's own control words."""
        return self.headers[self.index]

    def barrier(self, phase: str) -> None:
        """Wait until every rank has come here; `phase` (open, copied, reduced) names the place."""
        del phase
        epoch = self.next_epoch()
        fence()
        self.arrive(epoch)
        wait_until(lambda: self.arrived(epoch))
        fence()

    def next_epoch(self) -> int:
        """Count this rank's barriers, from 1; the count outlives the workspace, as the memory does."""
        self.words[EPOCH] += 1
        return int(self.words[EPOCH])

    def arrive(self, epoch: int) -> None:
        """Tell every peer that this rank has reached the epoch."""
        for header in self.headers:
            header[ARRIVED + self.index] = epoch

    def arrived(self, epoch: int) -> bool:
        """Whether every peer has reached this epoch or a later one."""
        return bool((self.words[ARRIVED : ARRIVED + self.world_size] >= epoch).all())

    def signal(self) -> None:
        """P5: tell the consumer that the outputs are there."""
        self.words[COMPLETED] += 1

    def close(self) -> None:
        """Give the memory back for the next workspace."""
        self.words[IN_USE] = 0


class Lamport(SharedBuffers):
    """One-shot: publish to all peers, poll for the sentinel to vanish, three rotating buffers."""

    def __init__(self, rank: Rank, limits: Limits) -> None:
        """Map and fill the three thirds with the sentinel; a collective call."""
        needed = limits.max_tokens * limits.hidden * limits.dtype.itemsize * rank.world_size
        third_bytes = min(needed, ONESHOT_BYTES)
        super().__init__(rank, "oneshot", THIRDS * third_bytes)
        self.capacity = third_bytes // limits.dtype.itemsize
        self.bits = [payload.view(torch.int16) for payload in self.payloads]
        self.bits[self.index].fill_(SENTINEL)
        self.words[FLAG] = self.words[CLEAR_SIZE] = 0
        self.barrier("open")

    def sums(self, partial: Tensor, total: Total, sum_dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """See `Exchange.sums`."""
        del sum_dtype
        self.publish(partial)
        for rows in row_blocks(0, *partial.shape):
            yield rows, total(self.receive(partial, rows))
        elements = partial.numel() * self.world_size
        self.clear_previous(elements)
        self.rotate(elements)
        self.signal()

    def third(self) -> int:
        """The rotating buffer of this call: 0, 1 or 2."""
        return int(self.words[FLAG]) % THIRDS

    def slot(self, peer: int, elements: int) -> Tensor:
        """Where this rank writes its `elements` in `peer`'s buffer, as int16; slots lie packed by the call's size."""
        start = self.third() * self.capacity + self.index * elements
        return self.bits[peer][start : start + elements]

    def arrivals(self, elements: int) -> Tensor:
        """Where this rank reads all senders' slots of `elements`, [world_size, elements] int16."""
        start = self.third() * self.capacity
        return self.bits[self.index][start : start + self.world_size * elements].view(self.world_size, elements)

    def publish(self, partial: Tensor) -> None:
        """P1: write the canonical partial sums into every peer's slot for this rank."""
        bits = self.canonicalise(partial.reshape(-1).view(torch.int16))
        for peer in range(self.world_size):
            self.slot(peer, bits.numel()).copy_(bits)

    def canonicalise(self, bits: Tensor) -> Tensor:
        """Turn each -0.0 into +0.0, by its bits, so that no payload is the sentinel."""
        # -0.0 is the least int16, and a minimum is far cheaper than a comparison of each element.
        if bits.numpy().min() != SENTINEL:
            return bits
        return bits.masked_fill(bits == SENTINEL, 0)

    def receive(self, partial: Tensor, rows: slice) -> list[Tensor]:
        """Wait for these rows of every sender, and return them in rank order as [rows, hidden]."""
        hidden = partial.shape[1]
        bits = self.arrivals(partial.numel())[:, rows.start * hidden : rows.stop * hidden]
        self.wait(bits)
        return list(bits.view(partial.dtype).view(self.world_size, -1, hidden))

    def wait(self, bits: Tensor) -> None:
        """P2: spin until no element is the sentinel."""
        wait_until(lambda: not self.is_sentinel(bits))

    def is_sentinel(self, bits: Tensor) -> bool:
        """Whether any element still has the sentinel's bits (the least int16)."""
        return bool(bits.numpy().min() == SENTINEL)

    def clear_previous(self, elements: int) -> None:
        """P3: refill the previous call's third with the sentinel; `elements` is the size of this call."""
        start = (int(self.words[FLAG]) + THIRDS - 1) % THIRDS * self.capacity
        self.bits[self.index][start : start + self.clear_size(elements)].fill_(SENTINEL)

    def clear_size(self, elements: int) -> int:
        """How much the previous call wrote, all senders together: the stored size, whatever this call's is."""
        del elements
        return int(self.words[CLEAR_SIZE])

    def rotate(self, elements: int) -> None:
        """P4: move on to the next third, and store how much of this one is to be cleared."""
        self.words[CLEAR_SIZE] = elements
        self.words[FLAG] += 1


class TwoShot(SharedBuffers):
    """Two-shot: copy, barrier, reduce the own tokens, push the sums to all, barrier."""

    def __init__(self, rank: Rank, limits: Limits) -> None:
        """Map a region for copies and one for sums; a collective call."""
        elements = limits.max_tokens * limits.hidden
        self.copy_bytes = elements * limits.dtype.itemsize
        # Sums are float32 where the dataflow does not round them.
        super().__init__(rank, "twoshot", self.copy_bytes + elements * 4)
        self.barrier("open")

    def sums(self, partial: Tensor, total: Total, sum_dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """See `Exchange.sums`."""
        tokens, hidden = partial.shape
        self.copy_in(partial)
        self.barrier("copied")
        for rows in row_blocks(*self.token_shard(self.index, tokens), hidden):
            self.push(rows, total(self.gather(partial, rows)), tokens, sum_dtype)
        self.barrier("reduced")
        summed = self.reduced(self.index, tokens, hidden, sum_dtype)
        for rows in row_blocks(0, tokens, hidden):
            yield rows, summed[rows]
        self.signal()

    def token_shard(self, rank: int, tokens: int) -> tuple[int, int]:
        """First and past-the-last token that `rank` reduces: tokens // world_size each, the rest to the first ranks."""
        share, rest = divmod(tokens, self.world_size)
        begin = rank * share + min(rank, rest)
        return begin, begin + share + (rank < rest)

    def copied(self, peer: int, like: Tensor) -> Tensor:
        """`peer`'s copied partial sums, with the shape and dtype of `like`."""
        return self.payloads[peer][: like.nbytes].view(like.dtype).view(like.shape)

    def reduced(self, peer: int, tokens: int, hidden: int, dtype: torch.dtype) -> Tensor:
        """`peer`'s region of finished sums, [tokens, hidden]."""
        nbytes = tokens * hidden * dtype.itemsize
        return self.payloads[peer][self.copy_bytes : self.copy_bytes + nbytes].view(dtype).view(tokens, hidden)

    def copy_in(self, partial: Tensor) -> None:
        """P1: put this rank's partial sums where the peers read them."""
        self.copied(self.index, partial).copy_(partial)

    def gather(self, partial: Tensor, rows: slice) -> list[Tensor]:
        """Read these rows of every rank, in rank order."""
        return [self.copied(peer, partial)[rows] for peer in range(self.world_size)]

    def push(self, rows: slice, summed: Tensor, tokens: int, sum_dtype: torch.dtype) -> None:
        """Write the sums of this rank's tokens to every peer."""
        for peer in range(self.world_size):
            self.reduced(peer, tokens, summed.shape[1], sum_dtype)[rows].copy_(summed)
