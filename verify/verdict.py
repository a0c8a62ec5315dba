"""The verdict on rows of outputs: the stages of an operation in order, each judged from what was observed before."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusecheck.dataflow import Dataflow
from fusecheck.formats.binary import Format
from fusecheck.interface import RankOutputs
from fusecheck.numerics import enclosure
from fusecheck.oracle import Oracle, Where
from fusecheck.stages.judgement import Element, Stage, Tally, differing, judge, raw

__all__ = [
    "Element",
    "Stage",
    "Tally",
    "admissible_codes",
    "differing",
    "judge_rows",
    "off_nominal_budget",
    "raw",
]


def judge_rows(oracle: Oracle, outputs: RankOutputs, first_row: int) -> list[Tally]:
    """Judge every stage of some rows that left an output, each from what was observed before it.

    Args:
        oracle: of exactly these rows.
        outputs: the same rows of one rank's outputs; codes one a byte, scales [rows, groups].
        first_row: their place in the whole, for the report.
    """
    stream = _stream(oracle, outputs)
    tallies = [] if stream is None else judge(oracle.stream, stream, first_row)
    if outputs.norm is not None:
        tallies += judge(oracle.after_residual(stream), outputs.norm, first_row)
    special = None
    if outputs.scale is not None:
        scales = oracle.scales(stream, outputs.norm)
        special = scales.special if bool(scales.special.any()) else None
        tallies += judge(scales, outputs.scale, first_row, special)
        special = None if special is None else special.repeat_interleave(scales.size, dim=-1)
    if outputs.quant is not None:
        codes = oracle.code_stage(stream, outputs.norm, outputs.scale)
        tallies += judge(codes, outputs.quant, first_row, special)
    return tallies


def admissible_codes(oracle: Oracle, outputs: RankOutputs) -> tuple[int, int]:
    """Over all elements of these rows: the number of admissible codes in total, given the scales, and of elements."""
    assert outputs.quant is not None
    lo, hi = oracle.code_stage(_stream(oracle, outputs), outputs.norm, outputs.scale).ends(_everywhere(outputs.quant))
    return int((hi - lo + 1).clamp(min=1).sum()), outputs.quant.numel()


def _stream(oracle: Oracle, outputs: RankOutputs) -> Tensor | None:
    """What was observed of what the norm reads."""
    stream: Tensor | None = outputs.residual if oracle.operands.op.residual else outputs.total
    return stream


def _everywhere(x: Tensor) -> Where:
    row = torch.arange(x.shape[0], device=x.device).repeat_interleave(x.shape[1])
    return row, torch.arange(x.shape[1], device=x.device).repeat(x.shape[0])


FALSE_ALARM = 1e-9
"""The chance that a right kernel's call exceeds its budget of off-nominal norms."""


def off_nominal_share(flow: Dataflow, fmt: Format, hidden: int) -> float | None:
    """The chance that a right kernel's norm differs from the nominal, at most, for spread significands.

    Of values whose place between two rounding boundaries is spread evenly, a relative shift d takes the share
    2^(p-1) E[m] d over a boundary, where m is the significand, below 2. The largest legal d is what L4 to L6 allow
    the kernel (L5 enters halved) and what the nominal itself may be off: 2.5 u in its root, 2 u in its products. A
    norm that is rounded twice may change twice. None where the norm reads what is no single value. The derivation is
    on the page of the criterion, `verify/README.md`.
    """
    observed = flow.norm_reads_rounded and flow.statistics != "unrounded"
    if not (observed or (flow.order_free and flow.sum_rounding != "either")):
        return None
    root = (enclosure.kappa(flow, hidden) + enclosure.mean_error(flow, hidden)) / 2 + 0.5 * enclosure.U
    shift = root + enclosure.RSQRT + 2.01 * enclosure.U + 4.5 * enclosure.U
    return min(1.0, shift * 2.0**fmt.precision * (2 if flow.round_normed else 1))


def off_nominal_budget(share: float, elements: int) -> float:
    """How many of so many norms may differ from the nominal: more do in one call of `1 / FALSE_ALARM`.

    Bernstein's inequality for independent events of mean m in all: P(count >= m + t) <= exp(-t^2 / 2(m + t/3)).
    """
    mean, nats = share * elements, -math.log(FALSE_ALARM)
    return mean + nats / 3 + math.sqrt(nats**2 / 9 + 2 * nats * mean)
