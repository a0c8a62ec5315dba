"""PDL: a producer, the fused kernel and a consumer in one stream, each started before the one in front has ended.

`griddepcontrol.launch_dependents` lets the next kernel start, and promises nothing about stores;
`griddepcontrol.wait` waits for the end of the kernel in front. The fused kernel is one-shot Lamport in between.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusecheck.protocol.kernels.oneshot import OneShot
from fusecheck.protocol.language import (
    BEFORE,
    POISON,
    TOTAL,
    Array,
    Block,
    Launch,
    Program,
    Size,
    data,
    grid_wait,
    read,
    store,
    trigger,
)

RESIDUAL = Array("residual", BEFORE)
"""[rank, call, row]: the operand that the kernel in front writes."""

OUTPUT = Array("output", POISON)
"""[rank, call, row]: what the fused kernel writes and the kernel behind reads."""


@dataclass(frozen=True)
class HandOver:
    """Three kernels a call.

    Attributes:
        name: of the model.
        reads_early: whether the fused kernel reads its first residual row before it waits for the grid in front.
        triggers: whether it lets its dependents go at the `start`, or at the `end`.
        consumer_waits: whether the kernel behind waits for it.
    """

    name: str = "hand-over"
    reads_early: bool = False
    triggers: str = "end"
    consumer_waits: bool = True

    def launches(self, size: Size) -> list[Launch]:
        """Producer, fused kernel, consumer, in the order of the host."""
        made = []
        for rank in range(size.ranks):
            for call in range(size.calls):
                block = size.block(rank, call)
                bodies = ((self.producer, "producer"), (self.fused, "fused kernel"), (self.consumer, "consumer"))
                made += [Launch(body, block, name, early=True) for body, name in bodies]
        return made

    def producer(self, b: Block) -> Program:
        """Lets its dependents start at once, and writes its residual rows later."""
        yield grid_wait()
        yield trigger()
        for row in b.mine():
            yield store(RESIDUAL[b.rank, b.call, row], data(b.call, b.rank), does="write the residual")

    def fused(self, b: Block) -> Program:
        """The constructor of `FusedOp` loads the first residual row; the exchange is one-shot."""
        first = read(RESIDUAL[b.rank, b.call, b.index], data(b.call, b.rank), does="read the first residual row")
        if self.reads_early:
            yield first
        yield grid_wait()
        if self.triggers == "start":
            yield trigger()
        if not self.reads_early:
            yield first
        yield from OneShot().kernel(b)
        for row in b.mine():
            if row != b.index:
                yield read(RESIDUAL[b.rank, b.call, row], data(b.call, b.rank), does="read the other residual rows")
            yield store(OUTPUT[b.rank, b.call, row], data(b.call, TOTAL), does="write the output")
        if self.triggers == "end":
            yield trigger()

    def consumer(self, b: Block) -> Program:
        """Reads the rows of the fused kernel."""
        if self.consumer_waits:
            yield grid_wait()
        for row in b.mine():
            yield read(OUTPUT[b.rank, b.call, row], data(b.call, TOTAL), does="read the output")
        yield grid_wait()
