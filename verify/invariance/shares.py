"""Which rows are watched: those that show another order in emulated arithmetic, and how surely they show one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusecheck.interface import RankInputs
from fusecheck.invariance.calls import Call
from fusecheck.invariance.launch import LANES, Launch, tree_sum
from fusecheck.invariance.rows import Rows, kind_of
from fusecheck.operations import Collective
from fusecheck.problem import Problem

CANDIDATES = 64
"""Rows from which the watched ones are chosen."""


@dataclass(frozen=True)
class Chosen:
    """The watched rows.

    Attributes:
        rows: their numbers.
        shares: `squares`: of those that are to show the tree of the squares, the share whose norm differs where one of
            two trees is taken for another, which is not the one that they were chosen by; `ranks`: of those that are
            to show the order of the ranks, the share whose sum differs where it starts at the second rank.
        drawn: the same of rows that were not chosen, with Gaussian values.
    """

    rows: tuple[int, ...]
    shares: dict[str, float]
    drawn: dict[str, float]


def choose(problem: Problem, count: int) -> Chosen:
    """Choose `count` rows: a quarter of each other kind, the rest for the tree of the squares, dealt out in turn."""
    ranks = range(1, count, 4) if problem.world_size > 2 else range(0)
    rounding = range(3, count + 2, 4)
    needed = count - len(ranks) - len(rounding)
    best = _best(problem, needed) if problem.op.norm else list(range(0, 2 * needed, 2))
    half = -(-needed // 2)
    dealt = itertools.zip_longest(best[:half], ranks, best[half:], rounding)
    rows = [row for each in dealt for row in each if row is not None]
    plain = replace(problem, family="gaussian")
    return Chosen(tuple(rows), shares(problem, rows), _of_rows(plain, _gaussian(plain)))


def shares(problem: Problem, rows: Sequence[int]) -> dict[str, float]:
    """How many of these rows show another order; see `Chosen.shares`."""
    everyone = _everyone(problem, rows)
    found: dict[str, float] = {}
    for kind in ("squares", "ranks"):
        which = torch.tensor([kind_of(row, problem.world_size) == kind for row in rows])
        some = [replace(x, partial=x.partial[which], residual=x.residual[which]) for x in everyone]
        found |= {name: share for name, share in _of_rows(problem, some).items() if name == kind and bool(which.any())}
    return found


def _best(problem: Problem, count: int) -> list[int]:
    """The rows whose norm differs between most pairs of launches, so that every pair is shown by some."""
    numbers = list(range(0, 2 * CANDIDATES, 2))
    stream, weight = _stream(_everyone(problem, numbers), problem)
    norms = [_norm(stream, weight, problem.eps, _of(each)) for each in _launches(problem.hidden)]
    pairs = [(a != b).any(-1) for i, a in enumerate(norms) for b in norms[:i]]
    shown = torch.stack(pairs or [torch.zeros(CANDIDATES, dtype=torch.bool)]).double()
    chosen: list[int] = []
    for _ in range(min(count, CANDIDATES)):
        covered = shown[:, chosen].sum(-1, keepdim=True)
        gain = (shown / (1 + covered) ** 2).sum(0)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
    return [numbers[each] for each in chosen]


def _everyone(problem: Problem, rows: Sequence[int]) -> list[RankInputs]:
    made = Rows(replace(problem, tokens=len(rows)), torch.device("cpu"))
    return [made.of_rank(Call(len(rows), tuple(rows)), rank) for rank in range(problem.world_size)]


def _gaussian(problem: Problem) -> list[RankInputs]:
    made = Rows(replace(problem, tokens=CANDIDATES), torch.device("cpu"))
    return [made.of_rank(Call(CANDIDATES), rank) for rank in range(problem.world_size)]


def _of_rows(problem: Problem, everyone: Sequence[RankInputs]) -> dict[str, float]:
    found = {}
    stream, weight = _stream(everyone, problem)
    launches = _launches(problem.hidden)
    if problem.op.norm and len(stream):
        one = _norm(stream, weight, problem.eps, _of(launches[-1]))
        others = [_norm(stream, weight, problem.eps, each) for each in (_turned(launches[-1]), _of_torch)]
        found["squares"] = sum(_share(one, other) for other in others) / len(others)
    if len(everyone) > 2:
        partials = [inputs.partial for inputs in everyone]
        found["ranks"] = _share(_sum(partials), _sum([*partials[1:], partials[0]]))
    return found


def _stream(everyone: Sequence[RankInputs], problem: Problem) -> tuple[Tensor, Tensor]:
    """What the norm reads of all rows, [rows, hidden], and its weight, [hidden]."""
    first = everyone[0]
    partials = [inputs.partial for inputs in everyone]
    total = _sum(partials if problem.op.collective is not Collective.NONE else partials[:1])
    return total + first.residual if problem.op.residual else total, first.gamma.float() + first.weight_bias


def _launches(hidden: int) -> list[Launch]:
    """Ways to spread a row over 1, 2, 4 and 8 blocks, as far as they divide it."""
    per_row = hidden // LANES
    return [Launch(per_row // n, n) for n in (1, 2, 4, 8) if per_row % n == 0 and per_row // n <= 1024]


def _of(shape: Launch) -> Callable[[Tensor], Tensor]:
    return lambda squares: tree_sum(squares, shape)


def _turned(shape: Launch) -> Callable[[Tensor], Tensor]:
    """The same tree over accesses that are dealt out in turn, two to a thread and its neighbour's neighbour."""
    return lambda squares: tree_sum(squares.view(len(squares), -1, LANES).roll(3, 1).reshape(len(squares), -1), shape)


def _of_torch(squares: Tensor) -> Tensor:
    return squares.sum(-1)


def _norm(stream: Tensor, weight: Tensor, eps: float, add: Callable[[Tensor], Tensor]) -> Tensor:
    wide = stream.float()
    mean = add(wide * wide) / stream.shape[-1]
    return (wide * torch.rsqrt(mean + eps)[:, None] * weight).to(stream.dtype)


def _sum(partials: Sequence[Tensor]) -> Tensor:
    total = partials[0].float()
    for partial in partials[1:]:
        total = total + partial.float()
    return total.to(partials[0].dtype)


def _share(first: Tensor, second: Tensor) -> float:
    return float((first != second).any(-1).double().mean())
