"""Operands that a test made itself, instead of leaving them to a Problem."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import RankInputs
from fusecheck.oracle import Operands
from fusecheck.problem import Problem


@dataclass(frozen=True)
class Given:
    """One call with all ranks' operands.

    Attributes:
        problem: op, strategy, dtype, shape and scalars of the call; its data are not used.
        partials: each rank's addend, [tokens, hidden].
        residual: [tokens, hidden].
        gamma: [hidden].
    """

    problem: Problem
    partials: tuple[Tensor, ...]
    residual: Tensor
    gamma: Tensor

    @classmethod
    def of(cls, problem: Problem, device: torch.device) -> Given:
        """The operands that a Problem stands for."""
        made = Inputs(problem, device).operands(range(problem.tokens))
        return cls(problem, tuple(made.partials), made.residual, made.gamma)

    def changed(self, **fields: object) -> Given:
        """The same call with other scalars; see `Problem`."""
        return replace(self, problem=replace(self.problem, **fields))  # type: ignore[arg-type]

    def rows(self, index: Tensor) -> Given:
        """A call with only these rows, in this order."""
        shorter = self.changed(tokens=len(index))
        return replace(
            shorter, partials=tuple(partial[index] for partial in self.partials), residual=self.residual[index]
        )

    def of_rank(self, rank: int) -> RankInputs:
        """What the kernel receives on one rank."""
        scale = torch.tensor([self.problem.scale], dtype=torch.float32, device=self.residual.device)
        problem = self.problem
        return RankInputs(
            self.partials[rank], self.residual, self.gamma, scale, problem.eps, weight_bias=problem.weight_bias
        )

    def operands(self, rows: range) -> Operands:
        """What the oracle reads for some rows."""
        part = slice(rows.start, rows.stop)
        return Operands(
            partials=[partial[part] for partial in self.partials],
            residual=self.residual[part],
            gamma=self.gamma,
            scale=float(torch.tensor(self.problem.scale, dtype=torch.float32)),
            eps=self.problem.eps,
            weight_bias=self.problem.weight_bias,
            op=self.problem.op,
        )
