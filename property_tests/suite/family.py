"""Calls of any composition without rank processes: the emulated arithmetic on one side, the stages on the other."""

from __future__ import annotations

from dataclasses import replace

import torch

from fusecheck.backends.emulated_arithmetic import Arithmetic
from fusecheck.backends.emulated_quantise import Quantising
from fusecheck.case.returned import decoded, layout_of
from fusecheck.dataflow import Dataflow
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import RankOutputs
from fusecheck.oracle import Oracle
from fusecheck.problem import Problem
from fusecheck.quantisers.known import quantiser
from fusecheck.stages.judgement import Stage, Tally
from fusecheck.stages.layout import judge_layout
from fusecheck.verdict import judge_rows

CPU = torch.device("cpu")
GIVEN_FACTOR = 2688.0
"""NVFP4's factor of a tensor whose largest magnitude is one: 448 * 6."""


def emulated(
    problem: Problem,
    flow: Dataflow,
    *,
    arithmetic: type[Arithmetic] = Arithmetic,
    quantising: type[Quantising] = Quantising,
) -> RankOutputs:
    """What the emulated kernel returns, as it stores it."""
    source, op = Inputs(problem, CPU), problem.op
    inputs, partials = source.of_rank(0), source.partials(range(problem.tokens))
    kernel = arithmetic(flow, 0, len(partials))
    rules = flow.quant(op.quantiser)
    maker = quantising(quantiser(op.quantiser), rules, inputs.scale, inputs.partial.dtype, problem.layout)
    scales, codes = maker.allocate(problem.tokens, problem.hidden)
    empty = torch.empty_like
    outputs = RankOutputs(
        empty(inputs.partial) if op.residual else None,
        empty(inputs.partial) if op.returns_norm else None,
        codes,
        scales,
    )
    row = replace(kernel.prepare(inputs), op=op, quantising=maker)
    kernel.epilogue(kernel.total(partials), inputs.residual, row, outputs)
    return replace(outputs, quant=maker.pack(codes), scale=maker.lay_out(scales, problem.hidden))


def judged(problem: Problem, flow: Dataflow, outputs: RankOutputs) -> dict[Stage, Tally]:
    """The tallies of all rows, stage by stage; those of one stage added up."""
    oracle = Oracle(flow, Inputs(problem, CPU).operands(range(problem.tokens)))
    tallies: dict[Stage, Tally] = {}
    for tally in judge_rows(oracle, decoded(outputs, problem), 0):
        tallies.setdefault(tally.stage, Tally(tally.stage)).add(tally)
    if outputs.scale is not None:
        tallies[Stage.LAYOUT] = judge_layout(layout_of(problem, flow), outputs.scale, None)
    return tallies


def outside(problem: Problem, flow: Dataflow, outputs: RankOutputs) -> dict[str, int]:
    """How many elements lie outside, by the stages that have some."""
    return {stage.value: t.outside for stage, t in judged(problem, flow, outputs).items() if t.outside}
