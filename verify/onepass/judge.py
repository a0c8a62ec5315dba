"""The host's half: which cases one pass can judge, its launch, and what its counts mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusecheck.case.calls import Step
from fusecheck.dataflow import Dataflow
from fusecheck.inputs.families import FAMILIES
from fusecheck.numerics import nominal
from fusecheck.onepass.arena import FlatArena
from fusecheck.onepass.operands import Made, power_of_two
from fusecheck.operations import STATIC_OPS, Operation
from fusecheck.problem import Problem
from fusecheck.verdict import Stage, Tally, raw

WIDEST = 16384
"""Columns that one program's registers hold."""

_NAN_CODE = {"nan": 0x7F, "+max": 0x7E, "-max": 0xFE}


def takes(flow: Dataflow, op: Operation, hidden: int) -> bool:
    """Whether the kernel forms this dataflow's nominal values of an operation."""
    rounded = (flow.round_sum or flow.accumulate == "native") and flow.sum_flushes
    rounded = rounded and flow.accumulate != "exact" and flow.sum_rounding == "nearest"
    squared = not (flow.round_squares or flow.scaled_squares)
    staged = flow.norm_reads_rounded and flow.round_norm and squared and not flow.round_normed
    today = op in STATIC_OPS and flow.statistics is None
    return today and rounded and staged and flow.saturate and hidden <= WIDEST


def factor(flow: Dataflow, scale: float) -> float:
    """What the norm is divided by, or multiplied with, before the cast: a float32 value."""
    single = float(np.float32(scale))
    return single if flow.scaling == "divide" else nominal.reciprocal(single, flow)


def constants(flow: Dataflow, dtype: torch.dtype, hidden: int, ranks: int) -> dict[str, Any]:
    """The arguments for which a kernel of its own is compiled."""
    block = power_of_two(hidden)
    return {
        "BLOCK": block,
        "RANKS": ranks,
        "WIDE_SUM": flow.accumulate == "fp32",
        "FLUSH": flow.flush_subnormals and dtype == torch.bfloat16,
        "HALF": dtype == torch.float16,
        "DIVIDE": flow.scaling == "divide",
        "NAN_CODE": _NAN_CODE[flow.code_of_nan],
        "num_warps": max(4, min(16, block // 512)),
    }


def launch(step: Step, made: Made, share: range, counts: Tensor) -> None:
    """Count over all rows of a call that was launched on the same stream.

    Args:
        step: the call; its outputs may not have been computed yet.
        made: its operands, which no kernel under test has seen.
        share: the rows that this rank judges.
        counts: `kernels.SLOTS` int64 zeros, added to.
    """
    from fusecheck.onepass import kernels

    outputs, problem, flow = step.outputs, step.problem, step.flow
    assert outputs is not None
    absent = outputs.residual
    norm = outputs.norm if outputs.norm is not None else absent
    quant = outputs.quant if outputs.quant is not None else absent
    scale = np.float32(problem.scale)
    run: Any = kernels.judge
    run[(problem.tokens,)](
        counts,
        raw(made.partials),
        raw(made.inputs.partial),
        raw(made.inputs.residual),
        raw(made.inputs.gamma),
        raw(step.guarded.partial),
        raw(step.guarded.residual),
        raw(step.guarded.gamma),
        step.guarded.scale.view(torch.int32),
        raw(outputs.residual),
        raw(norm),
        raw(quant),
        outputs.residual.view(torch.int64),
        norm.view(torch.int64),
        quant.view(torch.int64),
        share.start,
        len(share),
        problem.hidden,
        problem.eps,
        problem.weight_bias,
        factor(flow, problem.scale),
        int(scale.view(np.int32)),
        int(outputs.norm is not None),
        int(outputs.quant is not None),
        int(FAMILIES[problem.family].finite),
        **constants(flow, problem.format.dtype, problem.hidden, problem.world_size),
    )
    if isinstance(step.arena, FlatArena):
        counts[kernels.TRAMPLED].add_(step.arena.canaries_lost())


def in_doubt(counts: Sequence[int]) -> bool:
    """Whether the eager judge must look: something changed, unwritten, trampled, or not shown to be inside."""
    from fusecheck.onepass import kernels

    slots = ("CHANGED", "UNWRITTEN", "RESIDUAL", "NORM_OUT", "QUANT_OUT", "TRAMPLED")
    return any(counts[getattr(kernels, slot)] for slot in slots)


def tallies(counts: Sequence[int], op: Operation, elements: int) -> list[Tally]:
    """The tallies of a case that is not in doubt, with so many elements in each output of this rank's share."""
    from fusecheck.onepass import kernels

    if not elements:
        return []
    found = [Tally(Stage.RESIDUAL, elements)]
    if op.returns_norm:
        found.append(Tally(Stage.NORM, elements, counts[kernels.NORM_OFF]))
    if op.returns_quant:
        found.append(Tally(Stage.QUANT, elements, counts[kernels.QUANT_OFF]))
    return found


def digests(counts: Sequence[int], problem: Problem) -> dict[str, int]:
    """The digests of the outputs, as `digest.whole` forms them."""
    from fusecheck.onepass import kernels

    names = {"residual": True, "norm": problem.op.returns_norm, "quant": problem.op.returns_quant}
    return {name: counts[kernels.DIGESTS + place] for place, (name, there) in enumerate(names.items()) if there}
