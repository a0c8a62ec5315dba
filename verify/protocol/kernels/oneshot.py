"""One-shot Lamport with three buffers: `allreduce_fusion_kernel_oneshot_lamport`.

Of TensorRT-LLM (allReduceFusionKernels.cu) and FlashInfer (trtllm_allreduce_fusion.cuh); the two agree step by step.
FlashInfer's MoE reduction (trtllm_moe_allreduce_fusion.cuh) adds up a rank's experts first; its exchange is the same.
The data is its own flag: a slot that no longer holds the sentinel has arrived.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusecheck.protocol.language import (
    SENTINEL,
    VOLATILE,
    Array,
    Block,
    Launch,
    Program,
    Size,
    Test,
    add,
    among,
    data,
    load,
    outside,
    store,
    take,
    wait,
)

SLOT = Array("slot", SENTINEL)
"""[rank, third, offset]: where the peers leave their rows; packed by the size of the call."""

BESIDE = Array("beside", SENTINEL)
"""[rank, third, offset]: where a clear lands whose offset has wrapped."""

ARRIVED = Array("counter")
"""[rank]: blocks of the running launch that have read the control words."""

FLAG = Array("lamport_flag")
"""[rank]: which third the next call fills."""

CLEAR = Array("clear_size")
"""[rank]: slots that the call before has filled."""

FILLED = outside(SENTINEL)
"""A poll ends when its slot no longer holds the sentinel, by its bits."""


@dataclass(frozen=True)
class OneShot:
    """The kernel as it is, and the places in which its faults differ.

    Attributes:
        name: of the model.
        thirds: rotating buffers.
        clears: how many slots of the old third a call clears: as many as the call before has `stored`, or as this call
            fills itself, `current`.
        clear_third: which third, counted from this call's; 2 is the one before.
        clear_first: whether that is done before the rows are published.
        overflows: whether the offset of the last third wraps, so that another place is cleared.
        published: what a rank's rows are on the wire, if not themselves.
        arrived: when a poll ends.
        waits_for_blocks: whether block 0 turns the flag only when all blocks have read it.
    """

    name: str = "one-shot"
    thirds: int = 3
    clears: str = "stored"
    clear_third: int = 2
    clear_first: bool = False
    overflows: bool = False
    published: int | None = None
    arrived: Test = FILLED
    waits_for_blocks: bool = True

    def launches(self, size: Size) -> list[Launch]:
        """One launch a call."""
        return size.each(self.kernel, self.name)

    def kernel(self, b: Block) -> Program:
        """One block of one call."""
        flag = yield load(FLAG[b.rank], does="read the control words")
        clear_size = yield load(CLEAR[b.rank], does="read the control words")
        yield add(ARRIVED[b.rank], 1, does="read the control words")
        third = flag % self.thirds
        if self.clear_first:
            yield from self.clear(b, flag, clear_size)
        yield from self.publish(b, third)
        if not self.clear_first:
            yield from self.clear(b, flag, clear_size)
        for row in b.mine():
            yield from self.receive(b, third, row)
        if b.index == 0:
            yield from self.update(b, flag)

    def publish(self, b: Block, third: int) -> Program:
        """Push the own rows to every rank, the own one among them."""
        for row in b.mine():
            for peer in range(b.ranks):
                slot = SLOT[peer, third, b.rank * b.rows + row]
                yield store(slot, self.rows_of(b, b.rank), over=SENTINEL, does="publish")

    def rows_of(self, b: Block, rank: int) -> int:
        """A rank's rows as they are on the wire."""
        return data(b.call, rank) if self.published is None else self.published

    def clear(self, b: Block, flag: int, clear_size: int) -> Program:
        """Refill the third that the call before used."""
        count = {"stored": clear_size, "current": b.rows * b.ranks}[self.clears]
        third = (flag + self.clear_third) % self.thirds
        where = BESIDE if self.overflows and third == 2 else SLOT
        for offset in b.mine(count):
            yield store(where[b.rank, third, offset], SENTINEL, does="clear")

    def receive(self, b: Block, third: int, row: int) -> Program:
        """Poll the own buffer for this row of every rank."""
        for source in range(b.ranks):
            slot = SLOT[self.polled(b, source), third, source * b.rows + row]
            yield take(slot, self.arrived, self.rows_of(b, source), VOLATILE, does="take the rows")

    def polled(self, b: Block, source: int) -> int:
        """Whose copy of the rows of `source` is polled: the own one."""
        del source
        return b.rank

    def update(self, b: Block, flag: int) -> Program:
        """Block 0 turns to the next third when every block has read the control words."""
        if self.waits_for_blocks:
            yield wait(ARRIVED[b.rank], among(b.grid), VOLATILE, does="turn the flag")
        yield store(FLAG[b.rank], (flag + 1) % self.thirds, does="turn the flag")
        yield store(CLEAR[b.rank], b.rows * b.ranks, does="turn the flag")
        yield store(ARRIVED[b.rank], 0, does="turn the flag")
