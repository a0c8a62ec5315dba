"""Pull, one stage or two: the custom all-reduce of vLLM and AITER (custom_all_reduce.cuh).

One stage: barrier, read all rows of all ranks, barrier. Two: barrier, add up the own share into a buffer of one's own,
barrier, read the sums of the others. The rows lie in a buffer that the kernel in front fills. A barrier counts: block
and peer have a slot, in two sets that take turns, and the count of the barrier is what is awaited in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fusecheck.protocol.language import (
    ACQUIRE,
    POISON,
    RELEASE,
    SYS,
    TOTAL,
    Array,
    Block,
    Launch,
    Order,
    Program,
    Scope,
    Size,
    among,
    data,
    load,
    read,
    store,
    wait,
)

ROWS = Array("input", POISON)
"""[rank, token]: what is added up."""

SUMS = Array("scratch", POISON)
"""[rank, row]: the sums of the rank's share."""

SIGNAL = Array("signal")
"""[rank, set, block, peer]: the count that the peer's block has reached."""

COUNT = Array("count")
"""[rank, block]: barriers passed."""


@dataclass(frozen=True)
class Pull:
    """The kernel, and the places in which its faults differ.

    Attributes:
        name: of the model.
        stages: 1 or 2.
        end_barrier: whether a kernel of one stage waits until all have read its rows; two stages need no third barrier.
        release: the order in which a barrier's signal is stored.
        acquire: and awaited.
        scope: of both.
        counted: whether the count goes on from call to call; otherwise it is the host's, baked into a captured call.
        short: ranks that launch one block only, whatever the others do.
    """

    name: str = "pull"
    stages: int = 2
    end_barrier: bool = True
    release: Order = RELEASE
    acquire: Order = ACQUIRE
    scope: Scope = SYS
    counted: bool = True
    short: Sequence[int] = ()

    def launches(self, size: Size) -> list[Launch]:
        """A kernel that fills the input and the all-reduce, each call."""
        made = []
        for rank in range(size.ranks):
            for call in range(size.calls):
                block = size.block(rank, call)
                made.append(Launch(self.fill, block, "fill"))
                few = replace(block, grid=1) if rank in self.short else block
                made.append(Launch(self.kernel, few, self.name))
        return made

    def fill(self, b: Block) -> Program:
        """Write the rows to be added up: a share of `b.rows` tokens for each rank."""
        for token in b.mine(b.rows * b.ranks):
            yield store(ROWS[b.rank, token], data(b.call, b.rank), does="fill the input")

    def kernel(self, b: Block) -> Program:
        """One block of one call."""
        count = 0
        if self.counted:
            count = yield load(COUNT[b.rank, b.index], does="read the count")
        count = yield from self.barrier(b, count, "barrier 1")
        for token in self.tokens(b):
            for peer in range(b.ranks):
                yield read(ROWS[peer, token], data(b.call, peer), does="add up")
            if self.stages == 2:
                yield store(SUMS[b.rank, token - b.rank * b.rows], data(b.call, TOTAL), does="store the sums")
        if self.stages == 2:
            count = yield from self.barrier(b, count, "barrier 2")
            for peer in range(b.ranks):
                for row in b.mine():
                    yield read(SUMS[peer, row], data(b.call, TOTAL), does="read the sums")
        elif self.end_barrier:
            count = yield from self.barrier(b, count, "barrier 2")
        yield store(COUNT[b.rank, b.index], count, does="keep the count")

    def tokens(self, b: Block) -> range | list[int]:
        """The tokens that this block adds up: of the own share in two stages, of all in one."""
        return [b.rank * b.rows + row for row in b.mine()] if self.stages == 2 else b.mine(b.rows * b.ranks)

    def barrier(self, b: Block, count: int, does: str) -> Program:
        """Signal every peer's block, then wait for each; returns the count that was reached."""
        count += 1
        for peer in range(b.ranks):
            yield store(SIGNAL[peer, count % 2, b.index, b.rank], count, self.release, self.scope, does=does)
        for peer in range(b.ranks):
            yield wait(SIGNAL[b.rank, count % 2, b.index, peer], among(count), self.acquire, self.scope, does=does)
        return count
