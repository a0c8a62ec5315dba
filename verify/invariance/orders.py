"""Reads the order in which ranks are added up, element by element, off what pairs of large addends leave (FPRev).

Rank i brings M, rank j -M, every other one a unit that is lost beside M. The units that are left are those of the ranks
that join when i and j have met; so each pair tells how many ranks are summed up where it meets, and all pairs together
tell the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusecheck.errors import UsageError
from fusecheck.invariance.trees import Tree

LEVELS = {
    "bf16": {"native": (2.0**12, 1.0), "float32": (2.0**32, 1.0), "float64": (2.0**100, 1.0)},
    "fp16": {"native": (2.0**4, 2.0**-14), "float32": (2.0**15, 2.0**-14)},
}
"""By the addends' dtype: M and the unit at which a sum in this precision, or in fewer bits, loses all units."""

NOTHING = 255
"""In place of a number of units: what came back is no number of units."""


MOST_RUNS = 8
"""Stretches of elements that are told of."""


@dataclass(frozen=True)
class Mask:
    """A call that asks about one pair of ranks.

    Attributes:
        world_size: ranks.
        tokens: rows of the batch.
        pair: of ranks, with a large addend and its negative.
        level: a key of `LEVELS`.
        strategy: of the exchange; empty for the Problem's.
        rows: that are read.
    """

    world_size: int
    tokens: int
    pair: tuple[int, int]
    level: str
    strategy: str
    rows: tuple[int, ...]

    @classmethod
    def from_record(cls, record: Any) -> Mask:
        """Read what `asdict` made, be it through JSON.

        Raises:
            UsageError: it is no such record.
        """
        try:
            mask = cls(**{**record, "pair": tuple(record["pair"]), "rows": tuple(record["rows"])})
            one, two = mask.pair
            numbers = all(isinstance(n, int) for n in (mask.world_size, mask.tokens, one, two, *mask.rows))
            right = numbers and 0 <= one < two < mask.world_size and all(0 <= row < mask.tokens for row in mask.rows)
            right = right and mask.level in LEVELS["bf16"] and mask.strategy in ("", "ONESHOT", "TWOSHOT", "AUTO")
        except (TypeError, KeyError, ValueError):
            right = False
        if not right:
            raise UsageError(f"a probe of a replay line is {str(record)[:60]}, expected that of a finding, whole")
        return mask


def pairs(ranks: int) -> list[tuple[int, int]]:
    """Every two ranks."""
    return list(combinations(range(ranks), 2))


@dataclass(frozen=True)
class Order:
    """How the ranks of some elements are added up; without a tree, in words why not.

    Attributes:
        words: `in rank order` and the like.
        tree: over the ranks; None where the sum is exact, or cannot be read.
        exact: no unit is lost beside any M that the dtype holds.
    """

    words: str
    tree: Tree | None = None
    exact: bool = False

    @property
    def by_rank(self) -> bool:
        """Whether it is 0, 1, ... N - 1."""
        return self.tree is not None and _serial(self.tree) == list(range(self.tree.leaves))


def order_of(units: Sequence[int], ranks: int) -> Order:
    """The order of one element.

    Args:
        units: left by each of `pairs(ranks)`.
        ranks: of the group, at least 2.
    """
    if NOTHING in units:
        return Order("not readable: with a large addend and its negative, what is left is no number of units")
    if ranks > 2 and all(count == ranks - 2 for count in units):
        return Order("exactly, rounded once", exact=True)
    size = {frozenset(pair): ranks - count for pair, count in zip(pairs(ranks), units, strict=True)}
    nodes: list[tuple[frozenset[int], int]] = [(frozenset((rank,)), rank) for rank in range(ranks)]
    merges: list[tuple[int, int]] = []
    while len(nodes) > 1:
        met = [
            (one, two)
            for one, two in combinations(nodes, 2)
            if all(size[frozenset((a, b))] == len(one[0] | two[0]) for a in one[0] for b in two[0])
        ]
        if not met:
            return Order("not readable: the sums of pairs fit no tree of additions of two")
        one, two = met[0]
        merges.append((one[1], two[1]))
        nodes = [node for node in nodes if node not in (one, two)] + [(one[0] | two[0], ranks + len(merges) - 1)]
    tree = Tree(ranks, tuple(merges))
    return Order(_words(tree), tree)


def _serial(tree: Tree) -> list[int]:
    """The ranks in the order of a serial sum, the lesser of the first two first; empty if it is none."""
    order: list[int] = []
    for k, pair in enumerate(tree.merges):
        leaves = sorted(node for node in pair if node < tree.leaves)
        if len(leaves) != (1 if k else 2):
            return []
        order += leaves
    return order


def _words(tree: Tree) -> str:
    ranks, order = tree.leaves, _serial(tree)
    if ranks == 2:
        return "in the only order of two"
    if order == list(range(ranks)):
        return "in rank order"
    for first in range(ranks):
        for way, step in (("a", 1), ("a falling", -1)):
            ring = [(first + k * step) % ranks for k in range(ranks)]
            if order == sorted(ring[:2]) + ring[2:]:
                return f"in {way} ring from rank {first} on"
    return f"serially, {', '.join(map(str, order))}" if order else f"as the tree {tree}"


def described(rows: Sequence[int], codes: NDArray[np.int64], orders: dict[int, Order]) -> str:
    """Where which order is used, in words.

    Args:
        rows: numbers of the rows that were read.
        codes: which of the orders each element has, [rows, hidden].
        orders: by code.
    """
    if len(orders) == 1:
        return next(iter(orders.values())).words
    if bool((codes == codes[:, :1]).all()):
        return _runs("row", list(rows), codes[:, 0].tolist(), orders)
    if bool((codes == codes[:1]).all()):
        return _runs("column", list(range(codes.shape[1])), codes[0].tolist(), orders)
    flat = codes.reshape(-1)
    return _runs("element", list(range(flat.size)), flat.tolist(), orders)


def _runs(what: str, numbers: list[int], codes: list[int], orders: dict[int, Order]) -> str:
    """Stretches of one order, the first eight."""
    starts = [k for k in range(len(codes)) if not k or codes[k] != codes[k - 1]]
    shown = [
        f"from {what} {numbers[start]} to {numbers[end - 1]} {orders[codes[start]].words}"
        for start, end in list(zip(starts, [*starts[1:], len(codes)], strict=True))[:MOST_RUNS]
    ]
    more = [f"and {len(starts) - MOST_RUNS} more stretches"] if len(starts) > MOST_RUNS else []
    return "; ".join(shown + more)
