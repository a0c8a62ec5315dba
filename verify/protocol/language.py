"""The words in which a protocol between ranks is written: cells of shared memory, operations on them, and launches.

A protocol is a list of launches. The body of a launch is a generator that yields one operation at a time, as the
kernel does, and is sent what a `load` read. All else is Python: loops, arithmetic on what was read, helper functions.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, NamedTuple, Protocol, TypeAlias

from fusecheck.errors import UsageError

SENTINEL = -1
"""The bits of -0.0: "not yet written"."""

SUBNORMAL = -2
"""A payload of negative subnormals, which a comparison that flushes them takes for the sentinel."""

POISON = -3
"""What lies in a buffer that nobody has written."""

BEFORE = -4
"""What stood in an operand before the kernel in front wrote it."""

_FIRST_DATA, _RANKS = 100, 10
"""Values from here on are data: the call in tens, the rank in units. Smaller ones are counters and flags."""

TOTAL = 9
"""In place of a rank: the sum over all of them."""


def data(call: int, rank: int) -> int:
    """The value that stands for the rows of `rank` in `call`; with `TOTAL` for their sum."""
    return _FIRST_DATA + call * _RANKS + rank


def describe(value: int) -> str:
    """What a value stands for, in words."""
    named = {SENTINEL: "the sentinel", SUBNORMAL: "a subnormal", POISON: "poison", BEFORE: "the old operand"}
    if value < _FIRST_DATA:
        return named.get(value, str(value))
    call, rank = divmod(value - _FIRST_DATA, _RANKS)
    return f"the sum of call {call}" if rank == TOTAL else f"rank {rank}'s rows of call {call}"


class Order(IntEnum):
    """How an access is ordered with the others of its block. `VOLATILE` is PTX's: relaxed, at system scope."""

    WEAK = 0
    RELAXED = 1
    ACQUIRE = 2
    RELEASE = 3
    ACQ_REL = 4


WEAK, RELAXED, ACQUIRE, RELEASE, ACQ_REL = Order
VOLATILE = RELAXED


class Scope(IntEnum):
    """Who an ordered access is ordered for: blocks of the same rank, or everybody."""

    GPU = 0
    SYS = 1


GPU, SYS = Scope


class Cell(NamedTuple):
    """One place of shared memory, as large as what the protocol never splits."""

    array: str
    at: tuple[int, ...]
    initial: int

    def __str__(self) -> str:
        return f"{self.array}[{', '.join(map(str, self.at))}]"


@dataclass(frozen=True)
class Array:
    """Cells of one name: `slot[rank, third, row]`.

    Attributes:
        name: in findings.
        initial: what each cell holds before the first launch.
    """

    name: str
    initial: int = 0

    def __getitem__(self, index: int | tuple[int, ...]) -> Cell:
        return Cell(self.name, index if isinstance(index, tuple) else (index,), self.initial)


class Test(NamedTuple):
    """When a poll ends."""

    kind: str
    value: int | frozenset[int]

    def holds(self, value: int) -> bool:
        """Whether `value` ends the poll."""
        if self.kind == "least":
            return isinstance(self.value, int) and value >= self.value
        return (value in self._values) == (self.kind == "among")

    @property
    def _values(self) -> frozenset[int]:
        return self.value if isinstance(self.value, frozenset) else frozenset({self.value})

    def __str__(self) -> str:
        words = {"least": "at least", "among": "", "outside": "not"}[self.kind]
        return f"{words} {' or '.join(describe(value) for value in sorted(self._values))}".strip()


def among(*values: int) -> Test:
    """Poll until the cell holds one of these."""
    return Test("among", frozenset(values))


def outside(*values: int) -> Test:
    """Poll until the cell holds none of these."""
    return Test("outside", frozenset(values))


def at_least(value: int) -> Test:
    """Poll until the cell holds this or more."""
    return Test("least", value)


class Kind(IntEnum):
    """What an operation is."""

    STORE = 0
    LOAD = 1
    READ = 2
    WAIT = 3
    ADD = 4
    FENCE = 5
    TRIGGER = 6
    GRID_WAIT = 7
    START = 8
    END = 9


class Op(NamedTuple):
    """One operation of one block.

    Attributes:
        kind: what it is.
        cell: where it acts; None for fences and launches.
        value: stored, added, or (READ, WAIT) the only right one to find; None where any will do.
        test: when a WAIT ends.
        put: what a WAIT stores in the same step, as a compare-and-swap does.
        over: what a STORE must find: the property that buffers are clear before they are used again.
        order: with the block's other accesses.
        scope: of that order.
        does: the step of the kernel, in words; operations of one step are shown as one.
    """

    kind: Kind
    cell: Cell | None = None
    value: int | None = None
    test: Test | None = None
    put: int | None = None
    over: int | None = None
    order: Order = WEAK
    scope: Scope = SYS
    does: str = ""


Program: TypeAlias = "Generator[Op, int, Any]"
"""A block as a generator of operations; `value = yield load(...)`."""


def store(
    cell: Cell, value: int, order: Order = WEAK, scope: Scope = SYS, *, does: str = "store", over: int | None = None
) -> Op:
    """Write a value. `over` states what must stand there: a cell that is not clear is a finding."""
    return Op(Kind.STORE, cell, value, order=order, scope=scope, does=does, over=over)


def load(cell: Cell, order: Order = WEAK, scope: Scope = SYS, *, does: str = "load") -> Op:
    """Read a control word; the generator is sent its value."""
    return Op(Kind.LOAD, cell, order=order, scope=scope, does=does)


