"""The core plan: the cases that reach every cell of the table, the quick ones first, and who runs which of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, count, product
from typing import Any

from fusecheck.inputs.cells import hash64
from fusecheck.inputs.families import FAMILIES
from fusecheck.inputs.one_special import rows_of_all
from fusecheck.interface import Strategy
from fusecheck.kernel import schedules, table
from fusecheck.kernel.compositions import ROUNDS, fitting
from fusecheck.kernel.plan import Choice, Plan, fitted
from fusecheck.kernel.table import Case, Cell
from fusecheck.problem import Call, Problem

Takes = Callable[[Problem], bool]
"""Whether the kernel takes a Problem."""

SMALL = 2**13
"""tokens * hidden of a call that may be one of hundreds."""

SCATTER = 37
"""Residues of the hidden size come in steps of so many, so that neighbours in time are far from each other."""

_SPECIAL = ("one-special", "special-gamma")
_NARROW = (64, 72, 136, 264)


def stream(plan: Plan, world_size: int, takes: Takes = lambda _: True) -> Iterator[Case]:
    """The core plan, then cases drawn over the same table without an end; also those that the kernel refuses."""
    yield from core_plan(plan, world_size, takes)
    yield from (plan.draw(world_size, index) for index in count())


def core_plan(plan: Plan, world_size: int, takes: Takes = lambda _: True) -> list[Case]:
    """The cases that a pass must have run; those that take long are last.

    Behind a case that the kernel refuses comes the same under another exchange, if it takes that: the exchange alone
    is then what was not reached.

    Raises:
        UsageError: a shape or value is out of range.
    """
    made = _Core(plan, world_size, takes).cases()
    return list(chain.from_iterable(_with_another(case, plan, takes) for case in made))


def _with_another(case: Case, plan: Plan, takes: Takes) -> Iterator[Case]:
    yield case
    problem = case.problem
    if problem.schedule or takes(problem):
        return
    others = (replace(problem, strategy=strategy) for strategy in plan.strategies)
    yield from [replace(case, problem=other) for other in others if takes(other)][:1]


class _Core:
    """Collects the cases of one world size."""

    def __init__(self, plan: Plan, world_size: int, takes: Takes) -> None:
        self.plan, self.size, self._takes = plan, world_size, takes
        self._kernels = [(d, o, s) for d, s, o in product(plan.dtypes, plan.strategies, plan.ops)]
        self._few = plan.tokens or table.few_rows(world_size)
        self._narrow = plan.hidden or _NARROW
        self._made = 0
        self._reached: set[Cell] = set()

    def cases(self) -> list[Case]:
        """All of them; a case that is too large for the plan is left out."""
        others = [case for case in self.plan.of_others(self.size) if self.plan.fits(case.problem)]
        if not self.plan.ops:
            return others
        quick = [self._sweep(), self._rows(), self._special(), others]
        if self.plan.schedules:
            quick.append(self._patterns())
        pairs, sizes = self._pairs(), self._messages()
        long = self._long() if self.plan.schedules else []
        return [*_interleaved([kept for kept in quick if kept]), *pairs, *sizes, *long]

    def _make(self, checks: Sequence[str] | None = None, family: str = "", **fixed: Any) -> list[Case]:
        """The next case: families and kernels in turn but for what is fixed; nothing where it does not fit."""
        index, plan = self._made, self.plan
        self._made += 1
        choice = Choice(hash64(plan.seed, self.size, index, 1))
        family = family if family in plan.families else plan.families[index % len(plan.families)]
        dtype, op, strategy = self._kernels[index % len(self._kernels)]
        op = fixed.get("op", op)
        made = plan.problem(self.size, choice, family, op)
        shape: dict[str, Any] = {"tokens": choice.of(self._few), "hidden": choice.of(self._narrow)}
        shape |= {"dtype": dtype, "strategy": strategy, **fixed}
        problem = replace(made, **shape | {"hidden": fitting(shape["hidden"], op)})
        if not plan.fits(problem):
            return []
        case = Case(problem, ROUNDS[index % len(ROUNDS)] if checks is None else tuple(checks))
        self._reached |= table.cells_of(case, "")
        return [case]

    def _sweep(self) -> list[Case]:
        """Every hidden size with few rows."""
        scattered = (table.residue_size(SCATTER * index) for index in range(len(table.RESIDUES)))
        sizes = self.plan.hidden or (*scattered, *table.named_sizes())
        return [case for hidden in sizes for case in self._make(hidden=hidden)]

    def _rows(self) -> list[Case]:
        """Every number of rows under every exchange."""
        rows = self.plan.tokens or sorted({*self._few, *table.LIMITS})
        every = product(rows, self.plan.strategies)
        return [case for tokens, strategy in every for case in self._make(tokens=tokens, strategy=strategy)]

    def _special(self) -> list[Case]:
        """Special values in one operand at a time, for every dtype and exchange."""
        asked = [family for family in _SPECIAL if family in self.plan.families]
        tokens = self.plan.tokens or (rows_of_all(self.size),)
        every = product(asked, self.plan.dtypes, self.plan.strategies)
        return [
            case
            for family, dtype, strategy in every
            for case in self._make(ROUNDS[1], family, dtype=dtype, strategy=strategy, tokens=tokens[-1])
        ]

    def _pairs(self) -> list[Case]:
        """What the others have not crossed: kernels, and families with each of the three that decide the kernel."""
        found = []
        for dtype, op, strategy in self._kernels:
            if not self._has("kernel", f"{dtype} {op.value} {strategy.value} "):
                found += self._make(dtype=dtype, op=op, strategy=strategy)
        axes = {"dtype": self.plan.dtypes, "op": self.plan.ops, "strategy": self.plan.strategies}
        for family in self.plan.families:
            for name, value in ((name, value) for name, values in axes.items() for value in values):
                if not self._has("family", f"{family} {getattr(value, 'value', value)}"):
                    found += self._make(None, family, **{name: value})
        return found

    def _has(self, dimension: str, value: str) -> bool:
        return (dimension, value) in self._reached

    def _patterns(self) -> list[Case]:
        """Short call patterns, and two workspaces in turn, under every exchange."""
        turns = schedules.two_in_turn(self._few, hash64(self.plan.seed, self.size, 2))
        # Sums that cancel are zeros on both workspaces: of those it would not show whose they are.
        patterns = (*((pattern, "") for pattern in schedules.PATTERNS), (turns, "gaussian"))
        every = product(patterns, self.plan.strategies)
        return [
            case for (calls, family), strategy in every for case in self._scheduled(calls, family, strategy=strategy)
        ]

    def _long(self) -> list[Case]:
        """Hundreds of calls under each exchange that has a protocol of its own."""
        own = [strategy for strategy in self.plan.strategies if strategy is not Strategy.AUTO]
        tokens, hidden = self.plan.tokens or schedules.ROWS, self.plan.hidden or _NARROW[:3]
        if min(tokens) * min(hidden) > SMALL:
            return []
        tokens = tuple(rows for rows in tokens if rows * min(hidden) <= SMALL)
        hidden = tuple(size for size in hidden if size * min(tokens) <= SMALL)
        dtypes = self.plan.dtypes if self.plan.mixes_dtypes else self.plan.dtypes[:1]
        found = []
        for strategy in own or self.plan.strategies:
            seed = hash64(self.plan.seed, self.size, 3)
            calls = schedules.long_calls(tokens, hidden, self.plan.ops, dtypes, self.size, seed)
            fixed = {"strategy": strategy, "dtype": dtypes[0], "tokens": tokens[0], "hidden": max(hidden)}
            found += self._scheduled(calls, "gaussian", **fixed)
        return found

    def _scheduled(self, calls: tuple[Call, ...], family: str = "", **fixed: Any) -> list[Case]:
        """A case with earlier calls: those that the kernel takes, again from the first until there are as many."""
        plain = self._make((), family, **fixed)
        if not plain:
            return []
        problem = plain[0].problem
        if FAMILIES[problem.family].gamma is not None:  # its property hangs on weights and scale
            calls = tuple(replace(call, scale=None, gamma=None, weight_bias=None) for call in calls)
        calls = tuple(fitted(call, problem.op) for call in calls)
        taken = [call for call in calls if self._takes(replace(problem, schedule=(call,)).calls()[0][1])]
        again = tuple(taken[index % len(taken)] for index in range(len(calls))) if taken else calls
        made = replace(problem, schedule=calls if len(taken) == len(calls) else again)
        return [Case(made)] if self.plan.fits(made) else []

    def _messages(self) -> list[Case]:
        """A message beyond each size, the largest where few ranks hold it."""
        found = []
        exchanges = [s for s in (Strategy.AUTO, Strategy.TWOSHOT) if s in self.plan.strategies]
        for index, size in enumerate(table.MESSAGES):
            if self.plan.tokens or self.plan.hidden or self.size > table.LARGEST.get(size, self.size):
                continue
            hidden = 1032 if size <= 2 else 4104
            fixed = {"tokens": size * table.MIB // (2 * hidden) + 1, "hidden": hidden}
            strategy = (exchanges or self.plan.strategies)[index % len(exchanges or self.plan.strategies)]
            ops = sorted(self.plan.ops, key=lambda op: op.returns_norm + op.returns_quant)
            found += self._make((), "gaussian", strategy=strategy, op=ops[0], **fixed)
        return found


def _interleaved(lists: Sequence[Sequence[Case]]) -> list[Case]:
    """Several lists as one, each spread evenly over the whole."""
    placed = [(j / len(cases), i, case) for i, cases in enumerate(lists) for j, case in enumerate(cases)]
    return [case for _, _, case in sorted(placed, key=lambda each: each[:2])]
