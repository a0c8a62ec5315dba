"""Asks a kernel for the order of its additions: that of the ranks' sum, and the tree of its sum of squares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np

from fusecheck import backends
from fusecheck.dataflow import Dataflow
from fusecheck.invariance import masks
from fusecheck.invariance.calls import Call
from fusecheck.invariance.claims import doubling
from fusecheck.invariance.orders import LEVELS, Mask, Order, described, order_of, pairs
from fusecheck.invariance.squares import NO, Read, Unreadable, read
from fusecheck.invariance.subject import Kernels
from fusecheck.invariance.trees import Question, Tree

ORDER, TREE = "order of the ranks", "tree of the squares"
"""Names of what is read, beside the claims."""

ROWS = 64
"""Rows of a batch in which the order of the ranks is read, at most."""

SIZES = 3
"""Batch sizes between the smallest and the largest, at most, at which the order of the ranks is read."""

REGIMES = 8
"""Trees that are read, at most."""

ENOUGH = f"more than {REGIMES} trees"


@dataclass
class Probes:
    """Reads the orders of one kernel.

    Attributes:
        kernels: asked.
        worlds: numbers of ranks.
        strategies: of the exchange.
        changes: batch sizes from which on the bits of a row are known to be others.
        most: calls in which trees are read, at most.
    """

    kernels: Kernels
    worlds: tuple[int, ...]
    strategies: tuple[str, ...]
    changes: tuple[int, ...] = ()
    most: int = 1000
    _flow: Dataflow = field(init=False)
    _looked: dict[tuple[Tree, int], bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._flow = backends.backend(self.kernels.backend).dataflow(self.kernels.problem)

    def records(self) -> list[dict[str, Any]]:
        """What was read, as records beside those of the claims."""
        found = []
        for claim, about in ((ORDER, self._order), (TREE, self._trees)):
            before = self.kernels.calls
            record = about()
            found.append({"claim": claim, "untold": "", "changes": []} | record)
            found[-1]["calls"] = self.kernels.calls - before
        return found

    # ------------------------------------------------------------------ the ranks' sum
    def _order(self) -> dict[str, Any]:
        if untold := masks.no_sum(self.kernels.problem):
            return {"verdict": "untold", "untold": untold, "tried": ""}
        said: dict[str, str] = {}
        refuted: dict[str, Any] = {}
        for world in self.worlds:
            for size in sorted({1, *self.changes[:SIZES], self._largest}, reverse=True):
                for strategy in self._taken(world, size):
                    words, wrong = self._read_order(world, size, strategy)
                    exchange = f" by {strategy}" if strategy else ""
                    said[f"{size} rows on {world} ranks{exchange}"] = words
                    refuted = wrong or refuted  # the smallest batch
        groups: dict[str, list[str]] = {}
        for where, each in said.items():
            groups.setdefault(each, []).append(where)
        first, *others = groups
        words = first if not others else f"{first} in {', '.join(groups[first])}"
        words += f"; in {', '.join(where for each in others for where in groups[each])} otherwise" if others else ""
        told = {"words": words, "tried": words, "orders": said}
        return told | ({"verdict": "breaks"} | refuted if refuted else {"verdict": "read"})

    @property
    def _largest(self) -> int:
        return self.kernels.problem.tokens

    def _taken(self, world: int, size: int) -> list[str]:
        calls = [Call(size, strategy=each, world_size=world) for each in self.strategies]
        return [call.strategy for call in calls if not self.kernels.takes(call)] or [""]

    def _read_order(self, world: int, size: int, strategy: str) -> tuple[str, dict[str, Any]]:
        """In words, and what refutes the declared order."""
        rows = tuple(sorted({k * size // min(size, ROWS) for k in range(min(size, ROWS))}))
        mask = Mask(world, size, (0, 1), "float32", strategy, rows)
        levels = [level for level in ("float32", "float64") if level in LEVELS[self.kernels.problem.dtype]]
        for level in levels:
            everyone = self._units(replace(mask, level=level))
            if any(not order.exact for units in everyone for order in _orders(units, world)[1].values()):
                break
        words = [described(rows, *_orders(units, world)) for units in everyone]
        exact = any(order.exact for units in everyone for order in _orders(units, world)[1].values())
        told = words[0] if len(set(words)) == 1 else "; ".join(f"on rank {k} {each}" for k, each in enumerate(words))
        precision = "" if exact or world == 2 else f", in {self._precision(mask, level, everyone[0], world)}"
        wrong = self._refuted(replace(mask, level=level), everyone) if self._flow.order == "rank" else {}
        return told + precision, wrong

    def _units(self, mask: Mask) -> list[Any]:
        """By rank, [pairs, rows, hidden]."""
        answers = [self.kernels.units(replace(mask, pair=pair)) for pair in pairs(mask.world_size)]
        return [np.stack(of_rank) for of_rank in zip(*answers, strict=True)]

    def _precision(self, mask: Mask, level: str, units: Any, world: int) -> str:
        """Of the sum: the least in which units that were lost are lost beside a smaller addend, too."""
        pair = int(units.reshape(len(units), -1)[:, 0].argmin())
        if level == "float32":
            left = self.kernels.units(replace(mask, level="native", pair=pairs(world)[pair]))[0]
            return self.kernels.problem.dtype if bool((left == units[pair]).all()) else "float32"
        return level

    def _refuted(self, mask: Mask, everyone: list[Any]) -> dict[str, Any]:
        """The first element that is not summed up in rank order: what it says, and how to ask it again."""
        for rank, units in enumerate(everyone):
            codes, orders = _orders(units, mask.world_size)
            for code, order in orders.items():
                if order.by_rank:
                    continue
                row, column = (int(n) for n in np.argwhere(codes == code)[0])
                wanted = [mask.world_size - 1 - two for _, two in pairs(mask.world_size)]
                seen = units[:, row, column].tolist()
                pair = next(k for k, (a, b) in enumerate(zip(wanted, seen, strict=True)) if a != b)
                where: dict[str, Any] = {
                    "mask": asdict(replace(mask, pair=pairs(mask.world_size)[pair], rows=(mask.rows[row],)))
                }
                where |= {"rank": rank, "column": column}
                how = f"element {column} of row {mask.rows[row]} on rank {rank}: {order.words}"
                return {"size": mask.tokens, "output": "residual", "how": how, "probe": where}
        return {}

    # ------------------------------------------------------------------ the sum of squares
    def thresholds(self) -> tuple[list[tuple[int, Read]], list[tuple[int, str]]]:
        """By the batch size from which on it is used, every tree that was read; and why none from others on."""
        trees: list[tuple[int, Read]] = []
        failed: list[tuple[int, str]] = []
        before = self.kernels.calls
        starts = sorted({1, *(n for n in self.changes if 1 < n <= self._largest)})
        stretches = list(zip(starts, [*starts[1:], self._largest + 1], strict=True))
        for start, end in reversed(stretches):  # the more rows, the more questions a call
            if self._enough(trees, failed):
                failed.append((1, ENOUGH))
                break
            self._stretch(start, self.sizes(range(start, end))[-1], trees, failed, self.most + before)
        trees, failed = trees[::-1], failed[::-1]
        alike = {
            size
            for (below, one), (size, two) in pairwise(trees)
            if one.tree.same(two.tree) and not any(below < other < size for other, _ in failed)
        }
        return [(size, each) for size, each in trees if size not in alike], failed

    def _enough(self, trees: list[tuple[int, Read]], failed: list[tuple[int, str]]) -> bool:
        return len({id(each) for _, each in trees}) + len(failed) >= REGIMES

    def sizes(self, numbers: Iterable[int]) -> list[int]:
        """Those batch sizes that the kernel takes."""
        return [n for n in numbers if not self.kernels.takes(Call(n))]

    def _trees(self) -> dict[str, Any]:
        if untold := masks.unreadable(self.kernels.problem):
            return {"verdict": "untold", "untold": untold, "tried": ""}
        trees, failed = self.thresholds()
        if not trees:
            return {"verdict": "untold", "untold": failed[0][1], "tried": ""}
        said = {size: _named(size, each) for size, each in trees}
        said |= {size: f"{_since(size)}not readable: {why}" for size, why in failed}
        words = "; ".join(said[size] for size in sorted(said))
        told = {
            "words": words,
            "tried": words,
            "changes": [size for size, _ in trees[1:]],
            "trees": [{"rows": n, "words": each.words, "depth": each.tree.depth} for n, each in trees],
        }
        depth = self._flow.depth
        deeper = [(size, each.tree) for size, each in trees if depth is not None and each.tree.depth > depth]
        if not deeper:
            return told | {"verdict": "read"}
        size, tree = deeper[0]
        how = f"{tree.depth} additions above an element"
        probe = {"tokens": size, "path": [list(question) for question in tree.path()]}
        return told | {"verdict": "breaks", "size": size, "output": "norm", "how": how, "probe": probe}

    def _stretch(
        self, start: int, end: int, trees: list[tuple[int, Read]], failed: list[tuple[int, str]], last: int
    ) -> None:
        """Read the tree of the largest batch, look for it in smaller ones, and read those in which it is another."""
        left = max(last - self.kernels.calls, 0) * end
        try:
            found = next((each for _, each in trees if self.same(each.tree, end)), None)
            found = found or read(self._asking(end), self.kernels.problem.hidden, most=left)
        except Unreadable as why:
            failed.append((start, str(why)))
            return
        smaller = [n for n in reversed(doubling(self._largest)) if start <= n < end]
        other = next((n for n in self.sizes(smaller) if not self.same(found.tree, n)), None)
        if other is None:
            trees.append((start, found))
            return
        between = self.sizes(range(other, end + 1))  # of the first the tree is another, of the last it is this one
        while len(between) > 2:
            middle = len(between) // 2
            between = between[: middle + 1] if self.same(found.tree, between[middle]) else between[middle:]
        trees.append((between[1], found))
        if self._enough(trees, failed):
            failed.append((start, ENOUGH))
        else:
            self._stretch(start, between[0], trees, failed, last)

    def same(self, tree: Tree, size: int) -> bool:
        """Whether a tree is that of a batch size too; see `others`."""
        return not self.others(tree, (size,))

    def others(self, tree: Tree, sizes: Sequence[int]) -> list[int]:
        """The batch sizes at which the tree is another, by questions about its largest sums; each asked once."""
        calls = {size: _batches(tree.checks, size) for size in sizes if (tree, size) not in self._looked}
        answers = iter(self.kernels.squares(list(chain.from_iterable(calls.values()))))
        for size, batches in calls.items():
            said = list(islice(answers, sum(map(len, batches))))
            self._looked[tree, size] = NO not in said[: len(tree.checks)]
        return [size for size in sizes if not self._looked[tree, size]]

    def _asking(self, size: int) -> Callable[[Sequence[Question]], list[int]]:
        return partial(_in_batches, self.kernels, size)


def _in_batches(kernels: Kernels, size: int, questions: Sequence[Question]) -> list[int]:
    """Answers from calls of `size` rows."""
    return kernels.squares(_batches(questions, size))[: len(questions)]


def _batches(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """The questions in batches of `size`, the last one filled up with the first questions."""
    return [[questions[(start + k) % len(questions)] for k in range(size)] for start in range(0, len(questions), size)]


def _named(size: int, found: Read) -> str:
    deep = "" if not found.known else f", {found.tree.depth} deep"
    return f"{_since(size)}{found.words}{deep}"


def _since(size: int) -> str:
    return f"from {size} rows on " if size > 1 else ""


def _orders(units: Any, world: int) -> tuple[Any, dict[int, Order]]:
    """Which order each element has, [rows, hidden], and the orders by that number; units [pairs, rows, hidden]."""
    mixed = np.zeros(units.shape[1:], dtype=np.uint64)
    for each in units:
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + each.astype(np.uint64) + np.uint64(1)
    _, where, codes = np.unique(mixed.reshape(-1), return_index=True, return_inverse=True)
    flat = units.reshape(len(units), -1)
    orders = {code: order_of(flat[:, place].tolist(), world) for code, place in enumerate(where.tolist())}
    return codes.reshape(mixed.shape), orders


def again(kernels: Kernels, claim: str, probe: Any) -> Iterator[str]:
    """Ask once more what refuted a declaration; what still refutes it, in words."""
    flow = backends.backend(kernels.backend).dataflow(kernels.problem)
    if claim == ORDER:
        mask = Mask.from_record(probe["mask"])
        left = int(kernels.units(mask)[probe["rank"]][0, probe["column"]])
        wanted = mask.world_size - 1 - mask.pair[1]
        if flow.order == "rank" and left != wanted:
            yield f"ranks {mask.pair[0]} and {mask.pair[1]} leave {left} units of other ranks, {wanted} in rank order"
        return
    path = [(int(large), int(first), int(second)) for large, first, second in probe["path"]]
    shown = NO not in _in_batches(kernels, int(probe["tokens"]), path) and len(path) + 1
    if flow.depth is not None and shown > flow.depth:
        yield f"{shown} additions above an element, {flow.depth} are declared"
