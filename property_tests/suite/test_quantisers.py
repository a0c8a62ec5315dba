"""Quantisers against exact rationals: the same scales, the same codes, and the nominal is always admissible."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from fusecheck.errors import UsageError
from fusecheck.property_tests.suite import rational_quantisers as rational
from fusecheck.property_tests.suite.quantiser_cases import IDS, KNOWN, MAKE_SCALES, SPECS, draw_given, draw_groups
from fusecheck.quantflow import QuantFlow
from fusecheck.quantisers.known import QUANTISERS, quantiser
from fusecheck.quantisers.quantiser import Quantiser
from fusecheck.quantisers.scaled import Scaled, _scaled_exactly

GROUPS, SIZE = 20, 8
NATIVES = (torch.bfloat16, torch.float16)
U = rational.U


class Case:
    """Groups of one quantiser under one flow, and what both oracles say about them."""

    def __init__(self, name: str, flow: QuantFlow, native: torch.dtype, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.flow, self.spec = flow, SPECS[name]
        self.quantiser = _resized(name)
        self.norm = draw_groups(rng, GROUPS, SIZE, native, self.spec)
        self.given = draw_given(rng, float(self.norm.abs().max()), flow)
        self.wide = self.norm.double()
        self.scales = self.quantiser.scales(self.norm, flow, self.given)
        if flow.scale_rule == "given":
            self.scales = self.scales.expand(GROUPS, 1)
        self.ends = self.quantiser.scale_ends((self.wide, self.wide), flow, self.given)

    def group(self, index: int) -> list[Fraction]:
        return [Fraction(y) for y in self.wide[index].tolist()]


def _resized(name: str) -> Quantiser:
    """With groups of 8, whose rationals are quick."""
    return QUANTISERS[name] if name.endswith("-fp8") and "group" not in name else _SMALL[name]


_SMALL = {name: replace(each, group=SIZE) for name, each in QUANTISERS.items() if isinstance(each, Scaled)}


def _exact(x: Tensor) -> list[Fraction]:
    return [Fraction(v) for v in x.reshape(-1).tolist()]


@pytest.mark.parametrize("native", NATIVES)
@pytest.mark.parametrize(("name", "flow"), MAKE_SCALES)
def test_scales_are_those_that_exact_rationals_allow(name: str, flow: QuantFlow, native: torch.dtype) -> None:
    case = Case(name, flow, native, seed=1)
    low, high = (_exact(end) for end in case.ends)
    for i, nominal in enumerate(_exact(case.scales)):
        least, most = rational.scale_ends(case.group(i), case.spec, flow, Fraction(case.given))
        assert low[i] <= nominal <= high[i]
        if flow.scale_rule == "rcp":  # ours grants 2u around the rounded reciprocal, at most a step more
            assert low[i] <= least <= most <= high[i]
            assert high[i] - low[i] <= most - least + 1
        else:
            assert (low[i], high[i]) == (least, most), (i, case.group(i))


@pytest.mark.parametrize("native", NATIVES)
@pytest.mark.parametrize(("name", "flow"), KNOWN, ids=IDS)
def test_codes_are_those_that_exact_rationals_allow_for_the_scale_as_stored(
    name: str, flow: QuantFlow, native: torch.dtype
) -> None:
    case = Case(name, flow, native, seed=2)
    stored = case.scales.clone()
    if flow.scale_rule != "given" and stored.dtype is torch.uint8:
        stored[::3] = torch.where(stored[::3] > 2, stored[::3] - 1, stored[::3])  # a wrong scale has its own codes
    codes = case.quantiser.element.ordinal(case.quantiser.codes(case.norm, stored, flow, case.given))
    ends = case.quantiser.quotient_ends((case.wide, case.wide), stored, flow, case.given)
    code_ends = case.quantiser.code_ends((case.wide, case.wide), stored, flow, case.given)
    nominal = case.quantiser.quotients(case.norm, stored, flow, case.given).double()
    assert bool(((ends[0] <= nominal) & (nominal <= ends[1]) | nominal.isnan()).all())
    for i in range(GROUPS):
        scale, group = Fraction(float(stored[i, 0])), case.group(i)
        if scale == 0 and case.spec.stored == "fp32":
            continue  # 0 / 0
        amax = rational.amax_of(group, flow)
        for j, y in enumerate(group):
            least, most = rational.quotient_ends(y, scale, case.spec, flow, Fraction(case.given), amax)
            _assert_close(least, most, Fraction(float(ends[0][i, j])), Fraction(float(ends[1][i, j])))
            first, last = (rational.ordinal(end, case.spec.element, flow.ties) for end in (least, most))
            assert code_ends[0][i, j] <= first <= last <= code_ends[1][i, j]
            assert code_ends[0][i, j] <= codes[i, j] <= code_ends[1][i, j]


def _assert_close(least: Fraction, most: Fraction, low: Fraction, high: Fraction) -> None:
    """Ours contain theirs, and by no more than two nested reciprocals (2u each) with their roundings, or underflow."""
    slack = 8 * U * max(abs(least), abs(most)) + Fraction(1, 1 << 120)
    assert least - slack <= low <= least
    assert most <= high <= most + slack


@pytest.mark.parametrize("native", NATIVES)
@pytest.mark.parametrize(("name", "flow"), [(n, f) for n, f in MAKE_SCALES if SPECS[n].stored == "ue8m0"])
def test_codes_looked_up_are_those_that_are_formed_one_by_one(name: str, flow: QuantFlow, native: torch.dtype) -> None:
    norm = draw_groups(np.random.default_rng(3), 2048, 32, native, SPECS[name])
    largest = norm.float().abs().amax(1)
    norm = norm[(largest > 2.0**-5) & (largest < 2.0**64)]  # moderate factors
    norm = torch.cat([norm, -norm, norm, -norm])[:2048]
    norm[0, :3] = torch.tensor([torch.nan if flow.amax_nan == "drop" else 1.0, -0.0, 2.0**-20])
    quantiser = replace(_SMALL[name], group=32)
    stored = quantiser.scales(norm, flow)
    assert _scaled_exactly(norm, quantiser._factor(stored, flow, 1.0, None), flow) is not None
    parts = [quantiser.codes(norm[i : i + 64], stored[i : i + 64], flow) for i in range(0, 2048, 64)]
    assert torch.equal(quantiser.codes(norm, stored, flow), torch.cat(parts))


def test_a_name_may_carry_its_group() -> None:
    assert quantiser("group-fp8-64").group == 64
    assert quantiser("group-fp8").group == 128
    with pytest.raises(UsageError, match="expected one of: none, static-fp8"):
        quantiser("int8")


def test_a_group_that_does_not_divide_the_row_is_refused() -> None:
    with pytest.raises(UsageError, match="hidden=100, expected a multiple of mxfp8's group of 32"):
        QUANTISERS["mxfp8"].groups(100)
    with pytest.raises(UsageError, match="layout='8x4', expected one that mxfp8 has: 128x4, linear"):
        QUANTISERS["mxfp8"].layout(4, 64, QuantFlow(), "8x4")