def read(cell: Cell, right: int, order: Order = WEAK, scope: Scope = SYS, *, does: str = "read") -> Op:
    """Read data once. Any value but `right` is a finding."""
    return Op(Kind.READ, cell, right, order=order, scope=scope, does=does)


def wait(cell: Cell, test: Test, order: Order = RELAXED, scope: Scope = SYS, *, does: str = "wait") -> Op:
    """Poll a flag until it passes the test. For ever is a finding."""
    return Op(Kind.WAIT, cell, test=test, order=order, scope=scope, does=does)


def take(cell: Cell, test: Test, right: int, order: Order = VOLATILE, scope: Scope = SYS, *, does: str = "take") -> Op:
    """Poll data that is its own flag until it passes the test. Any value but `right` is a finding."""
    return Op(Kind.WAIT, cell, right, test, order=order, scope=scope, does=does)


def swap(cell: Cell, test: Test, put: int, order: Order, scope: Scope = SYS, *, does: str = "swap") -> Op:
    """Compare-and-swap until it succeeds: wait for the test, and store `put` in the same step."""
    return Op(Kind.WAIT, cell, test=test, put=put, order=order, scope=scope, does=does)


def add(cell: Cell, amount: int, order: Order = RELAXED, scope: Scope = GPU, *, does: str = "add") -> Op:
    """Add atomically, without asking what was there (PTX `red`)."""
    return Op(Kind.ADD, cell, amount, order=order, scope=scope, does=does)


def fence(scope: Scope = SYS, *, does: str = "fence") -> Op:
    """`__threadfence_system()`, or `__threadfence()` with `GPU`."""
    return Op(Kind.FENCE, order=ACQ_REL, scope=scope, does=does)


def trigger(*, does: str = "trigger") -> Op:
    """`griddepcontrol.launch_dependents`: the next launch may start once every block has come here or ended."""
    return Op(Kind.TRIGGER, does=does)


def grid_wait(*, does: str = "wait for the grid before") -> Op:
    """`griddepcontrol.wait`: until the launch in front has ended, and its stores are visible."""
    return Op(Kind.GRID_WAIT, order=ACQUIRE, does=does)


@dataclass(frozen=True)
class Block:
    """What a block knows when it starts.

    Attributes:
        rank: of the device.
        index: of the block in its grid (`blockIdx.x`).
        grid: blocks of this launch (`gridDim.x`).
        ranks: of the group.
        call: of the collective, from 0.
        rows: of each rank in this call.
    """

    rank: int
    index: int
    grid: int
    ranks: int
    call: int = 0
    rows: int = 1

    def mine(self, count: int | None = None) -> range:
        """The rows, or the `count` items, that are this block's: every `grid`-th."""
        return range(self.index, self.rows if count is None else count, self.grid)


Body: TypeAlias = Callable[[Block], Program]


@dataclass(frozen=True)
class Launch:
    """A kernel as the host queues it.

    Attributes:
        body: one block of it.
        block: of rank and call; its index is filled in.
        name: in findings.
        stream: launches of a rank and stream start in the order in which they are listed.
        early: launched with PDL's attribute: may start when the launch in front has triggered or ended.
        after: places in the list of launches, of any stream, that an event waits for.
    """

    body: Body
    block: Block
    name: str = "kernel"
    stream: int = 0
    early: bool = False
    after: tuple[int, ...] = ()

    @property
    def blocks(self) -> list[Block]:
        """Every block of the grid."""
        return [replace(self.block, index=index) for index in range(self.block.grid)]


ROWS = (2, 1, 2, 2, 1, 1, 2)
"""Rows of each call: every change between one and two, and no change, within seven calls."""


@dataclass(frozen=True)
class Size:
    """How much of a protocol is explored.

    Attributes:
        ranks: of the group.
        blocks: the most of a launch; a call of fewer rows has fewer.
        calls: one after another on one workspace.
        rows: of each call, in turn.

    Raises:
        UsageError: one is below 1, or there are more ranks or calls than values can tell apart.
    """

    ranks: int = 2
    blocks: int = 1
    calls: int = 4
    rows: Sequence[int] = field(default=ROWS)

    def __post_init__(self) -> None:
        for name, value, most in (("ranks", self.ranks, 8), ("blocks", self.blocks, 8), ("calls", self.calls, 20)):
            if not 1 <= value <= most:
                raise UsageError(f"--{name} {value}, expected 1 to {most}")
        if not self.rows or min(self.rows) < 1:
            raise UsageError(f"rows {list(self.rows)}, expected at least one, each 1 or more")

    def __str__(self) -> str:
        return f"N={self.ranks} B={self.blocks} K={self.calls}"

    def block(self, rank: int, call: int) -> Block:
        """The blocks of a call: as many as it has rows, up to the most."""
        rows = self.rows[call % len(self.rows)]
        return Block(rank, 0, min(self.blocks, rows), self.ranks, call, rows)

    def each(self, body: Body, name: str, **more: Any) -> list[Launch]:
        """Launch `body` once a call on every rank, in one stream."""
        return [
            Launch(body, self.block(rank, call), name, **more)
            for rank in range(self.ranks)
            for call in range(self.calls)
        ]


class Model(Protocol):
    """A protocol to check: what `--model package.module:attribute` names."""

    def launches(self, size: Size) -> Iterable[Launch]:
        """Every launch of every rank; those of one rank and stream in the order of the host."""
        ...
