"""What runs on a rank for the special values: rows made by hand, and the bits that came out."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from fusecheck.case.worker import CaseWorker
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import FusionOp, Limits, RankInputs, Strategy
from fusecheck.problem import Problem
from fusecheck.verdict import raw

TOKENS, HIDDEN = 4, 64
ROW, COLUMN = 1, 5
"""Where a single special element is put."""


class SpecialWorker(CaseWorker):
    """A `CaseWorker` that also runs inputs given by name."""

    def special(self, backend: str, name: str, strategy: str, scale: float) -> dict[str, list[list[int]]]:
        """The bits of every output, a list a row, of one call on inputs of that name."""
        kernel = self.workspaces.kernel(self.workspaces.backend(backend), Limits(TOKENS, HIDDEN, torch.bfloat16))
        inputs = given(name, self.rank.index, self.rank.device, scale)
        outputs = kernel.run(inputs, op=FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8, strategy=Strategy(strategy))
        assert outputs.norm is not None
        assert outputs.quant is not None
        named = {"residual": outputs.residual, "norm": outputs.norm, "quant": outputs.quant}
        mask = {"residual": 0xFFFF, "norm": 0xFFFF, "quant": 0xFF}
        return {key: (raw(x).to(torch.int32) & mask[key]).tolist() for key, x in named.items()}

    def refusal(self, backend: str, hidden: int) -> str:
        """What the kernel raises at a hidden size, when it is opened or when it runs; empty where it runs."""
        problem = Problem(tokens=TOKENS, hidden=hidden)
        inputs = Inputs(problem, self.rank.device).of_rank(self.rank.index)
        try:
            kernel = self.workspaces.kernel(self.workspaces.backend(backend), Limits(TOKENS, hidden, torch.bfloat16))
            kernel.run(inputs, op=problem.op, strategy=Strategy.ONESHOT)
        except Exception as error:  # its type is the library's own
            return str(error)
        return ""


def given(name: str, rank: int, device: torch.device, scale: float) -> RankInputs:
    """The operands called `name`: ordinary ones with something special in one row or in all."""
    generator = torch.Generator().manual_seed(3 + rank)
    partial = torch.randn(TOKENS, HIDDEN, generator=generator)
    residual = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(99))
    if name in ("nan", "infinity", "opposite-infinities"):
        here = {"nan": math.nan, "infinity": math.inf, "opposite-infinities": math.inf if rank == 0 else -math.inf}
        partial[ROW, COLUMN] = here[name] if rank == 0 or name == "opposite-infinities" else 0.0
    elif name == "negative-zero":
        partial, residual = torch.full_like(partial, -0.0), torch.full_like(residual, -0.0)
    elif name == "subnormal":
        partial, residual = torch.full_like(partial, 1e-39), torch.zeros_like(residual)
    elif name == "zero-row":
        partial[ROW], residual[ROW] = 0.0, 0.0
    inputs = RankInputs(partial, residual, torch.ones(HIDDEN), torch.tensor([scale]), 1e-5, 0.0)
    native = {key: getattr(inputs, key).to(torch.bfloat16).to(device) for key in ("partial", "residual", "gamma")}
    return replace(inputs, **native, scale=inputs.scale.to(device))
