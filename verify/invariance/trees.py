"""Trees of additions over the elements of a row, and the questions that leave no other tree.

Leaves are numbered, addition k makes node `leaves + k` of two nodes. a + b and b + a are one tree, for no output can
tell them apart; so are trees that differ in additions of zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

Question: TypeAlias = "tuple[int, int, int]"
"""(large, first, second): are the two elements added to each other before either meets the large one?"""


CHECKED = 24
"""Questions by which a tree is looked for at another batch size."""


@dataclass(frozen=True)
class Tree:
    """A binary tree of additions.

    Attributes:
        leaves: how many elements are added.
        merges: the additions in some order of execution, each of two nodes.
    """

    leaves: int
    merges: tuple[tuple[int, int], ...]

    @cached_property
    def depth(self) -> int:
        """Additions above any leaf, at most."""
        above = [0] * (self.leaves + len(self.merges))
        for k in range(len(self.merges) - 1, -1, -1):
            for child in self.merges[k]:
                above[child] = above[self.leaves + k] + 1
        return max(above[: self.leaves], default=0)

    @cached_property
    def least(self) -> list[int]:
        """The smallest leaf below each node, which stands for it in questions."""
        found = list(range(self.leaves))
        for one, two in self.merges:
            found.append(min(found[one], found[two]))
        return found

    @cached_property
    def questions(self) -> list[Question]:
        """Those whose answer is yes in this tree, and all yes in no other: leaves - 2 of them.

        For each addition but the last: a leaf of either operand, and one of what its sum is added to next. The node of
        another tree where the first two meet is then below the one where they meet the third, so that by induction
        every set of leaves that is summed up here is summed up there.
        """
        least, beside = self.least, self._beside
        return [
            (least[beside[self.leaves + k]], least[one], least[two]) for k, (one, two) in enumerate(self.merges[:-1])
        ]

    @cached_property
    def controls(self) -> list[Question]:
        """The same leaves with another one large, so that each answer is no; whoever keeps all says yes to these."""
        return [(first, second, large) for large, first, second in self.questions]

    @cached_property
    def checks(self) -> list[Question]:
        """Of the questions those about the largest sums, and some about others."""
        sizes = [1] * self.leaves
        for one, two in self.merges:
            sizes.append(sizes[one] + sizes[two])
        order = sorted(range(len(self.questions)), key=lambda k: -sizes[self.leaves + k])
        return [self.questions[k] for k in order[:16] + order[16 :: max(1, len(order) // (CHECKED - 16))]]

    @cached_property
    def _beside(self) -> dict[int, int]:
        return {child: other for one, two in self.merges for child, other in ((one, two), (two, one))}

    def path(self) -> list[Question]:
        """Of a leaf with most additions above it: questions that show each of them but the last two, in order."""
        deep = [0] * (self.leaves + len(self.merges))
        parent: dict[int, int] = {}
        for k in range(len(self.merges) - 1, -1, -1):
            for child in self.merges[k]:
                deep[child], parent[child] = deep[self.leaves + k] + 1, self.leaves + k
        node = max(range(self.leaves), key=lambda leaf: deep[leaf])
        leaf, beside = node, []
        while node in parent:
            beside.append(self.least[self._beside[node]])
            node = parent[node]
        return [(after, leaf, before) for before, after in itertools.pairwise(beside)]

    def same(self, other: Tree) -> bool:
        """Whether the two are one tree."""
        known: dict[tuple[int, int], int] = {}

        def root(tree: Tree) -> int:
            name = list(range(tree.leaves))
            for one, two in tree.merges:
                pair = (min(name[one], name[two]), max(name[one], name[two]))
                name.append(known.setdefault(pair, tree.leaves + len(known)))
            return name[-1]

        return self.leaves == other.leaves and root(self) == root(other)

    def total(self, values: Tensor) -> Tensor:
        """Add up [rows, leaves] in float32 as this tree does; [rows]."""
        level = [0] * self.leaves
        for one, two in self.merges:
            level.append(1 + max(level[one], level[two]))
        nodes = torch.empty(len(level), len(values), device=values.device)
        nodes[: self.leaves] = values.T
        for height in range(1, max(level) + 1):
            here = [node for node in range(self.leaves, len(level)) if level[node] == height]
            first, second = ([self.merges[node - self.leaves][k] for node in here] for k in (0, 1))
            nodes[here] = nodes[first] + nodes[second]
        return nodes[-1]

    def __str__(self) -> str:
        names = [str(leaf) for leaf in range(self.leaves)]
        for one, two in self.merges:
            first, second = sorted((one, two), key=lambda node: self.least[node])
            names.append(f"({names[first]}+{names[second]})")
        return names[-1].removeprefix("(").removesuffix(")") if self.leaves > 1 else names[-1]


def chain(order: Sequence[int]) -> Tree:
    """The serial sum in this order, of all leaves."""
    merges, node = [], order[0]
    for k, leaf in enumerate(order[1:]):
        merges.append((node, leaf))
        node = len(order) + k
    return Tree(len(order), tuple(merges))
