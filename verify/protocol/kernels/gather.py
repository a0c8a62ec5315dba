"""A push all-gather behind a fence between ranks: the routing buffer of Megatron-LM's NVLS inference path.

A rank clears its buffer, meets the others, and then each pushes its rows to all. What is cleared must be clear before
the first peer is past the fence.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusecheck.protocol.language import (
    ACQUIRE,
    RELEASE,
    SENTINEL,
    Array,
    Block,
    Launch,
    Program,
    Size,
    at_least,
    data,
    read,
    store,
    wait,
)

BUFFER = Array("routing", SENTINEL)
"""[rank, sender, row]: entries; the sentinel is -1, "no route"."""

FENCE = Array("fence")
"""[rank, block, peer]: fences that the peer's block has reached."""


@dataclass(frozen=True)
class Gather:
    """The exchange of a call.

    Attributes:
        name: of the model.
        clears: `before` the fence, or `after` it.
    """

    name: str = "push all-gather"
    clears: str = "before"

    def launches(self, size: Size) -> list[Launch]:
        """One launch a call."""
        return size.each(self.kernel, self.name)

    def kernel(self, b: Block) -> Program:
        """One block of one call; fences are counted from the number of the call."""
        if self.clears == "before":
            yield from self.clear(b)
        yield from self.fence(b, 2 * b.call + 1, "fence 1")
        if self.clears == "after":
            yield from self.clear(b)
        for row in b.mine():
            for peer in range(b.ranks):
                yield store(BUFFER[peer, b.rank, row], data(b.call, b.rank), does="push")
        yield from self.fence(b, 2 * b.call + 2, "fence 2")
        for row in b.mine():
            for sender in range(b.ranks):
                yield read(BUFFER[b.rank, sender, row], data(b.call, sender), does="read the rows")

    def clear(self, b: Block) -> Program:
        """Fill the own buffer with "no route"."""
        for row in b.mine():
            for sender in range(b.ranks):
                yield store(BUFFER[b.rank, sender, row], SENTINEL, does="clear")

    def fence(self, b: Block, count: int, does: str) -> Program:
        """Tell every peer's block, and wait for each."""
        for peer in range(b.ranks):
            yield store(FENCE[peer, b.index, b.rank], count, RELEASE, does=does)
        for peer in range(b.ranks):
            yield wait(FENCE[b.rank, b.index, peer], at_least(count), ACQUIRE, does=does)
