"""The coverage table: what a run of the kernel question must have reached, dimension by dimension.

A cell is a pair of a dimension and a value. Kernels are compiled apart by dtype, op, exchange and accumulation, so
those four are one dimension, crossed in full; others are crossed with the one of them that decides how they are served.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from fusecheck.case.layouts import layouts_of
from fusecheck.inputs.models import models
from fusecheck.inputs.one_special import values_of
from fusecheck.inputs.special_groups import held
from fusecheck.interface import Strategy
from fusecheck.problem import Problem
from fusecheck.quantisers.known import quantiser

MIB = 2**20

LANES = 8
"""A row is a multiple of so many elements."""

RESIDUES = tuple(range(0, 1024, LANES))
"""Of hidden modulo 1024, what a block of 128 threads with eight elements each takes; those of 256 and 64 follow."""

PRIMES = (3, 13, 31, 61, 127, 257, 509, 1021)
"""Hidden sizes of a prime times eight divide into no equal share."""

WIDE = (8248, 9216, 10240, 12288, 14336)
"""Hidden sizes beyond 8,192, where one block no longer takes a row: 8 * 1031, and even multiples."""

LIMITS = (127, 128, 129, 131, 132, 133, 255, 256, 257, 300, 512, 1025, 2048, 4097, 8192)
"""Rows around the one-shot limit, a grid as large as a chip (132 multiprocessors), and the limits of engines."""

MESSAGES = (1, 2, 8, 64)
"""MiB of one rank's addend that a case goes beyond."""

LARGEST = {64: 2}
"""The world size up to which a message of so many MiB is asked: every rank holds several copies of it."""

CALLS = 300
"""Calls on one workspace in the longest schedules."""

PERIODS = (64, 128, 256)
"""Calls of one exchange after which a counter of 6, 7 or 8 bits comes round."""

KEPT = 16
"""Outputs that are kept while later calls run, and judged then."""

PAUSES = (200, 1000)
"""Milliseconds without a call, after which clocks and caches are cold."""

Cell = tuple[str, str]
"""Dimension and value."""


@dataclass(frozen=True)
class Case:
    """A Problem, what else is checked on it, and the cases that run before it on the same workspace."""

    problem: Problem
    checks: tuple[str, ...] = ()
    before: tuple[Case, ...] = ()


def few_rows(world_size: int) -> tuple[int, ...]:
    """Row counts below, at and above once and twice the ranks, and a few more."""
    around = {n * world_size + d for n in (1, 2) for d in (-1, 0, 1)}
    return tuple(sorted({1, 2, 3, 5, 7, 12} | {rows for rows in around if rows > 0}))


@cache
def model_sizes() -> tuple[int, ...]:
    """The hidden sizes of real models, ascending."""
    return tuple(sorted({model.hidden for model in models().values()}))


@cache
def named_sizes() -> tuple[int, ...]:
    """The hidden sizes that are cells of their own: those of models, beyond 8,192, and primes times eight."""
    return tuple(sorted({*model_sizes(), *WIDE, *(LANES * prime for prime in PRIMES)}))


def residue_size(index: int) -> int:
    """A hidden size of the residue number `index`: now within, now beyond the first 1,024."""
    residue = RESIDUES[index % len(RESIDUES)]
    return residue + 1024 * (1 + index // 2 % 3) if index % 2 or not residue else residue


def kernel_of(problem: Problem) -> str:
    """The kernel that serves a call, but for its accumulation."""
    return f"{problem.dtype} {problem.op.value} {problem.strategy.value}"


def cells_of(case: Case, accumulate: str) -> set[Cell]:
    """Every cell that a case reaches, under the accumulation that its kernel declares."""
    problem, found = case.problem, set[Cell]()
    steps = [step for _, step in problem.calls()]
    for step in steps:
        found.update(_of_call(step, accumulate))
    found |= {("check", check) for check in case.checks}
    found |= {("layout", f"{layout} {operand}") for layout, operand in _layouts(case)}
    found |= {("special group", f"{kind} {problem.op.quantiser} {problem.dtype}") for kind in _groups(problem)}
    own = values_of(problem.family, problem.seed, problem.tokens, problem.world_size)
    found |= {("special value", f"{value} {problem.dtype} {problem.strategy.value}") for value in own}
    return found | set(_of_schedule(problem, steps)) if problem.schedule else found


def _groups(problem: Problem) -> Iterator[str]:
    """The kinds of special groups that a quantiser which makes scales meets, with their places."""
    if problem.gamma == "groups" and problem.op.returns_scale:
        group = quantiser(problem.op.quantiser).group
        yield from (f"{kind}, {place}" for kind, place in held(problem.seed, problem.hidden, group))


def _layouts(case: Case) -> tuple[tuple[str, str], ...]:
    return layouts_of(case.problem) if "layouts" in case.checks else ()


def _of_call(step: Problem, accumulate: str) -> Iterator[Cell]:
    exchange, rows = step.strategy.value, step.tokens
    yield "world size", str(step.world_size)
    yield "kernel", f"{kernel_of(step)} {accumulate}"
    yield "family x kernel", f"{step.family}/{kernel_of(step)}"
    yield from (("family", f"{step.family} {x}") for x in (step.dtype, step.op.value, exchange))
    if rows in few_rows(step.world_size) or rows in LIMITS:
        yield "rows", f"{rows} {exchange}"
    yield from (("message", f"> {size} MiB") for size in MESSAGES if 2 * step.elements > size * MIB)
    yield "hidden % 1024", str(step.hidden % 1024)
    yield "hidden % 256", str(step.hidden % 256)
    yield "hidden % 64", str(step.hidden % 64)
    if step.hidden in named_sizes():
        yield "hidden", str(step.hidden)
    yield "norm", f"eps {step.eps:g}"
    yield "norm", f"gamma {step.gamma}"
    yield "norm", f"weight bias {step.weight_bias:g}"


def _of_schedule(problem: Problem, steps: list[Problem]) -> Iterator[Cell]:
    """What the calls of one schedule have in common; a reopened workspace begins anew."""
    calls = [call for call, _ in problem.calls()]
    exchange = problem.strategy.value
    if any(call.reopen for call in calls):
        yield "workspace", "reopened"
        return
    for index in (0, 1):
        mine = [step for call, step in zip(calls, steps, strict=True) if call.workspace == index]
        yield from _of_workspace(mine, exchange)
    if {call.workspace for call in calls} == {0, 1}:
        yield "workspace", f"two in turn {exchange}"
    yield from (("workspace", f"pause of {ms} ms {exchange}") for ms in PAUSES if any(c.idle_ms >= ms for c in calls))
    yield from (("workspace", what) for what in ("delayed", "overwrite") if any(_done(c, what) for c in calls))


def _done(call: object, what: str) -> bool:
    return getattr(call, what) not in (None, False)


def _of_workspace(steps: list[Problem], exchange: str) -> Iterator[Cell]:
    if len(steps) > KEPT:
        yield "workspace", f"outputs kept {exchange}"
    if len(steps) < CALLS:
        return
    yield "workspace", f"{CALLS} calls {exchange}"
    for strategy in Strategy:
        same = sum(step.strategy is strategy for step in steps)
        yield from (("workspace", f"period {period} {strategy.value}") for period in PERIODS if same > period + 1)
    for name in ("tokens", "hidden", "op", "dtype", "scale", "eps", "gamma", "weight_bias"):
        if len({getattr(step, name) for step in steps}) > 1:
            yield "workspace", f"changing {name.replace('_', ' ')} {exchange}"
