"""Judging one rank's call by a declared dataflow, or finding the known dataflow that explains it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from fusecheck.dataflow import DATAFLOWS, Dataflow
from fusecheck.interface import RankOutputs
from fusecheck.oracle import Operands, Oracle
from fusecheck.testing.call import Call
from fusecheck.verdict import Stage, Tally, judge_rows

CPU_BLOCK, GPU_BLOCK = 2**18, 2**26
"""Elements judged at a time, so that intermediates stay in cache, or in bounds."""
SAMPLED = 8
"""Rows by which a dataflow is tried before all rows are."""


def tallies(call: Call, flow: Dataflow, rows: range) -> list[Tally]:
    """Judge some rows of a call, in blocks; a tally for each stage that has an output."""
    merged: dict[Stage, Tally] = {}
    size = CPU_BLOCK if call.partials[0].device.type == "cpu" else GPU_BLOCK
    step = max(1, size // call.shape[1])
    for start in range(rows.start, rows.stop, step):
        part = range(start, min(start + step, rows.stop))
        for tally in _judge(call, flow, part):
            merged.setdefault(tally.stage, Tally(tally.stage)).add(tally)
    return list(merged.values())


def outside(judged: Iterable[Tally]) -> int:
    """Elements outside their enclosures, over all stages."""
    return sum(tally.outside for tally in judged)


def explaining(call: Call, rows: range, among: Iterable[Dataflow] = ()) -> list[str]:
    """The known dataflows under which every element of these rows is inside, by name."""
    few = range(rows.start, min(rows.stop, rows.start + SAMPLED))
    candidates = [flow for flow in among or DATAFLOWS.values() if not outside(tallies(call, flow, few))]
    return [flow.name for flow in candidates if not outside(tallies(call, flow, rows))]


def nearest(call: Call, rows: range) -> Dataflow:
    """The known dataflow that leaves the fewest elements of some rows outside."""
    few = range(rows.start, min(rows.stop, rows.start + SAMPLED))
    return min(DATAFLOWS.values(), key=lambda flow: outside(tallies(call, flow, few)))


def _judge(call: Call, flow: Dataflow, rows: range) -> list[Tally]:
    part = slice(rows.start, rows.stop)
    partials = [partial[part] for partial in call.partials]
    hidden = call.shape[1]
    operands = Operands(
        partials=partials,
        residual=torch.zeros_like(partials[0]) if call.residual_in is None else call.residual_in[part],
        gamma=partials[0].new_ones(hidden) if call.gamma is None else call.gamma,
        scale=1.0 if call.scale is None else float(call.scale),
        eps=0.0 if call.eps is None else call.eps,
        weight_bias=call.weight_bias,
    )
    oracle = Oracle(flow, operands)
    observed = {name: tensor[part] for name, tensor in call.outputs.items()}
    residual = observed.get("residual")
    quant = observed.get("quant")
    outputs = RankOutputs(
        oracle.residual() if residual is None else residual,
        observed.get("norm"),
        None if quant is None else quant.view(torch.float8_e4m3fn),
    )
    judged = judge_rows(oracle, outputs, rows.start)
    return [tally for tally in judged if tally.stage is not Stage.RESIDUAL or residual is not None]


def named(flow: str | Dataflow) -> Dataflow:
    """A dataflow by its name, or itself.

    Raises:
        UsageError: no known dataflow has the name.
    """
    from fusecheck.dataflow import dataflow

    return dataflow(flow) if isinstance(flow, str) else replace(flow)
