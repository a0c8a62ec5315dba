"""The shapes in which kernels spread a row over a chip, each with the tree of additions that it makes.

A shape is a sequence of stages. In each, the sums that are left in one group are numbered by their place, and are added
up serially, by halving (x and x + half, as a shuffle by xor from the widest distance on does), or by neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fusecheck.invariance.launch import WARP, WIDEST
from fusecheck.invariance.trees import Tree

Places: TypeAlias = "NDArray[np.int64]"

WIDTHS = (8, 4, 2, 1, 16)
"""Elements of one access."""

BLOCKS = (1, 2, 4, 8, 16)
"""Blocks of a cluster."""

ROUNDS = 64
"""Accesses of a thread, at most."""


@dataclass(frozen=True)
class Stage:
    """Additions of one kind.

    Attributes:
        kind: `serial`, `halves` or `neighbours`.
        count: places of a group.
        place: of columns.
    """

    kind: str
    count: int
    place: Callable[[Places], Places]

    def step(self, one: Places, two: Places) -> Places:
        """In which step the sums at two places of a group meet; 0 where they are one."""
        if self.kind == "serial":
            return np.where(one == two, 0, np.maximum(one, two))
        apart = one ^ two
        if self.kind == "neighbours":
            return _bits(apart)
        if self.count & (self.count - 1) == 0:
            return np.where(apart == 0, 0, self.count.bit_length() - _bits(apart & -apart))
        steps, left, met = 0, self.count, np.where(apart == 0, 0, -1)
        while left > 1:
            half, steps = left // 2, steps + 1
            one, two = (np.where(x >= left - half, x - (left - half), x) for x in (one, two))
            left -= half
            met = np.where((met < 0) & (one == two), steps, met)
        return met

    def add(self, nodes: dict[int, int], join: Callable[[int, int], int]) -> int:
        """Add up the nodes at their places; those that are not there are zeros."""
        if self.kind == "serial":
            places = sorted(nodes)
            total = nodes[places[0]]
            for place in places[1:]:
                total = join(total, nodes[place])
            return total
        left = self.count
        while left > 1:
            half, after = left // 2, dict[int, int]()
            for place in sorted(nodes):
                to = place >> 1 if self.kind == "neighbours" else place if place < left - half else place - left + half
                after[to] = join(after[to], nodes[place]) if to in after else nodes[place]
            nodes, left = after, left - half
        return nodes[0]


def _bits(numbers: Places) -> Places:
    """The length of each number in bits; numbers below 2^53."""
    lengths: Places = np.frexp(numbers)[1].astype(np.int64)
    return lengths


@dataclass(frozen=True)
class Shape:
    """A way to spread a row.

    Attributes:
        words: its name.
        hidden: elements of the row.
        stages: in order.
    """

    words: str
    hidden: int
    stages: tuple[Stage, ...]

    def when(self, one: Places, two: Places) -> Places:
        """A number for each pair of columns that grows with the time at which they meet."""
        found = np.zeros(len(one), dtype=np.int64)
        for number, stage in enumerate(self.stages):
            step = stage.step(stage.place(one), stage.place(two))
            found = np.where(step > 0, (number << 20) + step, found)
        return found

    def tree(self) -> Tree:
        """Its tree."""
        columns = np.arange(self.hidden)
        places = [stage.place(columns).tolist() for stage in self.stages]
        later = [list(zip(*places[k + 1 :], strict=True)) for k in range(len(places) - 1)] + [[()] * self.hidden]
        merges: list[tuple[int, int]] = []

        def join(one: int, two: int) -> int:
            merges.append((one, two))
            return self.hidden + len(merges) - 1

        sums = {column: column for column in range(self.hidden)}  # by a column of each sum that is left
        for stage, place, rest in zip(self.stages, places, later, strict=True):
            groups: dict[Any, dict[int, int]] = {}
            first: dict[Any, int] = {}
            for column, node in sums.items():
                groups.setdefault(rest[column], {})[place[column]] = node
                first.setdefault(rest[column], column)
            sums = {first[key]: stage.add(nodes, join) for key, nodes in groups.items()}
        return Tree(self.hidden, tuple(merges))


@lru_cache(maxsize=8)
def shapes(hidden: int) -> tuple[Shape, ...]:
    """Every known shape for rows of `hidden` elements; of several with one tree the plainest words come first."""
    serially = Shape("serially", hidden, (Stage("serial", hidden, lambda x: x),))
    return tuple(sorted((*_shapes(hidden), serially), key=lambda x: sum(map(x.words.count, ("(", " by ", " in ")))))


def _shapes(hidden: int) -> Iterator[Shape]:
    for width in (w for w in WIDTHS if hidden % w == 0):
        for blocks in (b for b in BLOCKS if hidden // width % b == 0):
            left = hidden // width // blocks
            for rounds in (r for r in range(1, ROUNDS + 1) if left % r == 0 and (r == 1 or blocks == 1)):
                for words, stages in _threads(width, left // rounds, rounds, blocks):
                    for more, rest in _blocks(width * left // rounds, rounds, blocks):
                        yield Shape(words + more, hidden, stages + rest)


def _threads(width: int, threads: int, rounds: int, blocks: int) -> Iterator[tuple[str, tuple[Stage, ...]]]:
    own = f"{threads} threads x {width}"

    def of_block(columns: Places) -> Places:
        return columns // width % threads

    for words, stages in _of_a_thread(width, threads, rounds):
        if threads <= WIDEST:
            for kind in ("halves", "neighbours"):
                lanes = Stage(kind, WARP, lambda x: of_block(x) % WARP)
                for across in ("halves", "neighbours", "serial"):
                    count = max(1, -(-threads // WARP))
                    padded = count if across == "serial" else WARP
                    warps = Stage(across, padded, lambda x: of_block(x) // WARP)
                    how = "warps" + (f" ({kind}, then {across})" if (kind, across) != ("halves", "halves") else "")
                    yield f"{own}{words}, {how}", (*stages, lanes, warps)
        for kind in ("halves", "neighbours", "serial") if blocks == 1 else ():
            yield f"{own}{words}, added by {kind}", (*stages, Stage(kind, threads, of_block))


def _of_a_thread(width: int, threads: int, rounds: int) -> Iterator[tuple[str, tuple[Stage, ...]]]:

    def lane(columns: Places) -> Places:
        return columns % width

    def turn(columns: Places) -> Places:
        return columns // (width * threads)

    serial = Stage("serial", width, lane)
    if rounds == 1:
        yield "", (serial,)
        if width > 2:
            yield " (by halves)", (Stage("halves", width, lane),)
            yield " (by neighbours)", (Stage("neighbours", width, lane),)
        return
    rest = Stage("serial", rounds, turn)
    yield f" in {rounds} rounds", (Stage("serial", rounds * width, lambda x: turn(x) * width + lane(x)),)
    if width > 1:
        yield f" in {rounds} rounds, each summed", (serial, rest)
        for kind in ("serial", "halves", "neighbours"):
            yield f" in {rounds} rounds, lanes last ({kind})", (rest, Stage(kind, width, lane))


def _blocks(elements: int, rounds: int, blocks: int) -> Iterator[tuple[str, tuple[Stage, ...]]]:
    if blocks == 1:
        yield ("", ()) if rounds > 1 else (", 1 block", ())
        return

    def place(columns: Places) -> Places:
        return columns // elements

    yield f", {blocks} blocks", (Stage("serial", blocks, place),)
    if blocks > 2:
        yield f", {blocks} blocks by halves", (Stage("halves", blocks, place),)
