"""Try to refute the bounds of the sums over ranks: random addends, random legal sums, every one inside every time.

What is compared is the sum itself, before the residual is added, for each accumulation, order and rounding. The same
sums are judged again by bounds that are broken on purpose, each of which must be caught.

    python -m fusecheck.property_tests.suite.refutation --format sums --checks 1e8
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import torch

from fusecheck.declaration import Accumulate, Dataflow, Order, SumRounding
from fusecheck.numerics import enclosure, sums
from fusecheck.oracle import Operands
from fusecheck.property_tests.suite import legal_kernels, refuting
from fusecheck.property_tests.suite.legal_kernels import Floats, Generator, Inputs
from fusecheck.property_tests.suite.refuting import Tallies
from fusecheck.stages.residual import Residual

ACCUMULATES: tuple[Accumulate, ...] = ("fp32", "native", "exact")
ORDERS: tuple[Order, ...] = ("rank", "any")
ROUNDINGS: tuple[SumRounding, ...] = ("nearest", "truncate", "either")
FLOWS = [
    Dataflow(f"{accumulate} {order} {rounding}{' kept' * kept}", "", accumulate, rounding, order, round_sum=not kept)
    for accumulate, order, rounding, kept in itertools.product(ACCUMULATES, ORDERS, ROUNDINGS, (False, True))
    if not (accumulate == "native" and kept) and not (accumulate == "exact" and order == "rank")
]
"""Every way to sum that can be declared; what is `kept` goes on in float32."""
SPREADS = {False: (0, 0, 6, 16, 60), True: (16, 18, 20, 60)}
"""Binades over which the addends of one sum are spread; wide ones where sums are kept, for few others are inexact."""


@dataclass
class Tally(refuting.Tally):
    """Sums judged by one bound; `open` are those with more than one admissible value."""

    open: int = 0

    def rest(self) -> dict[str, str]:
        return {">1 value": f"{self.open / self.elements:.1e}"}


def draw(rng: Generator, flow: Dataflow, elements: int) -> Inputs:
    """Addends of 1 to 8 ranks, [ranks, 1, elements]: half without cancellation, half with odd significands."""
    ranks, spread = int(rng.choice([1, 2, 3, 3, 3, 4, 6, 8])), int(rng.choice(SPREADS[not flow.round_sum]))
    native = torch.bfloat16 if spread > 20 or rng.random() < 0.6 else torch.float16
    count = elements if spread <= 20 else max(1, elements // 64)
    shape, column = (ranks, 1, count), np.arange(count)
    exponent = rng.integers(-spread // 2, spread // 2 + 1, shape)
    signs = np.where(column % 2, rng.choice([-1.0, 1.0], shape), rng.choice([-1.0, 1.0], count))
    addends = torch.from_numpy(rng.uniform(1, 2, shape) * np.exp2(exponent) * signs).to(native)
    odd = (addends.view(torch.int16) | torch.from_numpy(column % 4 > 1).to(torch.int16)).view(native)
    none = np.zeros((1, count), np.float32)
    return Inputs(odd.float().numpy(), none, none[0], 0.0, 1e-6, 1.0, native)


def judge(flow: Dataflow, inputs: Inputs, got: Floats, tally: Tally) -> None:
    """Add what one bound says of sums, [1, elements]."""
    partials = [torch.from_numpy(partial).to(inputs.native) for partial in inputs.partials]
    zeros = torch.zeros_like(partials[0])
    stage = Residual(flow, Operands(partials, zeros, zeros[0], 1.0, 1e-6))
    if stage.order_known:
        low = high = sums.sum_partials(partials, flow, flushing=False).double()
    else:
        low, high = enclosure.sum_ends(torch.stack(partials).double(), flow, stage.operands.format)
    value = torch.from_numpy(got).double()
    tally.elements += value.numel()
    tally.violations["outside"] += int((~((low <= value) & (value <= high))).sum())
    tally.open += int((low < high).sum())


def broken(flow: Dataflow) -> Iterator[tuple[str, Dataflow, float]]:
    """Bounds that a flow's sums must leave: their names, what they are told, and what truncation is granted.

    A wider bound is no broken one; and a rounding to native hides what distinguishes sums in float32.
    """
    exact, kept, point = flow.accumulate == "exact", not flow.round_sum, flow.order_free
    if flow.sum_rounding == "truncate":
        yield "rounding to nearest declared", replace(flow, sum_rounding="nearest"), enclosure.TRUNCATION
        if flow.accumulate == "native" and flow.order == "any":
            yield "truncation errs like rounding", flow, 1.0
    elif point:
        yield "truncation declared", replace(flow, sum_rounding="truncate"), enclosure.TRUNCATION
    if kept and flow.sum_rounding != "either":
        if exact:
            yield "float32 declared", replace(flow, accumulate="fp32", order="rank"), enclosure.TRUNCATION
        elif not point:
            yield "exact declared", replace(flow, accumulate="exact"), enclosure.TRUNCATION


def refute(checks: int, elements: int, seed: int) -> Iterator[Tallies[Tally]]:
    """Judge random sums of every flow in turn; yields the tallies so far."""
    rng, tallies = np.random.default_rng(seed), Tallies[Tally]()
    while tallies.elements < checks:
        for flow in FLOWS:
            inputs = draw(rng, flow, elements)
            with np.errstate(over="ignore"):
                got = legal_kernels.sum_partials(inputs, flow, rng)
            judge(flow, inputs, got, tallies.sound.setdefault(flow.name, Tally()))
            for name, told, granted in broken(flow):
                with mock.patch.object(enclosure, "TRUNCATION", granted):
                    judge(told, inputs, got, tallies.broken.setdefault(f"{flow.name}: {name}", Tally()))
        yield tallies
