"""Every interleaving of a protocol, or the first that goes wrong."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fusecheck.errors import UsageError
from fusecheck.protocol.language import Launch
from fusecheck.protocol.memory import Fault, Memory, Move, State
from fusecheck.protocol.reduction import Reduction
from fusecheck.protocol.system import DONE, System

MEMORIES = ("sc", "relaxed")


@dataclass(frozen=True)
class Failure:
    """What goes wrong, and how to come there.

    Attributes:
        kind: `read`, `not clear`, or `hang`.
        moves: from the first state.
        fault: of a read or a store; None of a hang.
        stuck: nodes at which blocks wait for ever; of a hang.
    """

    kind: str
    moves: tuple[Move, ...]
    fault: Fault | None = None
    stuck: tuple[int, ...] = ()


@dataclass(frozen=True)
class Exploration:
    """What exploring a protocol found.

    Attributes:
        system: that was explored.
        memory: with its moves.
        failure: the first one; None if every interleaving is right.
        states: that differ.
        transitions: moves made between them.
        seconds: of the processor.
        peak_mb: the most memory that the process has had meanwhile, the interpreter included.
        complete: whether all was explored that had to be.
    """

    system: System
    memory: Memory
    failure: Failure | None
    states: int
    transitions: int
    seconds: float
    peak_mb: float
    complete: bool


def _forget_peak() -> None:
    """Count the peak of the process from here on; where Linux does not let it, from its start (proc(5), clear_refs)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class Explorer:
    """Explores one protocol.

    Args:
        launches: of the protocol.
        memory: `sc` or `relaxed`.
        reduce: whether to leave out orders that make no difference.
        limit: the most states; None for all.
        clears: whether a store over what is not clear counts as a failure, or only a wrong read.

    Raises:
        UsageError: no such memory, or a protocol that cannot be run.
    """

    def __init__(
        self,
        launches: Iterable[Launch],
        memory: str = "sc",
        *,
        reduce: bool = True,
        limit: int | None = None,
        clears: bool = True,
    ) -> None:
        if memory not in MEMORIES:
            raise UsageError(f"--memory {memory!r}, expected one of: {', '.join(MEMORIES)}")
        self.system = System(launches)
        self.memory = Memory(self.system, relaxed=memory == "relaxed")
        self.reduction = Reduction(self.memory) if reduce else None
        self.limit, self.clears = limit, clears
        self.states = self.transitions = 0

    def explore(self) -> Exploration:
        """Try every interleaving. A pass over a tree that grew meanwhile is not to be trusted, and done again."""
        began = time.process_time()
        _forget_peak()
        while True:
            self.system.discoveries = 0
            self.memory.refresh()
            failure, complete = self._pass()
            if failure is not None or not complete or not self.system.discoveries:
                break
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        seconds = time.process_time() - began
        return Exploration(
            self.system,
            self.memory,
            failure,
            self.states,
            self.transitions,
            seconds,
            peak,
            failure is None and complete,
        )

    def ends(self) -> set[State]:
        """Every state in which nothing can move any more, whatever went wrong on the way; of small systems."""
        while True:
            self.system.discoveries = 0
            self.memory.refresh()
            found: set[State] = set()
            known, left = {self.memory.first()}, [self.memory.first()]
            while left:
                state = left.pop()
                moves = self._choose(state)
                following = {self.memory.step(state, move)[0] for move in moves}
                found |= set() if moves else {state}
                left += following - known
                known |= following
            if not self.system.discoveries:
                self.states = len(known)
                return found

    def key(self, state: State) -> object:
        """By what two states are the same."""
        return state

    def _choose(self, state: State) -> list[Move]:
        return self.memory.moves(state) if self.reduction is None else self.reduction.choose(state)

    def _pass(self) -> tuple[Failure | None, bool]:
        first = self.memory.first()
        came: dict[object, tuple[State, Move] | None] = {self.key(first): None}
        left = [first]
        self.transitions = 0
        while left:
            state = left.pop()
            moves = self._choose(state)
            if not moves and any(at != DONE for at in state.at):
                stuck = tuple(at for at in state.at if at != DONE)
                return Failure("hang", self._way(came, state), stuck=stuck), False
            for move in moves:
                after, fault = self.memory.step(state, move)
                self.transitions += 1
                if fault is not None and (self.clears or fault.kind == "read"):
                    self.states = len(came)
                    return Failure(fault.kind, (*self._way(came, state), move), fault), False
                key = self.key(after)
                if key not in came:
                    came[key] = (state, move)
                    left.append(after)
            if self.limit is not None and len(came) > self.limit:
                self.states = len(came)
                return None, False
        self.states = len(came)
        return None, True

    def _way(self, came: dict[object, tuple[State, Move] | None], state: State) -> tuple[Move, ...]:
        moves = []
        step = came[self.key(state)]
        while step is not None:
            moves.append(step[1])
            step = came[self.key(step[0])]
        return tuple(reversed(moves))
