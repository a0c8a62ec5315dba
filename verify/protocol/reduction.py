"""Partial-order reduction: which moves must be tried in a state so that no behaviour is lost.

A set of agents (blocks, and stores on their way) is closed if nothing that the others can do while these stand still
touches what these do next. Then it is enough to try the moves of the set (persistent sets; Godefroid 1996). How far
the others come is walked ahead on their trees: up to a poll that nobody among them can satisfy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

from fusecheck.protocol.language import SYS, Kind
from fusecheck.protocol.memory import COMMIT, OPERATE, SPREAD, Entry, Memory, Move, State
from fusecheck.protocol.segments import Segment, Segments
from fusecheck.protocol.system import DONE, Node

Agent: TypeAlias = "tuple[int, int, int]"
"""(OPERATE, block, 0), or an entry: (COMMIT, block, place), (SPREAD, rank, place)."""


class Reach:
    """How far blocks come while the agents of a set stand still."""

    def __init__(self, reduction: Reduction, state: State, still: set[Agent]) -> None:
        self.reduction, self.state, self.still = reduction, state, still
        self.memory, self.system = reduction.memory, reduction.memory.system
        self.values: dict[int, set[int]] = {}
        self.sums: dict[int, int] = {}
        self.done = {p for p, at in enumerate(state.at) if at == DONE}
        self.triggered = {p for p, at in enumerate(state.at) if at != DONE and self.system.nodes[at].triggered}
        self.of: dict[int, Segment] = {}
        self.stuck = self._stuck()
        for agent, entry in reduction.entries(state):
            if agent not in self.stuck:
                self.values.setdefault(entry.loc, set()).add(entry.value)
        self._walk()

    def _stuck(self) -> set[Agent]:
        """Stores that cannot leave before one that stands still has left; those that stand still among them."""
        found, before = set(self.still), -1
        while before != len(found):
            before = len(found)
            for agent, _ in self.reduction.entries(self.state):
                if agent not in found and not found.isdisjoint(self.memory.blocked_by(self.state, *agent)):
                    found.add(agent)
        return found

    def _walk(self) -> None:
        fronts: dict[int, list[int]] = {}
        for process, at in enumerate(self.state.at):
            if at != DONE and (OPERATE, process, 0) not in self.still:
                self.of[process] = Segment()
                fronts[process] = [at]
        moved = True
        while moved:
            moved = False
            for process, front in fronts.items():
                if front:
                    stay = [number for number in front if not self._pass(process, number, front)]
                    moved |= len(stay) != len(front) or any(n not in stay for n in front)
                    fronts[process] = stay

    def _pass(self, process: int, number: int, front: list[int]) -> bool:
        """Go on from a node if the block may; the nodes where it stops next join the front."""
        node = self.system.nodes[number]
        done = self.of[process]
        segments = self.reduction.segments
        if segments.stops(node) and not self._passable(node):
            done.window |= segments.windows(node)
            return False
        segment = segments.segment(node)
        done.include(segment)
        for loc, values in segment.values.items():
            self.values.setdefault(loc, set()).update(values)
        if segment.held and not self._holds_back(process):
            for loc, values in segment.held.items():
                self.values.setdefault(loc, set()).update(values)
                done.values.setdefault(loc, set()).update(values)
                done.writes |= 1 << loc
        for loc, amount in segment.sums.items():
            self.sums[loc] = self.sums.get(loc, 0) + amount
        if segment.triggers:
            self.triggered.add(process)
        front.extend(segment.stops)
        if DONE in segment.stops:
            self.done.add(process)
            front.remove(DONE)
        return True

    def _passable(self, node: Node) -> bool:
        me = self.system.processes[node.process]
        if node.kind is Kind.START:
            return self.done.issuperset(me.needs) and all(m in self.done or m in self.triggered for m in me.lets)
        if node.kind is Kind.GRID_WAIT:
            return self.done.issuperset(me.before)
        if self.memory.relaxed and self._held(node):
            return False
        return node.kind is not Kind.WAIT or self._satisfiable(node)

    def _held(self, node: Node) -> bool:
        """Whether a store that stands still keeps the block from going on: only one that is pending now can."""
        if node.kind is Kind.WAIT and node.op.put is None:
            return False
        return any(agent in self.stuck for agent in self.memory.holding(self.state, node))

    def _holds_back(self, process: int) -> bool:
        """Whether a store of the block that stands still keeps in all that it releases."""
        rank = self.memory.rank_of[process]
        return any(
            (kind == COMMIT and agent == process) or (kind == SPREAD and agent == rank) for kind, agent, _ in self.stuck
        )

    def _satisfiable(self, node: Node) -> bool:
        found = self.memory.seen(self.state, node.process, node.loc)
        if node.passes(found) or any(map(node.passes, self.values.get(node.loc, ()))):
            return True
        most = self.sums.get(node.loc, 0)
        if most and node.loc in self.values:
            return True
        return any(node.passes(found + more) for more in range(1, most + 1))


class Reduction:
    """Chooses the moves to try in each state of a memory."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.segments = Segments(memory)

    # Agents.

    def entries(self, state: State) -> Iterator[tuple[Agent, Entry]]:
        """Every store on its way."""
        if self.memory.relaxed:
            for kind, buffers in ((COMMIT, state.buffers), (SPREAD, state.ranks)):
                for agent, buffer in enumerate(buffers):
                    for place, entry in enumerate(buffer):
                        yield (kind, agent, place), entry

    def moves_of(self, state: State, agent: Agent) -> list[Move]:
        """What an agent can do now."""
        if agent[0] == OPERATE:
            return self.memory.moves_of(state, agent[1])
        return self.memory.leaving(state, *agent)

    def choose(self, state: State) -> list[Move]:
        """The moves to try: of the smallest closed set with a move in it. None where nothing can move."""
        able: list[tuple[Agent, list[Move]]] = []
        for agent in self._seeds(state):
            moves = self.moves_of(state, agent)
            if moves and self.private(state, agent):
                return moves
            if moves:
                able.append((agent, moves))
        able.sort(key=lambda pair: len(pair[1]))
        around = []
        for agent, moves in able:
            near = self.near(state, {agent})
            if not near:
                return moves
            around.append({agent, *near})
        best: list[Move] = []
        for closed in around:
            moves = self._all_moves(state, self.close(state, closed))
            if not best or len(moves) < len(best):
                best = moves
        return best

    def _all_moves(self, state: State, agents: set[Agent]) -> list[Move]:
        return [move for agent in sorted(agents) for move in self.moves_of(state, agent)]

    def _seeds(self, state: State) -> Iterator[Agent]:
        for process, at in enumerate(state.at):
            if at != DONE:
                yield OPERATE, process, 0
        for agent, _ in self.entries(state):
            yield agent

    def private(self, state: State, agent: Agent) -> bool:
        """Whether a move touches nothing that another agent sees: a launch, an end, a store into the own buffer."""
        if agent[0] != OPERATE:
            return False
        node = self.memory.system.nodes[state.at[agent[1]]]
        if node.kind is Kind.STORE:
            return self.memory.relaxed
        return node.loc < 0

    def close(self, state: State, closed: set[Agent]) -> set[Agent]:
        """The least closed set around some agents, found by adding whatever conflicts."""
        while more := self.near(state, closed):
            closed = closed | more
        return closed

    def near(self, state: State, closed: set[Agent]) -> set[Agent]:
        """Agents outside that conflict with a set; none of a closed one."""
        reach = Reach(self, state, closed)
        return {other for member in closed for other in self.conflicting(state, member, reach)} - closed

    def conflicting(self, state: State, member: Agent, reach: Reach) -> Iterable[Agent]:
        """Agents whose doings, now or within reach, do not commute with what a member does next, or let it go."""
        if member[0] == OPERATE:
            return [*self._for_block(state, member[1], reach), *self._awaited(state, member[1])]
        return [*self._for_entry(state, member, reach), *self.memory.blocked_by(state, *member)]

    def _awaited(self, state: State, process: int) -> Iterator[Agent]:
        """What a block that cannot go on waits for, other than a value."""
        memory, me = self.memory, self.memory.system.processes[process]
        node = memory.system.nodes[state.at[process]]
        if node.kind is Kind.START:
            waits: Iterable[int] = (*me.needs, *me.lets)
        else:
            waits = me.before if node.kind is Kind.GRID_WAIT else ()
        if not memory.ready(state, node):
            yield from ((OPERATE, m, 0) for m in waits if state.at[m] != DONE)
            if memory.relaxed and (node.kind in (Kind.ADD, Kind.FENCE, Kind.END) or node.op.put is not None):
                yield from memory.holding(state, node)

    def _for_block(self, state: State, process: int, reach: Reach) -> Iterator[Agent]:
        node = self.memory.system.nodes[state.at[process]]
        if node.loc < 0 or (node.kind is Kind.STORE and self.memory.relaxed):
            return
        bit, value = 1 << node.loc, node.op.put if node.kind is Kind.WAIT else node.op.value
        # A poll that has ended stays ended whichever store that ends it comes; one that has not waits for that store.
        ended = node.polls and node.passes(self.memory.seen(state, process, node.loc))
        polls = ended and not self.segments.windows(node) & bit
        writes = node.kind is Kind.STORE or node.op.put is not None
        for other, segment in reach.of.items():
            touched = segment.writes
            touched |= segment.reads if writes or node.kind is Kind.ADD else 0
            touched |= segment.adds if node.kind is not Kind.ADD else 0
            if polls and not segment.adds & bit and all(map(node.passes, segment.values.get(node.loc, ()))):
                touched = 0
            if writes or node.kind is Kind.ADD:
                touched |= 0 if segment.poll_holds(node.loc, value if writes else None) else bit
            if touched & bit:
                yield OPERATE, other, 0
        rank = self.memory.rank_of[process]
        for agent, entry in self.entries(state):
            own = agent[1] == (process if agent[0] == COMMIT else rank)
            commutes = polls and node.passes(entry.value)
            if entry.loc == node.loc and not own and not commutes and agent not in reach.stuck:
                yield agent

    def _for_entry(self, state: State, member: Agent, reach: Reach) -> Iterator[Agent]:
        memory = self.memory
        buffer = state.buffers[member[1]] if member[0] == COMMIT else state.ranks[member[1]]
        entry = buffer[member[2]]
        to_mates = member[0] == COMMIT and memory.shared(entry)
        rank, bit = memory.rank_of[entry.process], 1 << entry.loc
        for other, segment in reach.of.items():
            if other == entry.process or (to_mates and memory.rank_of[other] != rank):
                continue
            if memory.rank_of[other] == rank and not to_mates and member[0] == SPREAD:
                continue
            now = self.segments.windows(memory.system.nodes[state.at[other]])
            touched = segment.reads | segment.writes | segment.adds | (segment.window & ~now)
            if touched & bit or (to_mates and segment.publishes) or not segment.poll_holds(entry.loc, entry.value):
                yield OPERATE, other, 0
        for agent, other_entry in self.entries(state):
            if agent in reach.stuck or agent[:2] == member[:2]:
                continue
            near = memory.rank_of[other_entry.process] == rank
            same = other_entry.loc == entry.loc and (near or not to_mates)
            if same or (near and to_mates and other_entry.releases == SYS):
                yield agent
