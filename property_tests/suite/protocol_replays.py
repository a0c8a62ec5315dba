"""Schedules of `fusecheck protocol` in real processes: the emulated exchange with the same fault, held up as they say.

Each exhibit's schedule is a list of steps (rank, call, step of the kernel). A rank that comes to a step waits until the
others have done all that lies before it; a step that the schedule does not have waits for the end of it. The exchange
does its steps in the order of the kernel: publish, clear, take.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from fusecheck.backends.emulated import EmulatedBackend
from fusecheck.backends.emulated_protocol import Lamport, Total, TwoShot, row_blocks, wait_until
from fusecheck.interface import Limits, Rank
from fusecheck.protocol.explorer import Exploration, Explorer
from fusecheck.protocol.kernels.moe_finalize import MoeFinalize
from fusecheck.protocol.kernels.oneshot import OneShot
from fusecheck.protocol.kernels.pull import Pull
from fusecheck.protocol.language import Model, Size
from fusecheck.protocol.schedule import Schedule, schedule

HELD = ("publish", "clear", "take the rows", "fill the input", "add up")
"""Steps of the kernels that can be held up; barriers and control words run as they come."""

MODELS: dict[str, tuple[Model, Size]] = {
    "clear-size": (OneShot(clears="current"), Size(2, 1, 4)),
    "no-end-sync": (Pull(stages=1, end_barrier=False), Size(2, 1, 2)),
    "cleared-at-start": (OneShot(clears="current", clear_third=0, clear_first=True), Size(2, 1, 1)),
    "polls-the-senders": (MoeFinalize(), Size(2, 1, 2)),
}
"""Faults that the emulated exchange can have too, at the size that shows them."""

Step = tuple[int, int, str]
"""Rank, call, and step of the kernel."""


@cache
def explored(name: str) -> Exploration:
    """The exploration of a model of `MODELS`; its failure is a wrong read or a hang."""
    model, size = MODELS[name]
    return Explorer(model.launches(size), "sc", clears=False).explore()


@cache
def planned(name: str) -> tuple[Schedule, tuple[Step, ...]]:
    """The schedule of a model of `MODELS`, and its steps that can be held up, each where it is done for good."""
    found = explored(name)
    assert found.failure is not None
    nodes = [found.system.nodes[number] for number in found.failure.stuck]
    blocks = [(found.system.processes[node.process].block, node.op.does) for node in nodes]
    stuck = {(block.rank, block.call, does) for block, does in blocks}
    shown = schedule(found)
    steps = [(s.rank, s.call, does) for s in shown.steps for does in s.does if does in HELD]
    last = {step: place for place, step in enumerate(steps)}
    return shown, tuple(sorted(last.keys() - stuck, key=last.__getitem__))


class Held:
    """Holds one rank up; every rank sees what the others have done."""

    def __init__(self, rank: Rank, name: str) -> None:
        self.rank, self.steps = rank.index, planned(name)[1]
        self.done = rank.symmetric(f"replay-{name}", max(1, len(self.steps)))
        self.call = 0

    def before(self, does: str) -> None:
        """Wait until all that the schedule puts before this step is done."""
        step = (self.rank, self.call, does)
        end = self.steps.index(step) if step in self.steps else len(self.steps)
        others = [place for place in range(end) if self.steps[place][0] != self.rank]
        wait_until(lambda: all(bool(self.done[self.steps[place][0]][place]) for place in others))

    def after(self, does: str) -> None:
        """Tell the others that this step is done."""
        step = (self.rank, self.call, does)
        if step in self.steps:
            self.done[self.rank][self.steps.index(step)] = 1


class KernelOrder(Lamport):
    """One-shot with the steps in the order of the kernel, each held up."""

    name = ""
    clears_first = False

    def __init__(self, rank: Rank, limits: Limits) -> None:
        super().__init__(rank, limits)
        self.held = Held(rank, self.name)

    def sums(self, partial: Tensor, total: Total, sum_dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """See `Exchange.sums`."""
        del sum_dtype
        elements = partial.numel() * self.world_size
        if self.clears_first:
            self.clear(elements)
        self.held.before("publish")
        self.publish(partial)
        self.held.after("publish")
        if not self.clears_first:
            self.clear(elements)
        self.held.before("take the rows")
        blocks = [(rows, total(self.receive(partial, rows))) for rows in row_blocks(0, *partial.shape)]
        self.held.after("take the rows")
        self.rotate(elements)
        self.signal()
        self.held.call += 1
        yield from blocks

    def clear(self, elements: int) -> None:
        """P3, held up."""
        self.held.before("clear")
        self.clear_previous(elements)
        self.held.after("clear")


class ClearsOwnSize(KernelOrder):
    """Clears as many slots as this call fills."""

    name = "clear-size"

    def clear_size(self, elements: int) -> int:
        """This call's."""
        return elements


class ClearsAtStart(KernelOrder):
    """Fills its own third with the sentinel before it publishes."""

    name = "cleared-at-start"
    clears_first = True

    def clear_previous(self, elements: int) -> None:
        """This call's third."""
        start = self.third() * self.capacity
        self.bits[self.index][start : start + elements].fill_(-0x8000)


class PollsSenders(KernelOrder):
    """Polls the copy that each sender wrote into its own buffer."""

    name = "polls-the-senders"

    def receive(self, partial: Tensor, rows: slice) -> list[Tensor]:
        """From every sender's buffer."""
        hidden, elements = partial.shape[1], partial.numel()
        start = self.third() * self.capacity
        received = []
        for source in range(self.world_size):
            first = start + source * elements
            bits = self.bits[source][first : first + elements][rows.start * hidden : rows.stop * hidden]
            self.wait(bits)
            received.append(bits.view(partial.dtype).view(-1, hidden))
        return received


class NoEndSync(TwoShot):
    """One stage: every rank adds up all rows, and nobody waits until the others have."""

    def __init__(self, rank: Rank, limits: Limits) -> None:
        super().__init__(rank, limits)
        self.held = Held(rank, "no-end-sync")

    def sums(self, partial: Tensor, total: Total, sum_dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """See `Exchange.sums`."""
        del sum_dtype
        self.held.before("fill the input")
        self.copy_in(partial)
        self.held.after("fill the input")
        self.barrier("copied")
        self.held.before("add up")
        blocks = [(rows, total(self.gather(partial, rows))) for rows in row_blocks(0, *partial.shape)]
        self.held.after("add up")
        self.signal()
        self.held.call += 1
        yield from blocks


def clear_size() -> EmulatedBackend:
    """The kernel with `ClearsOwnSize`."""
    return EmulatedBackend(oneshot=ClearsOwnSize)


def cleared_at_start() -> EmulatedBackend:
    """The kernel with `ClearsAtStart`."""
    return EmulatedBackend(oneshot=ClearsAtStart)


def polls_the_senders() -> EmulatedBackend:
    """The kernel with `PollsSenders`."""
    return EmulatedBackend(oneshot=PollsSenders)


def no_end_sync() -> EmulatedBackend:
    """The kernel with `NoEndSync`."""
    return EmulatedBackend(twoshot=NoEndSync)
