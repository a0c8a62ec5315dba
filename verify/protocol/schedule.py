"""A failure as a schedule that a person reads: only what led to it, in runs of one block after another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from fusecheck.protocol.explorer import Exploration, Failure
from fusecheck.protocol.language import Kind, describe
from fusecheck.protocol.memory import COMMIT, OPERATE, SPREAD, Memory, Move, State
from fusecheck.protocol.system import DONE, System


@dataclass(frozen=True)
class Step:
    """What one block does in one go.

    Attributes:
        rank: of the device.
        block: in its grid.
        call: of the collective.
        kernel: its name.
        does: the steps of the kernel, in its own words.
    """

    rank: int
    block: int
    call: int
    kernel: str
    does: tuple[str, ...]

    def __str__(self) -> str:
        return f"rank {self.rank} block {self.block} call {self.call} {self.kernel}: {'; '.join(self.does)}"


@dataclass(frozen=True)
class Schedule:
    """A failure and the steps to it.

    Attributes:
        kind: `read`, `not clear` or `hang`.
        steps: in order.
        outcome: a line for the wrong read, or for each block that waits for ever.
        moves: the same, for whoever runs it again.
    """

    kind: str
    steps: tuple[Step, ...]
    outcome: tuple[str, ...]
    moves: tuple[Move, ...]

    def lines(self) -> list[str]:
        """To print."""
        return [
            *(f"{number:3} {step}" for number, step in enumerate(self.steps, 1)),
            *(f"    {x}" for x in self.outcome),
        ]


@dataclass(frozen=True)
class _Event:
    """A move with what it touches: cells, its block, and blocks that it concerns otherwise."""

    move: Move
    process: int
    node: int
    reads: int
    writes: int
    rank_buffer: int
    concerns: frozenset[int]


def schedule(exploration: Exploration) -> Schedule:
    """The schedule of an exploration's failure.

    Raises:
        ValueError: it found none.
    """
    failure = exploration.failure
    if failure is None:
        raise ValueError("nothing failed: there is no schedule to show")
    memory = exploration.memory
    events = _events(memory, failure)
    if failure.kind != "hang":
        events = _cone(events)
    order = min(
        (_runs(memory.system, events, style) for style in (0, 1)), key=lambda found: _switches(memory.system, found)
    )
    moves = tuple(event.move for event in order)
    if not reaches(memory, moves, failure):  # an order that the analysis got wrong is never shown
        order, moves = _events(memory, failure), failure.moves
    return Schedule(failure.kind, _steps(memory.system, order), tuple(_outcome(memory, moves, failure)), moves)


def replayed(memory: Memory, moves: Sequence[Move]) -> tuple[State, object] | None:
    """The last state and fault of a sequence of moves; None if one of them is not possible."""
    state, fault = memory.first(), None
    for move in moves:
        allowed = memory.moves_of(state, move.agent) if move.kind == OPERATE else _leaving(memory, state, move)
        if move not in allowed:
            return None
        state, fault = memory.step(state, move)
    return state, fault


def _leaving(memory: Memory, state: State, move: Move) -> list[Move]:
    buffers = state.buffers if move.kind == COMMIT else state.ranks
    return memory.leaving(state, move.kind, move.agent, move.place) if move.place < len(buffers[move.agent]) else []


def reaches(memory: Memory, moves: Sequence[Move], failure: Failure) -> bool:
    """Whether the moves are possible and end in the same failure."""
    found = replayed(memory, moves)
    if found is None:
        return False
    state, fault = found
    return fault == failure.fault if failure.kind != "hang" else fault is None and not memory.moves(state)


def _events(memory: Memory, failure: Failure) -> list[_Event]:
    state, found = memory.first(), []
    for move in failure.moves:
        found.append(_event(memory, state, move))
        state, _ = memory.step(state, move)
    return found


def _event(memory: Memory, state: State, move: Move) -> _Event:
    system = memory.system
    if move.kind != OPERATE:
        entry = (state.buffers if move.kind == COMMIT else state.ranks)[move.agent][move.place]
        passes_rank = move.kind == SPREAD or memory.shared(entry)
        rank = memory.rank_of[entry.process] if passes_rank else -1
        return _Event(move, entry.process, entry.node, 0, 1 << entry.loc, rank, frozenset(move.keeps))
    node = system.nodes[state.at[move.agent]]
    bit = 1 << node.loc if node.loc >= 0 else 0
    buffered = node.kind is Kind.STORE and memory.relaxed
    writes = bit if node.kind in (Kind.STORE, Kind.ADD) or node.op.put is not None else 0
    me = system.processes[move.agent]
    concerns = {*me.needs, *me.lets, *me.before} if node.kind in (Kind.START, Kind.GRID_WAIT) else set()
    rank = me.block.rank if node.kind in (Kind.FENCE, Kind.END) and memory.relaxed else -1
    return _Event(move, move.agent, node.number, bit, 0 if buffered else writes, rank, frozenset(concerns))


def _depends(later: _Event, earlier: _Event) -> bool:
    """Whether the later one must stay behind the earlier one."""
    return (
        later.process == earlier.process
        or earlier.process in later.concerns
        or later.process in earlier.concerns
        or bool(later.writes & (earlier.reads | earlier.writes) or later.reads & earlier.writes)
        or (later.rank_buffer >= 0 and later.rank_buffer == earlier.rank_buffer)
    )


def _cone(events: list[_Event]) -> list[_Event]:
    """The events that the last one depends on, through others too."""
    kept = [events[-1]]
    for event in reversed(events[:-1]):
        if any(_depends(later, event) for later in kept):
            kept.append(event)
    return kept[::-1]


def _actor(system: System, event: _Event) -> tuple[int, int]:
    block = system.processes[event.process].block
    return block.rank, block.index


def _runs(system: System, events: list[_Event], style: int) -> list[_Event]:
    """The same events in an order in which blocks take turns as rarely as a greedy choice finds."""
    waits = [{i for i in range(j) if _depends(events[j], events[i])} for j in range(len(events))]
    left, order, done = list(range(len(events))), [], set[int]()
    current: tuple[int, int] | None = None
    while left:
        able = [j for j in left if waits[j] <= done]
        mine = [j for j in able if _actor(system, events[j]) == current]
        if mine:
            chosen = mine[0]
        elif style == 0:
            chosen = able[0]
        else:
            chosen = max(able, key=lambda j: (_ahead(system, events, waits, done, left, _actor(system, events[j])), -j))
        current = _actor(system, events[chosen])
        order.append(events[chosen])
        left.remove(chosen)
        done.add(chosen)
    return order


def _ahead(
    system: System, events: list[_Event], waits: list[set[int]], done: set[int], left: list[int], actor: tuple[int, int]
) -> int:
    """How many events a block could do in one go from here."""
    reached = set(done)
    for j in left:
        if _actor(system, events[j]) == actor and waits[j] <= reached:
            reached.add(j)
    return len(reached) - len(done)


def _switches(system: System, order: list[_Event]) -> int:
    return sum(_actor(system, a) != _actor(system, b) for a, b in itertools.pairwise(order))


def _steps(system: System, order: list[_Event]) -> tuple[Step, ...]:
    """Runs of one block of one launch, with what it does in its own words."""
    steps: list[tuple[int, list[str]]] = []
    stored: dict[int, int] = {}
    for event in order:
        if not steps or steps[-1][0] != event.process:
            steps.append((event.process, []))
        op, told = system.nodes[event.node].op, steps[-1][1]
        text = op.does
        if event.move.kind == OPERATE:
            stored[event.node] = len(steps)
            if event.move.place:
                text = f"{op.does} (an old value)"
        else:
            text = f"{op.does}: {op.cell} reaches {'memory' if event.move.kind == SPREAD else 'the others'}"
            if stored.get(event.node) == len(steps):
                continue
        if not told or told[-1] != text:
            told.append(text)
    made = []
    for process, told in steps:
        me = system.processes[process]
        made.append(Step(me.block.rank, me.block.index, me.block.call, me.name, tuple(told)))
    return tuple(step for step in made if step.does)


def _outcome(memory: Memory, moves: Sequence[Move], failure: Failure) -> list[str]:
    system = memory.system
    if failure.fault is not None:
        fault = failure.fault
        node = system.nodes[fault.node]
        verb = "finds" if fault.kind == "not clear" else "reads"
        return [
            f"{_who(system, node.process)} {verb} {describe(fault.got)} in {node.op.cell}, not {describe(fault.right)}"
        ]
    found = replayed(memory, moves)
    assert found is not None
    state = found[0]
    lines = []
    for at in state.at:
        node = system.nodes[at]
        if at != DONE and node.kind is not Kind.START:
            holds = (
                f": {node.op.cell} holds {describe(memory.seen(state, node.process, node.loc))}" if node.op.cell else ""
            )
            lines.append(f"{_who(system, node.process)} waits for ever to {node.op.does}{holds}")
    return lines


def _who(system: System, process: int) -> str:
    me = system.processes[process]
    return f"rank {me.block.rank} block {me.block.index} call {me.block.call}"
