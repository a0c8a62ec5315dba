"""The two memories: what a block may do next in a state, and what that makes of the state.

Sequentially consistent: every operation acts on memory at once. Relaxed: stores wait in a buffer of their block, from
there go to a buffer of their rank, where its other blocks see them, and then to memory; each leaves in any order but
for one cell, releases and fences. Loads that are no polls may be satisfied early: when a store reaches memory, a block
that will load the cell before its next acquire may keep what stood there.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, combinations
from typing import NamedTuple

from fusecheck.protocol.language import GPU, SYS, Kind
from fusecheck.protocol.system import DONE, UNORDERED, Node, System


class Entry(NamedTuple):
    """A store that is not in memory yet; `process` is its block."""

    loc: int
    value: int
    releases: int
    over: int | None
    process: int
    node: int


class Kept(NamedTuple):
    """An old value that a block may still load; an acquire of `scope` or wider drops it."""

    process: int
    loc: int
    value: int
    scope: int


class State(NamedTuple):
    """Everything that the future depends on.

    Attributes:
        at: the node of each block; `DONE` for those that have ended.
        memory: the value of each cell.
        buffers: of each block, oldest first; empty without relaxation.
        ranks: the buffer of each rank, oldest first.
        kept: old values that blocks may still load.
    """

    at: tuple[int, ...]
    memory: tuple[int, ...]
    buffers: tuple[tuple[Entry, ...], ...]
    ranks: tuple[tuple[Entry, ...], ...]
    kept: frozenset[Kept]


OPERATE, COMMIT, SPREAD = range(3)
"""Kinds of move: a block's operation; an entry leaves its block's buffer; an entry leaves its rank's."""


class Move(NamedTuple):
    """One step of the whole system.

    Attributes:
        kind: `OPERATE`, `COMMIT` or `SPREAD`.
        agent: the block, or the rank.
        place: of the entry in its buffer; of an operation, 1 if it loads the value kept.
        keeps: blocks that keep the old value.
    """

    kind: int
    agent: int
    place: int = 0
    keeps: tuple[int, ...] = ()


class Fault(NamedTuple):
    """A read that returned what it must not, or a store over what was not clear.

    Attributes:
        node: whose operation it is.
        got: the value found.
        right: what should have been there.
        kind: `read` or `not clear`.
    """

    node: int
    got: int
    right: int
    kind: str


