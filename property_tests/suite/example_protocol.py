"""A protocol of one's own for `fusecheck protocol --model`: a push all-reduce behind flags that count.

    fusecheck protocol --model fusecheck.property_tests.suite.example_protocol:Pushed
    fusecheck protocol --model fusecheck.property_tests.suite.example_protocol:Careless

Each rank pushes its rows to all, raises a flag at each, and waits for theirs. Two buffers take turns, so that a fast
rank does not write what a slow one still reads: it cannot be two calls ahead. With one buffer it can write too early.
"""

from __future__ import annotations

from fusecheck.protocol.language import (
    ACQUIRE,
    POISON,
    RELEASE,
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

ROWS = Array("rows", POISON)  # [rank, buffer, sender, row]
FLAG = Array("flag")  # [rank, block, sender]: calls that the sender's block has pushed


class Pushed:
    """The model: what every rank launches, in the order of its host."""

    buffers = 2

    def launches(self, size: Size) -> list[Launch]:
        """One launch a call on every rank; `size.block` says how many blocks and rows."""
        return size.each(self.kernel, "push")

    def kernel(self, b: Block) -> Program:
        """One block of one call; the order and scope of each access as in the kernel."""
        buffer = b.call % self.buffers
        for row in b.mine():
            for peer in range(b.ranks):
                yield store(ROWS[peer, buffer, b.rank, row], data(b.call, b.rank), does="push")
        for peer in range(b.ranks):
            yield store(FLAG[peer, b.index, b.rank], b.call + 1, RELEASE, does="raise the flags")
        for sender in range(b.ranks):
            yield wait(FLAG[b.rank, b.index, sender], at_least(b.call + 1), ACQUIRE, does="wait for the flags")
        for row in b.mine():
            for sender in range(b.ranks):
                yield read(ROWS[b.rank, buffer, sender, row], data(b.call, sender), does="add up")


class Careless(Pushed):
    """The same with a single buffer."""

    buffers = 1
