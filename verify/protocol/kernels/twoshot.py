"""Two-shot with barriers: `allreduce_fusion_kernel_twoshot_sync` of TensorRT-LLM and FlashInfer.

Copy, barrier, add up the own share of the tokens and push the sums to all, barrier, read the sums. The flag of a
barrier goes round in 0, 1, 2; a block waits for the same block of each peer, in a slot of its own. Slots of blocks that
this launch lacks are filled too, for the launch that has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from fusecheck.protocol.kernels.oneshot import ARRIVED
from fusecheck.protocol.language import (
    ACQUIRE,
    POISON,
    RELAXED,
    RELEASE,
    TOTAL,
    VOLATILE,
    Array,
    Block,
    Launch,
    Order,
    Program,
    Size,
    add,
    among,
    data,
    load,
    outside,
    read,
    store,
    wait,
)

BUFFER = Array("comm_buf", POISON)
"""[rank, token]: the rank's tokens, and behind them the sums; where these begin depends on the size of the call."""

SLOT = Array("barrier_flag")
"""[rank, block, peer]: the flag that the peer's block has reached."""

FLAG = Array("twoshot_flag")
"""[rank]: the flag that the last call ended with."""


@dataclass(frozen=True)
class TwoShot:
    """The kernel of FlashInfer 0.7.4, and the places in which others differ.

    Attributes:
        name: of the model.
        own_slot: whether a block stores its own slot `last` or `first`, as FlashInfer 0.6.13 and TensorRT-LLM do.
        release: the order of that store.
        wraps: whether the flag that is kept for the next call is the one that the barriers have reached.
        short: ranks that launch one block only, whatever the others do.
    """

    name: str = "two-shot"
    own_slot: str = "last"
    release: Order = RELEASE
    wraps: bool = True
    short: Sequence[int] = ()

    def launches(self, size: Size) -> list[Launch]:
        """One launch a call. A workspace has slots for the largest grid; 256 in the kernel."""
        made = size.each(partial(self.kernel, size.blocks), self.name)
        return [replace(x, block=replace(x.block, grid=1)) if x.block.rank in self.short else x for x in made]

    def kernel(self, slots: int, b: Block) -> Program:
        """One block of one call; each rank's share is `b.rows` tokens."""
        flag = begun = yield load(FLAG[b.rank], does="read the control words")
        yield add(ARRIVED[b.rank], 1, does="read the control words")
        tokens = b.rows * b.ranks
        for share in range(b.ranks):
            for row in b.mine():
                yield store(BUFFER[b.rank, share * b.rows + row], data(b.call, b.rank), does="copy in")
        flag = yield from self.barrier(slots, b, flag, "barrier 1")
        for row in b.mine():
            token = b.rank * b.rows + row
            for peer in range(b.ranks):
                yield read(BUFFER[peer, token], data(b.call, peer), does="add up")
            for peer in range(b.ranks):
                yield store(BUFFER[peer, tokens + token], data(b.call, TOTAL), does="push the sums")
        flag = yield from self.barrier(slots, b, flag, "barrier 2")
        for share in range(b.ranks):
            for row in b.mine():
                yield read(BUFFER[b.rank, tokens + share * b.rows + row], data(b.call, TOTAL), does="read the sums")
        if b.index == 0:
            yield wait(ARRIVED[b.rank], among(b.grid), VOLATILE, does="keep the flag")
            yield store(FLAG[b.rank], flag if self.wraps else begun + 2, does="keep the flag")
            yield store(ARRIVED[b.rank], 0, does="keep the flag")

    def barrier(self, slots: int, b: Block, flag: int, does: str) -> Program:
        """`Barrier::sync`: returns the flag that was reached."""
        before, flag = flag, 0 if flag == 2 else flag + 1
        for peer in range(b.ranks):
            if self.own_slot == "first":
                for block in range(b.index, slots, b.grid):
                    yield store(SLOT[peer, block, b.rank], flag, self.release, does=does)
            else:
                for block in range(b.index + b.grid, slots, b.grid):
                    yield store(SLOT[peer, block, b.rank], flag, RELAXED, does=does)
                yield store(SLOT[peer, b.index, b.rank], flag, self.release, does=does)
        for peer in range(b.ranks):
            yield wait(SLOT[b.rank, b.index, peer], outside(before), ACQUIRE, does=does)
        return flag
