"""Which cases are asked for, and those that are drawn behind the core plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from fusecheck.inputs.cells import hash64
from fusecheck.inputs.families import FAMILIES
from fusecheck.inputs.scales import draw_scale
from fusecheck.interface import STATIC_OPS, Backend, Operation, operations_of
from fusecheck.kernel import schedules, table
from fusecheck.kernel.compositions import ROUNDS, SPECIAL_GROUPS, Axes, composition_cases, fitting, group_cases
from fusecheck.kernel.table import Case
from fusecheck.problem import Call, Problem

T = TypeVar("T")


class Choice:
    """Successive choices from one 64-bit seed."""

    def __init__(self, seed: int) -> None:
        self.seed, self._count = seed, 0

    def below(self, count: int) -> int:
        """A number from 0 to count - 1."""
        self._count += 1
        return hash64(self.seed, self._count) % count

    def of(self, choices: Sequence[T]) -> T:
        """One of the choices."""
        return choices[self.below(len(choices))]


@dataclass(frozen=True)
class Plan(Axes):
    """Which cases to run.

    Attributes:
        ops: fused operations.
        eps: values of eps.
        weight_bias: None draws it (mostly 0).
        most_elements: tokens * hidden of the largest call; what is larger is left out, and said to be.
        schedules: whether there are call patterns.
        mixes_dtypes: whether calls of several dtypes may share a workspace.
        whole: each kernel is asked for every operation that it has, whatever `ops` and `others` are.
    """

    ops: tuple[Operation, ...] = STATIC_OPS
    eps: tuple[float, ...] = (1e-5, 1e-6)
    weight_bias: float | None = None
    most_elements: int = 2**26
    schedules: bool = True
    mixes_dtypes: bool = False
    whole: bool = False

    def of_others(self, world_size: int, turn: int = 0) -> list[Case]:
        """The cases of the operations beyond the first one; with other data at every turn."""
        found: list[Case] = []
        for index, strategy in enumerate(self.strategies):
            seed = hash64(self.seed, turn, *strategy.value.encode())
            found += composition_cases(self, world_size, strategy, seed, first=index + turn + world_size)
        if SPECIAL_GROUPS in self.families and turn == 0:
            found += group_cases(self, world_size)
        return found

    def about(self, backend: Backend) -> Plan:
        """The plan for a kernel, which says what it has, and whether calls of several dtypes may share a workspace.

        Raises:
            UsageError: it says that it has nothing, or something else than operations.
        """
        plan = replace(self, mixes_dtypes=bool(getattr(backend, "mixes_dtypes", False)))
        return plan.asking(operations_of(backend)) if self.whole else plan

    def asking(self, operations: Sequence[Operation]) -> Plan:
        """The same about these operations."""
        ops = tuple(each for each in operations if each in STATIC_OPS)
        return replace(self, ops=ops, others=tuple(each for each in operations if each not in STATIC_OPS))

    def draw(self, world_size: int, index: int) -> Case:
        """Case number `index` of the endless stream: the families in turn, the rest from the seed.

        Raises:
            UsageError: a shape or value is out of range.
        """
        if self.others and (index % 4 == 3 or not self.ops):
            every = self.of_others(world_size, 1 + index)
            return every[index % len(every)]
        choice = Choice(hash64(self.seed, world_size, index))
        made = self.problem(world_size, choice, self.families[index % len(self.families)])
        tokens, hidden = self._shape(choice, world_size, index % 8)
        made = replace(made, tokens=tokens, hidden=fitting(hidden, made.op))
        if self.schedules and index % 6 == 5:
            return Case(self._scheduled(made, choice))
        return Case(made, ROUNDS[index // 2 % len(ROUNDS)])

    def problem(self, world_size: int, choice: Choice, family: str, op: Operation | None = None) -> Problem:
        """A Problem of a family, of an operation if one is given; its shape is the least."""
        known, seed = FAMILIES[family], choice.seed >> 2
        gamma, bias = self.weights(choice)
        op = op or choice.of(self.ops)
        scale = draw_scale(choice.of(known.scales), seed)
        if op.quantiser == "nvfp4" and "one" in known.scales:  # else the scale is what makes the family
            scale = factor_of(scale)
        return Problem(
            op=op,
            strategy=choice.of(self.strategies),
            dtype=choice.of(self.dtypes),
            hidden=fitting(64, op),
            world_size=world_size,
            eps=1e-5 if family == "tiny-rows" and len(self.eps) > 1 else choice.of(self.eps),
            scale=scale,
            gamma=known.gamma or gamma,
            weight_bias=0.0 if known.gamma else bias,
            family=family,
            seed=seed,
        )

    def weights(self, choice: Choice) -> tuple[str, float]:
        """A kind of gamma and the weight bias that goes with it."""
        kind = choice.of(("spread", "spread", "signed", "small", "ones"))
        return kind, self.weight_bias if self.weight_bias is not None else float(kind == "small")

    def fits(self, problem: Problem) -> bool:
        """Whether no call of a Problem is larger than the plan's largest."""
        return all(step.elements <= self.most_elements for _, step in problem.calls())

    def _shape(self, choice: Choice, world_size: int, turn: int) -> tuple[int, int]:
        """Few rows of any width, or many narrow ones."""
        many = self.tokens or table.LIMITS
        if turn in (3, 7):
            tokens, hidden = choice.of(many), choice.of(self.hidden or (64, 264, 520))
        else:
            tokens = choice.of(self.tokens or table.few_rows(world_size))
            hidden = choice.of(self.hidden or (table.residue_size(choice.below(4096)), choice.of(table.named_sizes())))
        fitting = [rows for rows in many if rows * hidden <= self.most_elements]
        if tokens * hidden > self.most_elements and fitting:
            tokens = choice.of(fitting)
        return tokens, hidden

    def _scheduled(self, problem: Problem, choice: Choice) -> Problem:
        """The Problem at the end of a call pattern; patterns run many calls, so their shapes are small."""
        tokens = choice.of(self.tokens or table.few_rows(problem.world_size))
        hidden = choice.of(self.hidden or (128, 256, 512))
        calls = tuple(fitted(call, problem.op) for call in choice.of(schedules.PATTERNS))
        return replace(problem, schedule=calls, tokens=tokens, hidden=fitting(hidden, problem.op))


def fitted(call: Call, op: Operation) -> Call:
    """A call whose columns the groups of its quantiser divide; `op` is the Problem's."""
    return replace(call, hidden=fitting(call.hidden, call.op or op)) if call.hidden else call


def factor_of(scale: float) -> float:
    """The factor of a tensor whose static scale would be this: block scales of up to 300, a float32 value."""
    return float(np.float32(4 / scale))
