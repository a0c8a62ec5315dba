"""The verdict on rows of outputs: the stages of an operation in order, each judged from what was observed before."""

from __future__ import annotations

import math

import torch

from fusecheck.dataflow import Dataflow
from fusecheck.formats.binary import Format
from fusecheck.interface import RankOutputs
from fusecheck.numerics import enclosure
from fusecheck.oracle import Oracle
from fusecheck.stages.judgement import Element, Stage, Tally, differing, judge, raw

__all__ = ["Element", "Stage", "Tally", "admissible_codes", "differing", "judge_rows", "off_nominal_budget", "raw"]


def judge_rows(oracle: Oracle, outputs: RankOutputs, first_row: int) -> list[Tally]:
    """Judge the residual, norm and quant stages of some rows.

    Args:
        oracle: of exactly these rows.
        outputs: the same rows of one rank's outputs.
        first_row: their place in the whole, for the report.
    """
    residual = outputs.residual
    tallies = [judge(oracle.stream, residual, first_row)]
    if outputs.norm is not None:
        tallies.append(judge(oracle.after_residual(residual), outputs.norm, first_row))
    if outputs.quant is not None:
        tallies.append(judge(oracle.after_norm(residual, outputs.norm), outputs.quant, first_row))
    return tallies


def admissible_codes(oracle: Oracle, outputs: RankOutputs) -> tuple[int, int]:
    """Over all elements of these rows: the number of admissible codes in total, and of elements."""
    rows, hidden = outputs.residual.shape
    device = outputs.residual.device
    row = torch.arange(rows, device=device).repeat_interleave(hidden)
    where = (row, torch.arange(hidden, device=device).repeat(rows))
    lo, hi = oracle.code_ends(outputs.residual, outputs.norm, where)
    return int((hi - lo + 1).clamp(min=1).sum()), rows * hidden


def off_nominal_budget(flow: Dataflow, fmt: Format, hidden: int, elements: int) -> float:
    """How many norms of spread significands may differ from the nominal.

    A relative shift d moves 2^(p-1) / ln 2 * d of log-uniform significands over a rounding boundary. The largest
    legal d is that of L4 to L6; the nominal's own is at most 2.5 u. A quarter is added since Gaussian data are
    only nearly log-uniform, and six standard deviations. The quotient of a twice-rounded norm may flip twice.
    """
    shift = enclosure.kappa(flow, hidden) / 2 + (1.5 + 5 + 2.01 + 2.5) * enclosure.U
    share = 1.25 * shift * 2.0 ** (fmt.precision - 1) / math.log(2) * (2 if flow.round_normed else 1)
    return share * elements + 6 * math.sqrt(share * elements) + 6
