"""The cases of operations beyond the first one: each composition with every dtype, exchange and layout of its scales.

They stand beside the plan of the first op, which crosses shapes, schedules and families in full: exchange, residual and
norm are the same code there and here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, product

from fusecheck.inputs.cells import hash64
from fusecheck.inputs.families import FAMILIES
from fusecheck.inputs.scales import draw_scale
from fusecheck.inputs.special_groups import seed_of, turns_for
from fusecheck.kernel.table import Case
from fusecheck.operations import Operation, Strategy
from fusecheck.problem import Problem
from fusecheck.quantisers.known import quantiser

ROWS = (1, 3, 4, 5, 33, 127, 129)
"""Around the tiles that scales are laid out in: four rows packed, 128 swizzled."""
WIDTHS = (128, 256, 640, 1024, 2880)
ROUNDS = (("repeat",), ("strategies", "layouts"), ("unfused",))
"""What cases are checked for beyond their own call, in turn."""
SPECIAL_GROUPS = "special-groups"
SEVEN_BANDS = 776
"""A width of six bands of special groups and a part of one, which is made up to whole groups."""
NVFP4_FACTORS = (2048.0, 700.0, 3.0)
"""Factors of a tensor: a power of two, at which ties are common; a usual one; one at which small scales vanish."""


@dataclass(frozen=True)
class Axes:
    """What cases are made of; empty tuples mean the whole table.

    Attributes:
        seed: of the data, and of what is drawn.
        tokens: rows to choose from.
        hidden: columns to choose from.
        strategies: exchanges.
        dtypes: activation formats.
        families: input families by name.
        others: operations beyond the first one, each with every dtype, exchange and layout of its scales.
    """

    seed: int = 0
    tokens: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()
    strategies: tuple[Strategy, ...] = tuple(Strategy)
    dtypes: tuple[str, ...] = ("bf16", "fp16")
    families: tuple[str, ...] = tuple(FAMILIES)
    others: tuple[Operation, ...] = ()


def fitting(hidden: int, op: Operation) -> int:
    """The next number of columns that the groups of the operation's quantiser divide."""
    group = None if op.quantiser == "none" else quantiser(op.quantiser).group
    return hidden if group is None else -(-hidden // group) * group


def _widths(op: Operation, hidden: Sequence[int]) -> Sequence[int]:
    """The hidden sizes for an operation: those given that its groups divide, else usual ones."""
    if not hidden:
        return [fitting(size, op) for size in WIDTHS]
    return [size for size in hidden if fitting(size, op) == size]


def composition_cases(axes: Axes, world_size: int, strategy: Strategy, seed: int, first: int) -> Iterator[Case]:
    """Cases of each operation, dtype and layout; shapes in turn, and families for each quantiser.

    Where hidden sizes are given, an operation whose groups divide none of them has no case. The family of a quantiser's
    first case is number `first`, and each is as many further as there are exchanges, which share the families so.
    """
    index, turns = count(), Counter[str]()
    for op, dtype in product(axes.others, axes.dtypes):
        for layout in _layouts(op):
            at = next(index)
            draw = hash64(seed, world_size, at, 2)
            name = axes.families[(first + len(axes.strategies) * turns[op.quantiser]) % len(axes.families)]
            turns[op.quantiser] += 1
            family = FAMILIES[name]
            rows, columns = axes.tokens or ROWS, _widths(op, axes.hidden)
            if not columns:
                continue
            drawn = draw_scale(family.scales[at % len(family.scales)], draw >> 2)
            problem = Problem(
                op=op,
                strategy=strategy,
                dtype=dtype,
                world_size=world_size,
                tokens=rows[draw % len(rows)],
                hidden=columns[draw // 8 % len(columns)],
                scale=NVFP4_FACTORS[at % 3] if op.quantiser == "nvfp4" and "random" in family.scales else drawn,
                gamma=family.gamma or ("spread", "signed", "small")[at % 3],
                weight_bias=0.0 if family.gamma or at % 3 != 2 else 1.0,
                family=name,
                seed=draw >> 2,
                layout=layout,
            )
            yield Case(problem, ROUNDS[at % len(ROUNDS)])


def group_cases(axes: Axes, world_size: int) -> Iterator[Case]:
    """For each quantiser that makes scales and each dtype, special groups of every kind, first, last and between."""
    index = count()
    plain = [op for op in axes.others if op.returns_scale and not op.has_experts and _widths(op, axes.hidden)]
    for name in dict.fromkeys(op.quantiser for op in plain):
        mine = [op for op in plain if op.quantiser == name]
        for dtype, turn in product(axes.dtypes, turns_for(quantiser(name).group)):
            at = next(index)
            draw, op = hash64(axes.seed, world_size, at, 4), mine[at % len(mine)]
            rows, layouts = axes.tokens or ROWS, _layouts(op)
            problem = Problem(
                op=op,
                strategy=axes.strategies[at % len(axes.strategies)],
                dtype=dtype,
                world_size=world_size,
                tokens=rows[draw % len(rows)],
                hidden=max(_widths(op, axes.hidden)) if axes.hidden else fitting(SEVEN_BANDS, op),
                scale=NVFP4_FACTORS[at % 3] if name == "nvfp4" else 1.0,
                gamma=str(FAMILIES[SPECIAL_GROUPS].gamma),
                family=SPECIAL_GROUPS,
                seed=seed_of(draw >> 2, turn),
                layout=layouts[at % len(layouts)],
            )
            yield Case(problem, ROUNDS[at % len(ROUNDS)])


def _layouts(op: Operation) -> tuple[str, ...]:
    """The layouts of the scales; of the operation that returns the norm the first one alone."""
    if not op.returns_scale:
        return ("",)
    every = quantiser(op.quantiser).layouts
    return every if not op.returns_norm else every[:1]
