"""A protocol made ready to be explored: its blocks as trees of operations, found out by running their generators.

A block is deterministic but for what it loads. So its behaviours form a tree that branches at loads only, by the value
read; polls and checked reads have one way on. The tree is discovered while exploring: `System.child` runs the block's
generator again for a value that was not seen before.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fusecheck.errors import UsageError
from fusecheck.protocol.language import ACQ_REL, ACQUIRE, RELEASE, Block, Cell, Kind, Launch, Op, Program

DONE = -1
"""Where a block stands when it has ended."""

MOST_OPERATIONS = 5000
"""Of one block between two loads; a generator that goes on has a loop without a poll."""

UNORDERED = -1
"""Of a node that neither acquires nor releases."""


class Node:
    """A block about to do an operation, with all that the explorer asks about it.

    Attributes:
        number: in `System.nodes`; what a state holds.
        process: the block.
        op: the operation.
        loc: the number of its cell; -1 without one.
        passes: whether a value ends the poll.
        acquires: the scope at which it acquires; -1 if it does not.
        releases: the scope at which it releases; -1 if it does not.
        polls: whether it is a poll that takes no value.
        early: whether it is a load that may be satisfied before it is its turn: neither acquire nor poll.
        triggered: whether the block has let its dependents go before.
        children: the next node by the value loaded, or by None; absent while not discovered.
    """

    __slots__ = (
        *("number", "process", "op", "kind", "loc", "passes", "acquires", "releases", "polls", "early"),
        *("triggered", "children", "history", "segment", "window"),
    )

    def __init__(self, number: int, process: int, op: Op, loc: int, *, triggered: bool) -> None:
        self.number, self.process, self.op, self.kind, self.loc = number, process, op, op.kind, loc
        self.passes: Callable[[int], bool] = op.test.holds if op.test is not None else _always
        ordered_in = op.order in (ACQUIRE, ACQ_REL) or op.kind in (Kind.START, Kind.GRID_WAIT)
        ordered_out = op.order in (RELEASE, ACQ_REL)
        self.acquires = int(op.scope) if ordered_in else UNORDERED
        self.releases = int(op.scope) if ordered_out else UNORDERED
        self.polls = op.kind is Kind.WAIT and op.value is None and op.put is None
        self.early = op.kind in (Kind.LOAD, Kind.READ) and not ordered_in
        self.triggered = triggered
        self.children: dict[int | None, int] = {}
        self.history: tuple[int, ...] = ()
        self.segment: object = None
        self.window: tuple[int, int] | None = None


def _always(value: int) -> bool:
    del value
    return True


def _started(launch: Launch, block: Block) -> Program:
    """The generator of one block.

    Raises:
        UsageError: the body raised, or does not yield.
    """
    try:
        made = launch.body(block)
    except Exception as error:
        raise _raised(launch.name, error) from error
    if not isinstance(made, Generator):
        raise UsageError(f"{launch.name}: its body returns {made!r}, expected a generator that yields operations")
    return made


def _raised(name: str, error: Exception) -> UsageError:
    return UsageError(f"{name} raised {type(error).__name__}: {error}; mend the protocol ({place(error)})")


def place(error: Exception) -> str:
    """File and line that an exception came out of."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


class Process(NamedTuple):
    """One block of one launch.

    Attributes:
        launch: its number.
        block: what the block knows.
        needs: processes that must have ended before it starts.
        lets: processes that must have ended or triggered before it starts.
        before: the blocks of the launch in front, which `grid_wait` waits for.
        name: of the kernel.
    """

    launch: int
    block: Block
    needs: tuple[int, ...]
    lets: tuple[int, ...]
    before: tuple[int, ...]
    name: str


