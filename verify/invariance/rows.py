"""The rows that are watched and their company: what stands where in a batch, on one rank.

Rows are numbered, and of three kinds: in those for `squares` two ranks hold x and -x, and the stream is the residual,
made so that another order of the squares shows; those for `ranks` are of the family `cancelling`, so that another order
of three ranks or more shows; those for `rounding` are Gaussian.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from fusecheck.inputs.rank_inputs import EXPERTS, Inputs
from fusecheck.interface import RankInputs
from fusecheck.invariance.calls import Call
from fusecheck.invariance.expert_rows import filled, first, placed
from fusecheck.invariance.sharp import sharpened
from fusecheck.operations import Collective
from fusecheck.problem import Problem
from fusecheck.stages.experts import Experts, expert_sum

FAMILIES = ("gaussian", "cancelling")
COMPANY = {"rows": 1 << 20, "others": 1 << 21, "large": 1 << 20}
"""The number of the row that stands at place 0, if nobody watched stands there."""

FILLS = {"zeros": 0.0, "nan": torch.nan}
"""What every element holds in company of these kinds."""

LARGE = 1024.0


class Rows:
    """Makes the operands of calls on one rank; rows stay as they are whatever batch they are in.

    Args:
        problem: op, dtype, hidden, scalars and seed; of its tokens the largest batch.
        device: where the tensors live.
    """

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem, self.device = problem, device
        self._made_once = Inputs(problem, device)
        self.row = lru_cache(maxsize=1024)(self._row)
        self._neighbours = lru_cache(maxsize=32)(self._made)
        self._together = lru_cache(maxsize=64)(self._stacked)
        self._stream = lru_cache(maxsize=1024)(self._made_stream)
        self._terms = lru_cache(maxsize=128)(self._made_terms)

    def of_rank(self, call: Call, rank: int) -> RankInputs:
        """What the kernel receives on this rank; where experts are summed, `partial` is their sum, for who wants it."""
        addends = call.addends or call.world_size or self.problem.world_size
        partial, residual = (x.clone() for x in self._company(call, rank, addends))
        if call.watched:
            places = torch.tensor(call.places, device=self.device)
            partial[places], residual[places] = self._together(call.watched, rank, addends)
        problem = self.problem
        experts = self._experts(call, rank, addends) if problem.op.has_experts else None
        if experts is not None:
            partial = expert_sum(experts, EXPERTS)
        gamma, scale = self._made_once.gamma(), self._made_once.scale()
        return RankInputs(partial, residual, gamma, scale, problem.eps, problem.weight_bias, problem.layout, experts)

    def _stacked(self, numbers: tuple[int, ...], rank: int, addends: int) -> tuple[Tensor, Tensor]:
        """Several watched rows, [numbers, hidden]: the partial sums of this rank, and the residual."""
        partial, residual = zip(*(self.row(number, rank, addends) for number in numbers), strict=True)
        return torch.stack(partial), torch.stack(residual)

    def _company(self, call: Call, rank: int, addends: int) -> tuple[Tensor, Tensor]:
        shape = (call.tokens, self.problem.hidden)
        if call.company in FILLS:
            empty = torch.full(shape, FILLS[call.company], dtype=self.problem.format.dtype, device=self.device)
            return empty, empty
        partial, residual = self._neighbours(COMPANY[call.company], self.problem.tokens, rank, addends)
        partial, residual = partial[: call.tokens], residual[: call.tokens]
        return (partial * LARGE, residual * LARGE) if call.company == "large" else (partial, residual)

    def _experts(self, call: Call, rank: int, addends: int) -> Experts:
        """The experts of the batch; those of rows that are made for their squares add up to nothing."""
        beside = COMPANY.get(call.company, COMPANY["rows"])
        batch = first(self._terms(beside, self.problem.tokens, rank, addends, FAMILIES[0]), call.tokens)
        batch = filled(batch, with_=FILLS.get(call.company), times=LARGE if call.company == "large" else 1.0)
        kinds = [kind_of(number, addends) for number in call.watched]
        rows = [
            self._terms(number, 1, rank, addends, FAMILIES[kind == "ranks"])
            for number, kind in zip(call.watched, kinds, strict=True)
        ]
        silent = [kind == "squares" and self.problem.op.norm for kind in kinds]
        rows = [filled(row, with_=0.0) if quiet else row for row, quiet in zip(rows, silent, strict=True)]
        return placed(batch, rows, call.places)

    def _made_terms(self, number: int, count: int, rank: int, addends: int, family: str) -> Experts:
        """The expert tensors of rows that begin with this number; zeros on ranks that add nothing."""
        seed = (self.problem.seed + (number << 20)) % 2**62
        made = replace(self.problem, family=family, tokens=count, world_size=addends, seed=seed)
        experts = Inputs(made, self.device).experts(min(rank, addends - 1))
        return filled(experts, with_=0.0) if rank >= addends else experts

    def _row(self, number: int, rank: int, addends: int) -> tuple[Tensor, Tensor]:
        kind, problem = kind_of(number, addends), self.problem
        family = FAMILIES[kind == "ranks"]
        partial, residual = (made[0] for made in self._made(number, 1, rank, addends, family))
        if kind != "squares" or not problem.op.norm:
            return partial, residual
        stream = self._stream(number, addends)
        if problem.op.has_experts:
            return torch.zeros_like(stream), stream
        if not problem.op.residual:
            return (stream if rank == 0 else torch.zeros_like(stream)), residual
        if problem.op.collective is Collective.NONE or addends == 1:
            return torch.zeros_like(stream), stream
        shared = self._made(number, 1, 0, addends)[0][0]
        return (shared, -shared)[rank] if rank < 2 else torch.zeros_like(shared), stream

    def _made_stream(self, number: int, addends: int) -> Tensor:
        """What the norm reads of a row that is made for its squares, [hidden]; the same on every rank."""
        residual = self._made(number, 1, 0, addends)[1][0]
        weight = self._made_once.gamma().float() + self.problem.weight_bias
        return sharpened(residual, weight, self.problem.eps, self.problem.format, number)

    def _made(
        self, number: int, count: int, rank: int, addends: int, family: str = FAMILIES[0]
    ) -> tuple[Tensor, Tensor]:
        """Rows of one family, [count, hidden]: the partial sums of this rank, and the residual."""
        made = Inputs(replace(self.problem, family=family, tokens=count, world_size=addends), self.device)
        rows = range(number, number + count)
        residual = made.residual(rows)
        if rank >= addends or self.problem.op.has_experts:
            return torch.zeros_like(residual), residual
        return made.partial(rank, rows), residual


def kind_of(row: int, addends: int) -> str:
    """What a watched row is made to show: `squares`, `ranks`, or `rounding`."""
    return "rounding" if row % 4 == 3 else "ranks" if row % 4 == 1 and addends > 2 else "squares"
