"""How small an error is rejected: a table of defects, and the smallest uniform scale error by bisection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusecheck.backends.emulated_arithmetic import Arithmetic
from fusecheck.dataflow import Dataflow
from fusecheck.faults.defects import DEFECTS, Defect, scaled_by
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import RankInputs, RankOutputs
from fusecheck.oracle import Operands, Oracle
from fusecheck.problem import Problem
from fusecheck.stages.code import admits_codes
from fusecheck.verdict import differing, judge_rows

RUNS, TOKENS, HIDDEN, RANKS = 8, 64, 4096, 4
DEPTH = 16
"""Additions above a square in the emulated kernel at this hidden size: 7 serial, 9 in the tree."""

BASE = Dataflow(
    "sensitivity", accumulate="fp32", round_sum=False, round_norm=False, scaling="divide", depth=None, order="rank"
)
"""Nothing is rounded but the residual: the dataflow in which undeclared roundings are defects."""

Rejected = tuple[bool, bool, bool]
"""By the codes alone in any order, by the codes with the depth declared, by all outputs."""


@dataclass(frozen=True)
class RowResult:
    """One row of the table: `rejected` of `RUNS` runs, by codes (any order, depth) and by all outputs."""

    defect: Defect
    rejected: tuple[int, int, int]

    @property
    def kept(self) -> bool:
        """Whether all runs are rejected wherever all of them should be, and a right kernel never is."""
        wanted = zip(self.defect.expected, self.rejected, strict=True)
        return all(got == RUNS for want, got in wanted if want == RUNS) and (
            self.defect.expected != (0, 0, 0) or self.rejected == (0, 0, 0)
        )


def table(seed: int = 0, seen: Callable[[RowResult], None] = lambda row: None) -> list[RowResult]:
    """Judge every defect in `RUNS` runs; `seen` is told of each row."""
    results = []
    for defect in DEFECTS:
        runs = [judge(defect, seed * RUNS + run) for run in range(RUNS)]
        columns = zip(*runs, strict=True)
        results.append(RowResult(defect, tuple(sum(column) for column in columns)))
        seen(results[-1])
    return results


def judge(defect: Defect, seed: int) -> Rejected:
    """Compute one run with the defect, and say who rejects it."""
    declared = replace(BASE, **defect.declares)
    operands = _operands(defect, declared, seed)
    kernel = defect.arithmetic(replace(declared, **defect.computes), 0, RANKS)
    outputs = _run(kernel, operands)
    deep = Oracle(replace(declared, depth=DEPTH), operands)
    whole = any(tally.outside for tally in judge_rows(deep, outputs, 0))
    return _codes_rejected(Oracle(declared, operands), outputs), _codes_rejected(deep, outputs), whole


def smallest_scale_error(*, depth: bool, seed: int = 0, steps: int = 9) -> float:
    """The smallest uniform scale error that the codes of `RUNS` runs show, bisected between 1e-7 and 1e-3.

    Args:
        depth: whether the depth of the sum of squares is declared.
        seed: of the runs.
        steps: halvings of the exponent's range.
    """
    declared = replace(BASE, depth=DEPTH) if depth else BASE
    plain = Defect("none", (0, 0, 0))
    operands = [_operands(plain, BASE, seed * RUNS + run) for run in range(RUNS)]

    def rejected(error: float) -> bool:
        kernel = scaled_by(1 + error)(BASE, 0, RANKS)
        return any(_codes_rejected(Oracle(declared, each), _run(kernel, each)) for each in operands)

    low, high = -7.0, -3.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if rejected(10.0**middle) else (middle, high)
    return float(10.0**high)


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors of this size are slower on several threads where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _operands(defect: Defect, declared: Dataflow, seed: int) -> Operands:
    problem = Problem(world_size=RANKS, tokens=TOKENS, hidden=HIDDEN, seed=seed)
    made = Inputs(problem, torch.device("cpu")).operands(range(TOKENS))
    small = [(x.float() * defect.factor).to(x.dtype) for x in (*made.partials, made.residual)]
    operands = replace(made, partials=small[:-1], residual=small[-1])
    oracle = Oracle(declared, operands)
    amax = float(oracle.unrounded_norm(oracle.residual()).abs().max()) / 448
    scale = {"amax": amax, "one": 1.0, "eighth": amax / 8}[defect.scale]
    return replace(operands, scale=float(torch.tensor(scale, dtype=torch.float32)))


def _run(kernel: Arithmetic, operands: Operands) -> RankOutputs:
    residual, scale = operands.residual, torch.tensor([operands.scale], dtype=torch.float32)
    inputs = RankInputs(operands.partials[0], residual, operands.gamma, scale, operands.eps, operands.weight_bias)
    codes = torch.empty_like(residual, dtype=torch.float8_e4m3fn)
    outputs = RankOutputs(torch.empty_like(residual), torch.empty_like(residual), codes)
    kernel.epilogue(kernel.total(operands.partials), residual, kernel.prepare(inputs), outputs)
    return outputs


def _codes_rejected(oracle: Oracle, outputs: RankOutputs) -> bool:
    """Whether some code is inadmissible, judged from the inputs alone."""
    assert outputs.quant is not None
    residual, got = oracle.residual(), outputs.quant.view(torch.uint8)
    nominal: Tensor = oracle.codes(residual, None)
    where = differing(got, nominal)
    if where is None:
        return False
    lo, hi = oracle.code_ends(residual, None, where)
    return not bool(admits_codes(got[where], nominal[where], lo, hi).all())