class Memory:
    """The moves of a system; `relaxed` or sequentially consistent."""

    def __init__(self, system: System, *, relaxed: bool) -> None:
        self.system, self.relaxed = system, relaxed
        self.rank_of = [p.block.rank for p in system.processes]
        self._shared: list[int] = []
        self.refresh()

    def refresh(self) -> None:
        """Take account of what was discovered: which cells of each block its mates access too."""
        touched = [self.system.touched(p) for p in range(len(self.system.processes))]
        self._shared = []
        for mates in self.system.mates:
            bits = 0
            for mate in mates:
                bits |= touched[mate]
            self._shared.append(bits)

    def first(self) -> State:
        """Before the first launch."""
        count, ranks = len(self.system.processes), max(self.rank_of) + 1
        empty: tuple[tuple[Entry, ...], ...] = ((),) * count
        return State(tuple(self.system.roots), tuple(self.system.initial), empty, ((),) * ranks, frozenset())

    def shared(self, entry: Entry) -> bool:
        """Whether a mate of the block accesses the cell, so that the rank's buffer makes a difference."""
        return bool(self._shared[entry.process] >> entry.loc & 1)

    # What a block sees.

    def seen(self, state: State, process: int, loc: int) -> int:
        """The newest value of a cell for a block."""
        if self.relaxed:
            for buffer in (state.buffers[process], state.ranks[self.rank_of[process]]):
                for entry in reversed(buffer):
                    if entry.loc == loc:
                        return entry.value
        return state.memory[loc] if loc < len(state.memory) else self.system.initial[loc]

    def ready(self, state: State, node: Node) -> bool:
        """Whether the block at `node` can do its operation."""
        kind, process = node.kind, node.process
        if kind is Kind.WAIT:
            if not node.passes(self.seen(state, process, node.loc)):
                return False
            return not self.relaxed or node.op.put is None or self.drained(state, node)
        if kind is Kind.START:
            return self._started(state, process)
        if kind is Kind.GRID_WAIT:
            return all(state.at[m] == DONE for m in self.system.processes[process].before)
        if self.relaxed and kind in (Kind.ADD, Kind.FENCE, Kind.END):
            return self.drained(state, node)
        return True

    def _started(self, state: State, process: int) -> bool:
        me, at = self.system.processes[process], state.at
        return all(at[m] == DONE for m in me.needs) and all(
            at[m] == DONE or self.system.nodes[at[m]].triggered for m in me.lets
        )

    def drained(self, state: State, node: Node) -> bool:
        """Whether the stores that `node` must come after have left the buffers."""
        return not any(True for _ in self.holding(state, node))

    def holding(self, state: State, node: Node) -> Iterator[tuple[int, int, int]]:
        """The entries, as (kind of move, agent, place), that must leave before the block can go on."""
        process, rank = node.process, self.rank_of[node.process]
        everything = node.kind is Kind.END or node.releases == SYS
        for place, entry in enumerate(state.buffers[process]):
            if everything or entry.loc == node.loc or (node.releases == GPU and self.shared(entry)):
                yield COMMIT, process, place
        for place, entry in enumerate(state.ranks[rank]):
            if node.releases == SYS or entry.loc == node.loc or (everything and entry.process == process):
                yield SPREAD, rank, place

    def blocked_by(self, state: State, kind: int, agent: int, place: int) -> list[tuple[int, int, int]]:
        """The entries that must leave before this one may."""
        buffer = state.buffers[agent] if kind == COMMIT else state.ranks[agent]
        entry = buffer[place]
        found = []
        for earlier in range(place):
            other = buffer[earlier]
            if (
                other.loc == entry.loc
                or entry.releases == SYS
                or (entry.releases == GPU and kind == COMMIT and self.shared(other))
            ):
                found.append((kind, agent, earlier))
        if kind == COMMIT and entry.releases == SYS and not self.shared(entry):
            rank = self.rank_of[agent]
            found += [(SPREAD, rank, other) for other in range(len(state.ranks[rank]))]
        return found

    # Moves.

    def moves_of(self, state: State, process: int) -> list[Move]:
        """What the block may do next: nothing, one operation, or a load of either value."""
        at = state.at[process]
        if at == DONE:
            return []
        node = self.system.nodes[at]
        if not self.ready(state, node):
            return []
        moves = [Move(OPERATE, process)]
        if node.early and any(k.process == process and k.loc == node.loc for k in state.kept):
            moves.append(Move(OPERATE, process, 1))
        return moves

    def leaving(self, state: State, kind: int, agent: int, place: int) -> list[Move]:
        """The ways in which an entry may leave: one for each set of blocks that keep the old value."""
        if self.blocked_by(state, kind, agent, place):
            return []
        keepers = list(self._keepers(state, kind, agent, place))
        sets = chain.from_iterable(combinations(keepers, count) for count in range(len(keepers) + 1))
        return [Move(kind, agent, place, keeps) for keeps in sets]

    def _keepers(self, state: State, kind: int, agent: int, place: int) -> Iterator[int]:
        """Blocks that the store becomes visible to, and that will load the cell before their next acquire."""
        entry = (state.buffers[agent] if kind == COMMIT else state.ranks[agent])[place]
        to_mates = kind == COMMIT and self.shared(entry)
        rank = self.rank_of[entry.process]
        for process, at in enumerate(state.at):
            if at == DONE or process == entry.process or (self.rank_of[process] == rank) != to_mates:
                continue
            window = self.window(self.system.nodes[at])[GPU if to_mates else SYS]
            kept = any(k.process == process and k.loc == entry.loc for k in state.kept)
            if window >> entry.loc & 1 and not kept and self.seen(state, process, entry.loc) != entry.value:
                yield process

    def window(self, node: Node) -> tuple[int, int]:
        """Cells loaded from here on before the next acquire at GPU scope or wider, and at system scope, as bits."""
        if node.window is None:
            gpu = sys = 0
            if node.acquires == UNORDERED or node.acquires == GPU:
                for number in node.children.values():
                    further = (0, 0) if number == DONE else self.window(self.system.nodes[number])
                    gpu, sys = gpu | further[GPU], sys | further[SYS]
                if node.acquires == GPU:
                    gpu = 0
                if node.early:
                    gpu, sys = gpu | 1 << node.loc, sys | 1 << node.loc
            node.window = (gpu, sys)
        return node.window

    def moves(self, state: State) -> list[Move]:
        """Everything that may happen next."""
        found = [move for process in range(len(state.at)) for move in self.moves_of(state, process)]
        if self.relaxed:
            for kind, buffers in ((COMMIT, state.buffers), (SPREAD, state.ranks)):
                for agent, buffer in enumerate(buffers):
                    for place in range(len(buffer)):
                        found += self.leaving(state, kind, agent, place)
        return found

    def step(self, state: State, move: Move) -> tuple[State, Fault | None]:
        """The state after a move, and what was wrong about it."""
        if move.kind == OPERATE:
            return self._operate(state, move)
        return self._leave(state, move)

    def _operate(self, state: State, move: Move) -> tuple[State, Fault | None]:
        process = move.agent
        node = self.system.nodes[state.at[process]]
        kind, op, loc = node.kind, node.op, node.loc
        memory, buffers, kept, value, fault = state.memory, state.buffers, state.kept, None, None
        if loc >= len(memory):
            memory += tuple(self.system.initial[len(memory) :])
        if kind is Kind.STORE:
            assert op.value is not None
            if self.relaxed:
                entry = Entry(loc, op.value, node.releases, op.over, process, node.number)
                buffers = _with(buffers, process, (*buffers[process], entry))
            else:
                fault = _not_clear(node.number, memory[loc], op.over)
                memory = _with(memory, loc, op.value)
        elif kind is Kind.ADD:
            assert op.value is not None
            memory = _with(memory, loc, memory[loc] + op.value)
        elif loc >= 0:
            value = self._loaded(state, node, old=move.place == 1)
            if op.put is not None:
                memory = _with(memory, loc, op.put)
            if op.value is not None and value != op.value:
                fault = Fault(node.number, value, op.value, "read")
        if kept:
            kept = _remaining(kept, node, keep_own=move.place == 1)
        at = _with(state.at, process, self.system.child(node, value))
        return State(at, memory, buffers, state.ranks, kept), fault

    def _loaded(self, state: State, node: Node, *, old: bool) -> int:
        if old:
            return next(k.value for k in state.kept if k.process == node.process and k.loc == node.loc)
        return self.seen(state, node.process, node.loc)

    def _leave(self, state: State, move: Move) -> tuple[State, Fault | None]:
        memory, buffers, ranks, fault = state.memory, state.buffers, state.ranks, None
        if move.kind == COMMIT:
            entry = buffers[move.agent][move.place]
            buffers = _with(buffers, move.agent, _without(buffers[move.agent], move.place))
        else:
            entry = ranks[move.agent][move.place]
            ranks = _with(ranks, move.agent, _without(ranks[move.agent], move.place))
        scope = SYS
        if move.kind == COMMIT and self.shared(entry):
            rank, scope = self.rank_of[entry.process], GPU
            ranks = _with(ranks, rank, (*ranks[rank], entry))
        else:
            if entry.loc >= len(memory):
                memory += tuple(self.system.initial[len(memory) :])
            fault = _not_clear(entry.node, memory[entry.loc], entry.over)
            memory = _with(memory, entry.loc, entry.value)
        kept = state.kept
        if move.keeps:
            kept |= {Kept(p, entry.loc, self.seen(state, p, entry.loc), scope) for p in move.keeps}
        return State(state.at, memory, buffers, ranks, kept), fault


def _remaining(kept: frozenset[Kept], node: Node, *, keep_own: bool) -> frozenset[Kept]:
    """What a block may still load after an operation: an acquire drops what it covers, a new value the older one."""
    return frozenset(
        k
        for k in kept
        if k.process != node.process
        or (k.scope > node.acquires and (k.loc != node.loc or keep_own) and node.kind is not Kind.END)
    )


def _not_clear(node: int, found: int, over: int | None) -> Fault | None:
    return None if over is None or found == over else Fault(node, found, over, "not clear")


def _with(items: tuple, place: int, item: object) -> tuple:  # type: ignore[type-arg]
    return (*items[:place], item, *items[place + 1 :])


def _without(items: tuple, place: int) -> tuple:  # type: ignore[type-arg]
    return items[:place] + items[place + 1 :]
