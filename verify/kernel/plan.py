"""The kernel question's cases: an endless seeded stream that visits families, scales, shapes and schedules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeVar

import numpy as np

from fusecheck.inputs.cells import hash64
from fusecheck.inputs.families import FAMILIES
from fusecheck.inputs.scales import draw_scale
from fusecheck.interface import STATIC_OPS, FusionOp, Operation, Strategy
from fusecheck.kernel.compositions import composition_cases
from fusecheck.problem import Call, Problem
from fusecheck.quantisers.known import quantiser

T = TypeVar("T")

FEW = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 31, 33)
"""Tokens below and around twice the world sizes, with every remainder."""
BOUNDARY = (127, 128, 129)
"""Around the one-shot limit of the kernels."""
MANY = (128, 256, 300, 512)
NARROW = (64, 128, 256, 512, 520, 768, 1024, 2048, 2880)
"""Hidden sizes with partial warps (64, 520, 2880) among powers of two."""
WIDE = (4096, 5120, 7168, 8192)

_SCHEDULES: tuple[tuple[Call, ...], ...] = (
    (Call(64), Call(1), Call(1), Call(64)),
    (Call(33, strategy=Strategy.ONESHOT), Call(2, strategy=Strategy.TWOSHOT), Call(33, strategy=Strategy.ONESHOT)),
    (Call(3), Call(48, overwrite=True), Call(48, overwrite=True), Call(5, delayed=1, delay_ms=20, overwrite=True)),
    (Call(16, delayed=0, delay_ms=15), Call(16, delayed=1, delay_ms=15, late=True), Call(16), Call(2)),
    (Call(9, hidden=128), Call(9, hidden=64), Call(40, hidden=64), Call(9, hidden=128)),
    (Call(12, idle_ms=30), Call(12, reopen=True), Call(40), Call(1), Call(40), Call(12, idle_ms=30)),
    (
        Call(8, strategy=Strategy.TWOSHOT),
        Call(64, strategy=Strategy.TWOSHOT, delayed=1, delay_ms=10),
        Call(5, strategy=Strategy.TWOSHOT, overwrite=True),
        Call(64, strategy=Strategy.TWOSHOT),
    ),
    (Call(7, op=FusionOp.RESIDUAL_RMS_NORM), Call(7, op=FusionOp.RESIDUAL_RMS_NORM_QUANT_FP8), Call(20), Call(7)),
)
"""Call patterns on one workspace: long after short and short after long, strategies in turn, ranks out of step,
inputs overwritten at once, idle gaps, a reopened workspace."""


@dataclass(frozen=True)
class Case:
    """A Problem and what else is checked on it."""

    problem: Problem
    checks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Which cases to draw from; empty tuples mean the default mix.

    Attributes:
        seed: of the whole stream.
        tokens: rows to choose from.
        hidden: columns to choose from.
        ops: fused operations.
        strategies: exchanges.
        dtypes: activation formats.
        families: input families by name.
        eps: values of eps.
        weight_bias: None draws it (mostly 0).
        most_elements: tokens * hidden of the largest case of the default mix.
        schedules: whether to draw call patterns.
        others: operations beyond the first one; a case of theirs follows each drawn one while there are any.
    """

    seed: int = 0
    tokens: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()
    ops: tuple[Operation, ...] = STATIC_OPS
    strategies: tuple[Strategy, ...] = tuple(Strategy)
    dtypes: tuple[str, ...] = ("bf16", "fp16")
    families: tuple[str, ...] = tuple(FAMILIES)
    eps: tuple[float, ...] = (1e-5, 1e-6)
    weight_bias: float | None = None
    most_elements: int = 2**19
    schedules: bool = True
    others: tuple[Operation, ...] = ()

    def of_others(self, world_size: int) -> list[Case]:
        """The cases of the operations beyond the first one."""
        made = composition_cases(
            self.others,
            world_size,
            seed=self.seed,
            dtypes=self.dtypes,
            strategies=self.strategies,
            families=self.families,
            tokens=self.tokens,
            hidden=self.hidden,
        )
        return [Case(problem, checks) for problem, checks in made]

    def cases(self, world_size: int) -> Iterator[Case]:
        """An endless stream for one world size: the families in turn, the rest drawn from the seed.

        Raises:
            UsageError: a shape or value is out of range; raised at the first case that has it.
        """
        others, drawn = self.of_others(world_size), count()
        for other in others:
            yield from [self.case(world_size, next(drawn))] if self.ops else []
            yield other
        if self.ops:
            yield from (self.case(world_size, index) for index in drawn)

    def case(self, world_size: int, index: int) -> Case:
        """Case number `index` of the stream."""
        draw = _Draw(hash64(self.seed, world_size, index))
        name = self.families[index % len(self.families)]
        seed = hash64(self.seed, world_size, index, 1) >> 2
        family = FAMILIES[name]
        gamma, bias = self._gamma(draw)
        tokens, hidden = self._shape(draw, index)
        op = self._op(draw)
        hidden = fitting(hidden, op)
        problem = Problem(
            op=op,
            strategy=draw.of(self.strategies),
            dtype=self.dtypes[0] if draw.below(4) else draw.of(self.dtypes),
            world_size=world_size,
            tokens=tokens,
            hidden=hidden,
            eps=1e-5 if name == "tiny-rows" and len(self.eps) > 1 else draw.of(self.eps),
            scale=draw_scale(draw.of(family.scales), seed),
            gamma=family.gamma or gamma,
            weight_bias=0.0 if family.gamma else bias,
            family=name,
            seed=seed,
        )
        if op.quantiser == "nvfp4" and "one" in family.scales:  # else the scale is what makes the family
            problem = replace(problem, scale=factor_of(problem.scale))
        if self.schedules and index % 6 == 5:
            return Case(self._scheduled(problem, draw))
        return Case(problem, _checks(index))

    def _op(self, draw: _Draw) -> Operation:
        both = FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8
        return both if both in self.ops and draw.below(2) else draw.of(self.ops)

    def _gamma(self, draw: _Draw) -> tuple[str, float]:
        kind = draw.of(("spread", "spread", "signed", "small", "ones"))
        bias = self.weight_bias if self.weight_bias is not None else float(kind == "small")
        return kind, bias

    def _shape(self, draw: _Draw, index: int) -> tuple[int, int]:
        large = index % 8 == 7
        tokens = draw.of(self.tokens or (MANY if large else BOUNDARY if index % 8 == 3 else FEW))
        hidden = draw.of(self.hidden or (WIDE if large else NARROW))
        if not self.tokens:
            tokens = max(1, min(tokens, self.most_elements // hidden))
        return tokens, hidden

    def _scheduled(self, problem: Problem, draw: _Draw) -> Problem:
        """The Problem at the end of a call pattern; patterns run many calls, so the default shapes are small."""
        tokens, hidden = draw.of(self.tokens or FEW), draw.of(self.hidden or (128, 256, 512))
        schedule = tuple(
            replace(call, hidden=fitting(call.hidden, problem.op)) if call.hidden else call
            for call in draw.of(_SCHEDULES)
        )
        return replace(problem, schedule=schedule, tokens=tokens, hidden=hidden)


def fitting(hidden: int, op: Operation) -> int:
    """The next number of columns that the groups of the operation's quantiser divide."""
    group = 1 if op.quantiser == "none" else quantiser(op.quantiser).group or 1
    return -(-hidden // group) * group


def factor_of(scale: float) -> float:
    """The factor of a tensor whose static scale would be this: block scales of up to 300, a float32 value."""
    return float(np.float32(4 / scale))


def _checks(index: int) -> tuple[str, ...]:
    """Each further check on one case in three, so that all meet every family."""
    return (("repeat",), ("strategies", "layouts"), ("unfused",))[index // 2 % 3]


class _Draw:
    """Successive choices from one 64-bit seed."""

    def __init__(self, seed: int) -> None:
        self._seed, self._count = seed, 0

    def below(self, count: int) -> int:
        """A number from 0 to count - 1."""
        self._count += 1
        return hash64(self._seed, self._count) % count

    def of(self, choices: Sequence[T]) -> T:
        """One of the choices."""
        return choices[self.below(len(choices))]
