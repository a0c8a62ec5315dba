"""Operands that make the order of additions visible in an output, and what is read off that output.

For the squares, a row just below the end of float32: squares of one large element and a few that fill it up are whole
multiples of its last place, 2^104, so that they add up to the largest finite number in any order. Two elements have a
square of 25/64 of that place. Where they are added to each other first, the sum rounds up, and ends at infinity: the
root's reciprocal is 0, and so is the norm. Where either meets the large element first, it is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fusecheck.case import returned
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import RankInputs, RankOutputs
from fusecheck.invariance.expert_rows import of_addends
from fusecheck.invariance.orders import LEVELS, NOTHING, Mask
from fusecheck.invariance.squares import NO, UNCLEAR, YES
from fusecheck.invariance.trees import Question
from fusecheck.operations import Collective
from fusecheck.problem import Problem
from fusecheck.quantisers.known import quantiser

LARGE = 15 * 2.0**60
"""Its square is within an eighth of 2^128; no element has more than four bits, so squares are exact in bf16 too."""

FILLERS = (11 * 2.0**59, 13 * 2.0**56, 9 * 2.0**55, 13 * 2.0**53, 5 * 2.0**52, 2.0**52, 2.0**52)
"""With them the squares add up to (2^24 - 1) * 2^104; the first one moves a part of a unit by 1/16 at most."""

PART, WHOLE = 5 * 2.0**49, 2.0**52
"""Squares of 25/64 of a unit, and of one."""

FEWEST = 64
"""Elements of a row that has room for all of it."""


def unreadable(problem: Problem) -> str:
    """Why the tree of the squares cannot be asked about; empty where it can."""
    if not problem.op.norm:
        return "the operation has no norm"
    if not (problem.op.returns_norm or problem.op.returns_quant):
        return "the operation returns neither the norm nor its codes"
    if problem.dtype != "bf16":
        return f"squares of {problem.dtype} do not reach the end of float32; give --dtype bf16"
    if problem.hidden < FEWEST:
        return f"hidden={problem.hidden} is below {FEWEST}"
    return ""


def no_sum(problem: Problem) -> str:
    """Why the order of the ranks cannot be asked about; empty where it can."""
    if problem.op.collective is Collective.NONE or problem.world_size == 1:
        return "there is one addend"
    if not {"total", "residual"} & set(problem.op.returns):
        return "the operation returns neither the sum nor the stream"
    return ""


def squares_inputs(problem: Problem, questions: Sequence[Question], rank: int, device: torch.device) -> RankInputs:
    """What a rank receives in a call with a row for each question; see `squares.read` for the special ones."""
    hidden = problem.hidden
    asked = np.array(questions, dtype=np.int64).reshape(-1, 3)
    large, parts = asked[:, :1], asked[:, 1:]
    free = (large + np.arange(1, 11) * (hidden // 11)) % hidden
    taken = (free[:, :, None] == parts[:, None, :]).any(-1)
    fillers = np.take_along_axis(free, taken.argsort(axis=1, kind="stable"), 1)[:, : len(FILLERS)]
    # What is not asked about goes where the large element is, which has its value already.
    columns = np.concatenate((large, fillers, np.where(parts < 0, large, parts)), axis=1)
    values = np.full(columns.shape, LARGE, dtype=np.float32)
    values[:, 1 : 1 + len(FILLERS)] = FILLERS
    values[:, -2:] = np.where(parts < 0, LARGE, np.where(parts[:, :1] == parts[:, 1:], WHOLE, PART))
    stream = torch.zeros(len(asked), hidden, dtype=problem.format.dtype, device=device)
    where, what = torch.from_numpy(columns).to(device), torch.from_numpy(values).to(device, stream.dtype)
    stream.scatter_(1, where, what)
    zeros = torch.zeros_like(stream)
    if problem.op.residual:
        return _operands(problem, zeros, stream)
    return _operands(problem, stream if rank == 0 or problem.op.collective is Collective.NONE else zeros, zeros)


def squares_answers(outputs: RankOutputs, problem: Problem, questions: Sequence[Question]) -> list[int]:
    """What is told by what a call with these questions returned: `NO`, `YES` or `UNCLEAR` each."""
    read = outputs.norm
    if read is None:
        read = returned.named(returned.decoded(outputs, problem))["quant"].view(torch.uint8)
    index = torch.tensor([large for large, _, _ in questions])[:, None].to(read.device)
    seen = read.gather(1, index)[:, 0].cpu()  # the one number of a row that tells; the others stay where they are
    if outputs.norm is not None:
        unclear, zero = ~seen.isfinite(), seen == 0
    else:
        magnitude = seen & (0x7 if quantiser(problem.op.quantiser).element.per_byte > 1 else 0x7F)
        unclear, zero = magnitude == 0x7F, magnitude == 0
    return [UNCLEAR if bad else YES if gone else NO for bad, gone in zip(unclear.tolist(), zero.tolist(), strict=True)]


def units_inputs(problem: Problem, mask: Mask, rank: int, device: torch.device) -> RankInputs:
    """What a rank brings where a pair of ranks brings a large addend and its negative, and every other rank a unit."""
    large, unit = LEVELS[problem.dtype][mask.level]
    value = large if rank == mask.pair[0] else -large if rank == mask.pair[1] else unit
    addend = torch.full((mask.tokens, problem.hidden), value, dtype=problem.format.dtype, device=device)
    return _operands(problem, addend, torch.zeros_like(addend))


def units_left(outputs: RankOutputs, problem: Problem, mask: Mask, factor: float) -> bytes:
    """How many units each element of the mask's rows holds, a byte each, [rows, hidden]; `NOTHING` for no such number.

    Args:
        outputs: of a call with `units_inputs`.
        problem: of the call.
        mask: of the call.
        factor: by which experts multiply an addend.
    """
    summed = outputs.total if outputs.total is not None else outputs.residual
    left: Tensor = summed[list(mask.rows)].double() / (LEVELS[problem.dtype][mask.level][1] * factor)
    whole = (left >= 0) & (left <= problem.world_size) & (left == left.round())
    return bytes(torch.where(whole, left, NOTHING).to(torch.uint8).cpu().contiguous().numpy().tobytes())


def _operands(problem: Problem, addend: Tensor, residual: Tensor) -> RankInputs:
    gamma = torch.ones(problem.hidden, dtype=addend.dtype, device=addend.device)
    scale = Inputs(problem, addend.device).scale()
    made = RankInputs(addend, residual, gamma, scale, problem.eps, problem.weight_bias, problem.layout)
    return replace(made, experts=of_addends(problem, addend)) if problem.op.has_experts else made
