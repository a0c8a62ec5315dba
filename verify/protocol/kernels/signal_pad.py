"""Signal pads: `one_shot_all_reduce` of torch's symmetric memory (CUDASymmetricMemoryOps.cu).

Every rank leaves its rows in a buffer that all can read. A barrier, each adds up what it reads from all, and a barrier
again, so that nobody writes the next rows before all have read these. A signal is a compare-and-swap from 0 to 1 by
the sender and back by the receiver, in a slot of the pair and the channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from fusecheck.protocol.language import (
    ACQUIRE,
    RELAXED,
    RELEASE,
    Array,
    Block,
    Cell,
    Launch,
    Order,
    Program,
    Size,
    among,
    data,
    read,
    store,
    swap,
)

PAD = Array("signal_pad")
"""[rank, slot]: raised by one peer, lowered by the rank."""

BUFFER = Array("buffer")
"""[rank, stream, row]: where the rows lie."""


@dataclass(frozen=True)
class SignalPad:
    """The all-reduce of each call behind the kernel that fills the buffer.

    Attributes:
        name: of the model.
        groups: the ranks of each call in turn; empty for all ranks in every call.
        own_slots: whether groups, and streams, have slots of their own.
        streams: that calls are issued on in turn.
        channels: that the pad has room for; None for enough. Slots beyond lie in the buffer.
        zeroed: whether each rank zeroes its pad with a kernel of its own, `late`, or before anybody knows of it.
        end_barrier: whether there is one.
    """

    name: str = "signal pad"
    groups: Sequence[Sequence[int]] = ()
    own_slots: bool = True
    streams: int = 1
    channels: int | None = None
    zeroed: str = "before"
    end_barrier: bool = True

    def launches(self, size: Size) -> list[Launch]:
        """A kernel that fills the buffer and the all-reduce, each call."""
        made = []
        for rank in range(size.ranks):
            if self.zeroed == "late":
                made.append(Launch(self.zero, size.block(rank, 0), "zero the pad"))
            for call in range(size.calls):
                group = self.groups[call % len(self.groups)] if self.groups else range(size.ranks)
                if rank not in group:
                    continue
                block, stream = size.block(rank, call), call % self.streams
                made.append(Launch(partial(self.fill, stream), block, "fill", stream))
                made.append(Launch(partial(self.reduce, stream, list(group), size), block, self.name, stream))
        return made

    def zero(self, b: Block) -> Program:
        """Zero the own pad."""
        if b.index == 0:
            for peer in range(b.ranks):
                yield store(PAD[b.rank, peer], 0, does="zero the pad")

    def fill(self, stream: int, b: Block) -> Program:
        """Write the rows to be added up."""
        for row in b.mine():
            yield store(BUFFER[b.rank, stream, row], data(b.call, b.rank), does="fill the buffer")

    def reduce(self, stream: int, group: list[int], size: Size, b: Block) -> Program:
        """Barrier, add up, barrier."""
        channel = b.index
        if self.own_slots:
            families = max(len(self.groups), self.streams)
            channel += size.blocks * (b.call % families)
        yield from self.barrier(b, group, channel, RELAXED, ACQUIRE, "barrier 1")
        for row in b.mine():
            for peer in group:
                yield read(BUFFER[peer, stream, row], data(b.call, peer), does="add up")
        if self.end_barrier:
            yield from self.barrier(b, group, channel, RELEASE, RELAXED, "barrier 2")

    def barrier(self, b: Block, group: list[int], channel: int, put: Order, take: Order, does: str) -> Program:
        """`sync_remote_blocks`: signal every peer, then wait for every peer."""
        width = b.ranks if self.own_slots else len(group)
        me = group.index(b.rank)
        for peer in group:
            yield swap(self.slot(peer, width * channel + me, width), among(0), 1, put, does=does)
        for place in range(len(group)):
            yield swap(self.slot(b.rank, width * channel + place, width), among(1), 0, take, does=does)

    def slot(self, rank: int, place: int, width: int) -> Cell:
        """A slot; behind the last one begins the buffer."""
        if self.channels is not None and place >= width * self.channels:
            return BUFFER[rank, 0, (place - width * self.channels) // width]
        return PAD[rank, place]