class System:
    """All blocks of a protocol, and the cells that they share.

    Attributes:
        processes: every block of every launch.
        nodes: discovered so far, by number.
        cells: by number.
        initial: the value of each cell before the first launch; grows with the cells.
        discoveries: how often a load returned what it had not returned before.
    """

    def __init__(self, launches: Iterable[Launch]) -> None:
        if not isinstance(launches, Iterable):
            raise UsageError(f"launches(size) gives {launches!r}, expected a list of Launch")
        self._launches = list(launches)
        if not self._launches:
            raise UsageError("the protocol launches nothing; expected at least one Launch")
        for launch in self._launches:
            if not isinstance(launch, Launch):
                raise UsageError(f"launches(size) gives {launch!r}, expected Launch(body, block, name)")
        self.processes: list[Process] = []
        self.nodes: list[Node] = []
        self.cells: list[Cell] = []
        self.initial: list[int] = []
        self._numbers: dict[tuple[str, tuple[int, ...]], int] = {}
        self.discoveries = 0
        self._place()
        self.roots = [self._grow(process, (), Kind.START) for process in range(len(self.processes))]
        self.mates: list[tuple[int, ...]] = [self._overlapping(process) for process in range(len(self.processes))]
        self.discoveries = 0

    def _place(self) -> None:
        """Number the blocks, and find what each waits for before it starts."""
        blocks_of: list[tuple[int, ...]] = []
        last: dict[tuple[int, int], int] = {}
        for number, launch in enumerate(self._launches):
            if launch.block.grid < 1:
                raise UsageError(f"launch {launch.name} has {launch.block.grid} blocks, expected at least 1")
            lane = (launch.block.rank, launch.stream)
            front = blocks_of[last[lane]] if lane in last else ()
            events = tuple(m for other in launch.after for m in blocks_of[other])
            needs, lets = (events, front) if launch.early else (events + front, ())
            first = len(self.processes)
            self.processes += [Process(number, b, needs, lets, front, launch.name) for b in launch.blocks]
            blocks_of.append(tuple(range(first, len(self.processes))))
            last[lane] = number

    def location(self, cell: Cell) -> int:
        """The number of a cell.

        Raises:
            UsageError: it is none.
        """
        if not isinstance(cell, Cell):
            raise UsageError(f"an operation acts on {cell!r}, expected a cell such as Array(name)[rank, row]")
        key = (cell.array, cell.at)
        if key not in self._numbers:
            self._numbers[key] = len(self.cells)
            self.cells.append(cell)
            self.initial.append(cell.initial)
        return self._numbers[key]

    def child(self, node: Node, value: int | None) -> int:
        """Where the block stands after this operation; `value` is what a load read."""
        if node.kind is not Kind.LOAD:
            return node.children[None]
        if value not in node.children:
            self.discoveries += 1
            for other in self.nodes:
                other.segment = other.window = None
            assert value is not None
            node.children[value] = self._grow(node.process, (*node.history, value), Kind.LOAD)
        return node.children[value]

    def _grow(self, process: int, history: tuple[int, ...], after: Kind) -> int:
        """Run the block's generator with these loads, and add the nodes that follow them; the first one's number."""
        made = [] if after is not Kind.START else [self._node(process, Op(Kind.START, does="start"), triggered=False)]
        triggered = False
        for op, consumed in self._operations(process, history):
            if consumed >= len(history):
                made.append(self._node(process, op, triggered=triggered))
                made[-1].history = history
            triggered |= op.kind is Kind.TRIGGER
        for node, following in itertools.pairwise(made):
            node.children[None] = following.number
        if made[-1].kind is Kind.END:
            made[-1].children[None] = DONE
        return made[0].number

    def _operations(self, process: int, history: tuple[int, ...]) -> Iterable[tuple[Op, int]]:
        """Each operation with how many loads came before it, up to the first load behind `history`, or to the end."""
        at = self.processes[process]
        generator = _started(self._launches[at.launch], at.block)
        consumed = 0
        sent: Any = None
        for _ in range(MOST_OPERATIONS):
            try:
                op = generator.send(sent)
            except StopIteration:
                yield Op(Kind.END, does="end"), consumed
                return
            except Exception as error:
                raise _raised(at.name, error) from error
            if not isinstance(op, Op):
                raise UsageError(f"{at.name} yields {op!r}, expected an operation such as store(...) or wait(...)")
            yield op, consumed
            sent = None
            if op.kind is Kind.LOAD:
                if consumed == len(history):
                    return
                sent, consumed = history[consumed], consumed + 1
        raise UsageError(f"{at.name}: a block of more than {MOST_OPERATIONS} operations; loop with wait(...)")

    def _node(self, process: int, op: Op, *, triggered: bool) -> Node:
        loc = -1 if op.cell is None else self.location(op.cell)
        node = Node(len(self.nodes), process, op, loc, triggered=triggered)
        self.nodes.append(node)
        return node

    def _overlapping(self, process: int) -> tuple[int, ...]:
        """Blocks of the same rank that may run at the same time: of its grid, of other streams, under PDL the next."""
        me = self.processes[process]
        lane = self._launches[me.launch].stream
        early = {m for p in self.processes if p.lets for m in p.lets}
        return tuple(
            number
            for number, other in enumerate(self.processes)
            if number != process
            and other.block.rank == me.block.rank
            and (
                other.launch == me.launch
                or self._launches[other.launch].stream != lane
                or ((other.lets or number in early) and (me.lets or process in early))
            )
        )

    def touched(self, process: int) -> int:
        """The cells that a block accesses in any behaviour discovered so far, as bits."""
        bits = 0
        for node in self.nodes:
            if node.process == process and node.loc >= 0:
                bits |= 1 << node.loc
        return bits

    def launched(self) -> Sequence[Launch]:
        """The launches as given."""
        return self._launches
