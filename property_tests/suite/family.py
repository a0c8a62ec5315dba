"""Calls of any composition without rank processes: the emulated arithmetic on one side, the stages on the other."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fusecheck.backends.emulated_arithmetic import Arithmetic
from fusecheck.backends.emulated_quantise import Quantising
from fusecheck.case.returned import decoded, layout_of, misshapen
from fusecheck.dataflow import Dataflow, ExpertFlow
from fusecheck.inputs.rank_inputs import EXPERTS, Inputs
from fusecheck.interface import Operation, RankInputs, RankOutputs
from fusecheck.oracle import Operands, Oracle
from fusecheck.problem import Problem
from fusecheck.quantisers.known import quantiser
from fusecheck.stages.judgement import Stage, Tally
from fusecheck.stages.layout import judge_layout
from fusecheck.verdict import judge_rows

CPU = torch.device("cpu")
GIVEN_FACTOR = 2688.0
"""NVFP4's factor of a tensor whose largest magnitude is one: 448 * 6."""


class Given(Inputs):
    """Inputs of which the large ones are there already; gamma too, where it is given."""

    def __init__(self, problem: Problem, partials: list[Tensor], residual: Tensor, gamma: Tensor | None = None) -> None:
        super().__init__(problem, CPU)
        self._partials, self._residual = partials, residual
        if gamma is not None:
            self.__dict__["_gamma"] = gamma

    def partials(self, rows: range, flow: ExpertFlow = EXPERTS) -> list[Tensor]:
        """All of them."""
        return self._partials

    def partial(self, rank: int, rows: range | None = None, flow: ExpertFlow = EXPERTS) -> Tensor:
        """All rows."""
        return self._partials[rank]

    def residual(self, rows: range | None = None) -> Tensor:
        """All rows."""
        return self._residual


def emulated(
    problem: Problem,
    flow: Dataflow,
    *,
    source: Inputs | None = None,
    rank: int = 0,
    arithmetic: type[Arithmetic] = Arithmetic,
    quantising: type[Quantising] = Quantising,
) -> RankOutputs:
    """What the emulated kernel returns on a rank, as it stores it; `source` spares making the inputs again."""
    source = source or Inputs(problem, CPU)
    inputs, partials = source.of_rank(rank), source.partials(range(problem.tokens))
    return computed(arithmetic(flow, rank, len(partials)), inputs, partials, problem.op, quantising=quantising)


def computed(
    kernel: Arithmetic,
    inputs: RankInputs,
    partials: list[Tensor],
    op: Operation,
    *,
    quantising: type[Quantising] = Quantising,
) -> RankOutputs:
    """What a kernel makes of every rank's partial sums, and of one rank's other operands."""
    row = replace(kernel.prepare(inputs), op=op)
    outputs = RankOutputs(
        torch.empty_like(inputs.partial) if op.residual else None,
        torch.empty_like(inputs.partial) if op.returns_norm else None,
        total=None if op.norm else torch.empty_like(inputs.partial),
    )
    if not op.returns_scale:
        codes = torch.empty_like(inputs.partial, dtype=torch.float8_e4m3fn) if op.returns_quant else None
        outputs = replace(outputs, quant=codes)
        kernel.epilogue(kernel.total(partials), inputs.residual, row, outputs)
        return outputs
    rules, tokens, hidden = kernel.dataflow.quant(op.quantiser), *inputs.partial.shape
    maker = quantising(quantiser(op.quantiser), rules, inputs.scale, inputs.partial.dtype, inputs.layout)
    scales, flat = maker.allocate(tokens, hidden)
    outputs = replace(outputs, quant=flat, scale=scales)
    kernel.epilogue(kernel.total(partials), inputs.residual, replace(row, quantising=maker), outputs)
    return replace(outputs, quant=maker.pack(flat), scale=maker.lay_out(scales, hidden))


def judged(
    problem: Problem, flow: Dataflow, outputs: RankOutputs, *, operands: Operands | None = None
) -> dict[Stage, Tally]:
    """The tallies of all rows, stage by stage, those of one stage added up; `operands` spares making them again.

    Raises:
        AssertionError: an output is missing, or is not of the shape and dtype that the operation returns.
    """
    assert misshapen(outputs, problem, CPU) == []
    operands = operands or Inputs(problem, CPU).operands(range(problem.tokens), flow.experts)
    tallies: dict[Stage, Tally] = {}
    for tally in judge_rows(Oracle(flow, operands), decoded(outputs, problem), 0):
        tallies.setdefault(tally.stage, Tally(tally.stage)).add(tally)
    if outputs.scale is not None:
        tallies[Stage.LAYOUT] = judge_layout(layout_of(problem, flow), outputs.scale, None)
    return tallies


def outside(problem: Problem, flow: Dataflow, outputs: RankOutputs) -> dict[str, int]:
    """How many elements lie outside, by the stages that have some."""
    return {stage.value: t.outside for stage, t in judged(problem, flow, outputs).items() if t.outside}
