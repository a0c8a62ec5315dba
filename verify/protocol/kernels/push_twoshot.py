"""Push two-shot without barriers: Lamport twice, as in MNNVL two-shot and SGLang's custom all-reduce.

Each rank pushes every share of its tokens to the rank that adds it up; that one pushes the sums to all. Both buffers
rotate in thirds, and a call clears what the call before has filled.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusecheck.protocol.kernels.oneshot import ARRIVED
from fusecheck.protocol.language import (
    SENTINEL,
    TOTAL,
    VOLATILE,
    Array,
    Block,
    Launch,
    Program,
    Size,
    add,
    among,
    data,
    load,
    outside,
    store,
    take,
    wait,
)

SHARE = Array("scatter", SENTINEL)
"""[rank, third, sender and row]: the share that this rank adds up."""

SUM = Array("broadcast", SENTINEL)
"""[rank, third, owner and row]: finished sums."""

FLAG = Array("flag")
"""[rank]: which third the next call fills."""

CLEAR = Array("clear_size")
"""[rank]: slots of each buffer that the call before has filled."""


@dataclass(frozen=True)
class PushTwoShot:
    """The kernel, and the places in which its faults differ.

    Attributes:
        name: of the model.
        thirds: rotating buffers.
        clears: as many slots as the call before has `stored`, or as this call fills, `current`.
        total: what a sum is on the wire, if not itself: one that rounds to -0.0 is the sentinel.
    """

    name: str = "push two-shot"
    thirds: int = 3
    clears: str = "stored"
    total: int | None = None

    def launches(self, size: Size) -> list[Launch]:
        """One launch a call; each rank's share is `rows` tokens."""
        return size.each(self.kernel, self.name)

    def kernel(self, b: Block) -> Program:
        """One block of one call."""
        flag = yield load(FLAG[b.rank], does="read the control words")
        clear_size = yield load(CLEAR[b.rank], does="read the control words")
        yield add(ARRIVED[b.rank], 1, does="read the control words")
        third, old, slots = flag % self.thirds, (flag + self.thirds - 1) % self.thirds, b.rows * b.ranks
        for owner in range(b.ranks):
            for row in b.mine():
                place = b.rank * b.rows + row
                yield store(SHARE[owner, third, place], data(b.call, b.rank), over=SENTINEL, does="scatter")
        for place in b.mine(clear_size if self.clears == "stored" else slots):
            yield store(SHARE[b.rank, old, place], SENTINEL, does="clear")
            yield store(SUM[b.rank, old, place], SENTINEL, does="clear")
        total = data(b.call, TOTAL) if self.total is None else self.total
        for row in b.mine():
            for sender in range(b.ranks):
                slot = SHARE[b.rank, third, sender * b.rows + row]
                yield take(slot, outside(SENTINEL), data(b.call, sender), VOLATILE, does="add up")
            for peer in range(b.ranks):
                yield store(SUM[peer, third, b.rank * b.rows + row], total, over=SENTINEL, does="push the sums")
        for owner in range(b.ranks):
            for row in b.mine():
                slot = SUM[b.rank, third, owner * b.rows + row]
                yield take(slot, outside(SENTINEL), total, VOLATILE, does="take the sums")
        if b.index == 0:
            yield wait(ARRIVED[b.rank], among(b.grid), VOLATILE, does="turn the flag")
            yield store(FLAG[b.rank], (flag + 1) % self.thirds, does="turn the flag")
            yield store(CLEAR[b.rank], slots, does="turn the flag")
            yield store(ARRIVED[b.rank], 0, does="turn the flag")
