"""The tensors of a Problem: any rows, of any rank, on any device, always the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fusecheck.dataflow import ExpertFlow
from fusecheck.inputs.cells import Cells
from fusecheck.inputs.expert_inputs import TERMS, expert_inputs
from fusecheck.inputs.families import FAMILIES
from fusecheck.inputs.gammas import GAMMAS
from fusecheck.interface import RankInputs
from fusecheck.operations import Collective
from fusecheck.oracle import Operands
from fusecheck.problem import Problem
from fusecheck.stages.experts import Experts, expert_sum

EXPERTS = ExpertFlow()
"""How experts are summed unless a dataflow says otherwise."""

BLOCK = 2**17
"""Elements made at a time, so that the intermediate words stay in cache."""

FEW = 2**15
"""Elements that are made in host memory and copied: to launch some thirty kernels on a GPU takes longer."""

CPU = torch.device("cpu")


class Inputs:
    """Makes the operands of one Problem on one device.

    Args:
        problem: what to make; its schedule is not looked at.
        device: where the tensors live.
    """

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem = problem
        self.device = device
        self._family = FAMILIES[problem.family]
        self._experts: dict[int, Experts] = {}

    def partial(self, rank: int, rows: range | None = None, flow: ExpertFlow = EXPERTS) -> Tensor:
        """A rank's addend, [rows, hidden]; all rows unless given; of experts as the flow sums them."""
        world_size = self.problem.world_size
        if self.problem.op.collective is Collective.NONE:
            rank, world_size = 0, 1
        if self.problem.op.has_experts:
            made = expert_sum(self.experts(rank), flow)
            return made if rows is None else made[rows.start : rows.stop]
        return self._blocks(rows, lambda cells: self._family.partial(cells, rank, world_size))

    def partials(self, rows: range, flow: ExpertFlow = EXPERTS) -> list[Tensor]:
        """Every rank's addend for the given rows."""
        return [self.partial(rank, rows, flow) for rank in self.addends(0)]

    def experts(self, rank: int) -> Experts:
        """A rank's expert tensors, all tokens."""
        if rank not in self._experts:
            place = self._place(TERMS * self.problem.elements)
            made = expert_inputs(self.problem, self._family.partial, rank, place)
            self._experts[rank] = made.mapped(lambda _, tensor: tensor.to(self.device))
        return self._experts[rank]

    def addends(self, rank: int) -> Sequence[int]:
        """The ranks whose partial sums meet on `rank`: its own alone, equal on all, where there is no collective."""
        return (rank,) if self.problem.op.collective is Collective.NONE else range(self.problem.world_size)

    def residual(self, rows: range | None = None) -> Tensor:
        """The residual, [rows, hidden]."""
        return self._blocks(rows, self._family.residual)

    def gamma(self) -> Tensor:
        """The norm's weight, [hidden]; a fresh tensor."""
        return self._gamma.clone()

    @cached_property
    def _gamma(self) -> Tensor:
        place = self._place(self.problem.hidden)
        return GAMMAS[self.problem.gamma](self._cells(range(1), place)).reshape(-1).to(self.device)

    def scale(self) -> Tensor:
        """The dequantisation scale, [1], float32."""
        # Filled where it is: a copy from the host would wait for the device.
        return torch.full((1,), float(np.float32(self.problem.scale)), dtype=torch.float32, device=self.device)

    def operands(self, rows: range, flow: ExpertFlow = EXPERTS) -> Operands:
        """What the oracle reads for the given rows; experts are summed as `flow` says."""
        problem = self.problem
        return Operands(
            partials=self.partials(rows, flow),
            residual=self.residual(rows),
            gamma=self._gamma,
            scale=float(self.scale()),
            eps=problem.eps,
            weight_bias=problem.weight_bias,
            op=problem.op,
        )

    def of_rank(self, rank: int) -> RankInputs:
        """What the kernel receives on this rank."""
        experts = self.experts(rank) if self.problem.op.has_experts else None
        return RankInputs(
            partial=self._unread() if experts else self.partial(rank),
            residual=self.residual(),
            gamma=self.gamma(),
            scale=self.scale(),
            eps=self.problem.eps,
            weight_bias=self.problem.weight_bias,
            layout=self.problem.layout,
            experts=experts,
        )

    def _unread(self) -> Tensor:
        """What a kernel that sums experts gets for an addend: whoever reads it shows."""
        shape = (self.problem.tokens, self.problem.hidden)
        return torch.full(shape, torch.nan, dtype=self.problem.format.dtype, device=self.device)

    def _place(self, elements: int) -> torch.device:
        """Where so many elements are made; the bits are the same anywhere."""
        return CPU if elements <= FEW else self.device

    def _cells(self, rows: range, place: torch.device) -> Cells:
        return Cells(self.problem.seed, rows.start, len(rows), self.problem.hidden, self.problem.format, place)

    def _blocks(self, rows: range | None, make: Callable[[Cells], Tensor]) -> Tensor:
        rows = rows if rows is not None else range(self.problem.tokens)
        place = self._place(len(rows) * self.problem.hidden)
        step = max(1, BLOCK // self.problem.hidden) if place.type == "cpu" else len(rows)
        if len(rows) <= step:
            return make(self._cells(rows, place)).contiguous().to(self.device)
        out = torch.empty(len(rows), self.problem.hidden, dtype=self.problem.format.dtype, device=self.device)
        for start in range(rows.start, rows.stop, step):
            part = range(start, min(start + step, rows.stop))
            out[part.start - rows.start : part.stop - rows.start] = make(self._cells(part, place))
        return out
