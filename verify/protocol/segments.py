"""The tree of a block cut into segments: what it does from one place on until it may have to wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fusecheck.protocol.language import SYS, Kind
from fusecheck.protocol.memory import Memory
from fusecheck.protocol.system import DONE, Node


@dataclass
class Segment:
    """What a block does from one node on until it may have to wait.

    Attributes:
        reads: cells that it reads, as bits; those that it only polls are in `polls`.
        polls: the tests of its polls that take no value, by cell.
        writes: cells that it writes.
        adds: cells that it adds to.
        window: cells that it may load early at any point of the segment, or at its end.
        values: what it writes, by cell.
        held: what it releases at system scope, by cell: not in memory before all that its block has stored before.
        sums: what it adds, by cell.
        stops: nodes at which it may have to wait.
        triggers: whether it lets its dependents go.
        publishes: whether it releases at system scope.
    """

    reads: int = 0
    writes: int = 0
    adds: int = 0
    window: int = 0
    polls: dict[int, tuple[Callable[[int], bool], ...]] = field(default_factory=dict)
    values: dict[int, set[int]] = field(default_factory=dict)
    held: dict[int, set[int]] = field(default_factory=dict)
    sums: dict[int, int] = field(default_factory=dict)
    stops: list[int] = field(default_factory=list)
    triggers: bool = False
    publishes: bool = False

    def include(self, other: Segment) -> None:
        """Add what another segment does; its stops are left to the caller."""
        self.reads |= other.reads
        self.writes |= other.writes
        self.adds |= other.adds
        self.window |= other.window
        for loc, tests in other.polls.items():
            self.polls[loc] = self.polls.get(loc, ()) + tests
        for loc, values in other.values.items():
            self.values.setdefault(loc, set()).update(values)
        for loc, values in other.held.items():
            self.held.setdefault(loc, set()).update(values)
        for loc, amount in other.sums.items():
            self.sums[loc] = self.sums.get(loc, 0) + amount
        self.triggers |= other.triggers
        self.publishes |= other.publishes

    def poll_holds(self, loc: int, value: int | None) -> bool:
        """Whether a store of `value` ends every poll of the cell, so that it may come before or after; None: of any."""
        tests = self.polls.get(loc, ())
        # A poll also drops an older value that was kept of the cell; where the cell is loaded too, that shows.
        kept = self.window >> loc & 1
        return not tests or (value is not None and not kept and all(passes(value) for passes in tests))


class Segments:
    """The segments of a system's blocks, kept with their nodes until more of the trees is discovered."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def stops(self, node: Node) -> bool:
        """Whether a block may have to wait here."""
        if node.kind in (Kind.WAIT, Kind.START, Kind.GRID_WAIT, Kind.END):
            return True
        return self.memory.relaxed and node.kind in (Kind.ADD, Kind.FENCE)

    def segment(self, node: Node) -> Segment:
        """What follows a node, its own operation included; the block need not wait there, or has waited."""
        if not isinstance(node.segment, Segment):
            node.segment = self._own(node, Segment())
            self._follow(node, node.segment)
        return node.segment

    def _own(self, node: Node, into: Segment) -> Segment:
        op, bit = node.op, 1 << node.loc if node.loc >= 0 else 0
        into.window = self.windows(node)
        into.triggers = node.kind is Kind.TRIGGER
        into.publishes = node.releases == SYS
        if node.kind is Kind.ADD:
            assert op.value is not None
            into.adds = bit
            into.sums[node.loc] = op.value
        elif node.kind is Kind.STORE:
            assert op.value is not None
            if node.releases == SYS and self.memory.relaxed:
                into.held[node.loc] = {op.value}
            else:
                into.writes = bit
                into.values[node.loc] = {op.value}
        elif node.polls:
            into.polls[node.loc] = (node.passes,)
        elif bit:
            into.reads = bit
            if op.put is not None:
                into.writes = bit
                into.values[node.loc] = {op.put}
        return into

    def _follow(self, node: Node, into: Segment) -> None:
        for number in node.children.values():
            following = None if number == DONE else self.memory.system.nodes[number]
            if following is None or self.stops(following):
                into.stops.append(number)
            else:
                further = self.segment(following)
                into.include(further)
                into.stops += further.stops

    def windows(self, node: Node) -> int:
        """Cells that the block may load early while it stands here."""
        if not self.memory.relaxed:
            return 0
        gpu, sys = self.memory.window(node)
        return gpu | sys
