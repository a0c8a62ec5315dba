"""E2M1, E4M3 with other ties, and UE8M0: exhausted against exact rationals and against ml_dtypes."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import get_args

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from fusecheck.formats import ue8m0
from fusecheck.formats.element import E2M1, E4M3, Element
from fusecheck.property_tests.suite import rational_quantisers as rational
from fusecheck.quantflow import Ties

ELEMENTS = (E4M3, E2M1)
TIES = get_args(Ties)
THEIRS = {"e4m3": ml_dtypes.float8_e4m3fn, "e2m1": ml_dtypes.float4_e2m1fn}


def _inputs(element: Element) -> Tensor:
    """All finite bf16 and fp16, and every midpoint with its float32 neighbours, float32."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    middles = torch.tensor((*element.midpoints, *element.values[: element.largest_code + 1]), dtype=torch.float32)
    beside = [torch.nextafter(middles, torch.tensor(way)) for way in (torch.inf, -torch.inf)]
    near = torch.cat((middles, *beside))
    every = torch.cat((bits.view(torch.bfloat16).float(), bits.view(torch.float16).float(), near, -near))
    return every[every.isfinite()]


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_each_code_has_the_value_that_the_standard_defines(element: Element) -> None:
    magnitudes = rational.ELEMENTS[element.name]
    for code in range(2 * element.sign):
        place = code & (element.sign - 1)
        if place == element.nan:
            assert math.isnan(element.value(code))
        else:
            assert Fraction(element.value(code)) == magnitudes[place] * (-1 if code & element.sign else 1)
    assert element.largest == float(magnitudes[-1])
    assert element.overflow_tie == (464 if element is E4M3 else 7)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_both_casts_round_once_to_the_nearest_code(element: Element, ties: Ties) -> None:
    x = _inputs(element)
    codes = element.encode_float32(x, ties=ties)
    assert torch.equal(codes, element.encode(x.double(), ties=ties))
    some = torch.cat((x[:131072:97], x[131072 - 2048 :]))
    got = element.ordinal(element.encode_float32(some, ties=ties)).tolist()
    assert got == [rational.ordinal(Fraction(v), element.name, ties) for v in some.tolist()]


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_the_casts_and_the_tables_are_those_of_ml_dtypes(element: Element) -> None:
    x = _inputs(element)
    theirs = x.clamp(-element.largest, element.largest).numpy().astype(THEIRS[element.name])
    assert np.array_equal(element.encode_float32(x).numpy(), theirs.view(np.uint8))
    every = np.arange(2 * element.sign, dtype=np.uint8)
    values = every.view(THEIRS[element.name]).astype(np.float64)
    assert np.array_equal(element.decode(torch.from_numpy(every)).numpy(), values, equal_nan=True)


def test_ties_of_e2m1_differ_by_their_rule_alone() -> None:
    middles = torch.tensor(E2M1.midpoints)
    assert E2M1.encode_float32(middles, ties="even").tolist() == [0, 2, 2, 4, 4, 6, 6, 7]
    assert E2M1.encode_float32(middles, ties="away").tolist() == [1, 2, 3, 4, 5, 6, 7, 7]
    assert E2M1.encode_float32(middles, ties="toward_zero").tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    just_below = torch.nextafter(torch.tensor(0.25), torch.tensor(0.0))
    assert E2M1.encode_float32(just_below, ties="away").item() == 0


def test_a_format_without_a_nan_makes_it_a_number() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf])
    assert E2M1.encode_float32(x).tolist() == [7, 7, 15]
    assert E2M1.encode_float32(x, code_of_nan="-max").tolist() == [15, 7, 15]
    assert not bool(E2M1.is_nan(torch.arange(16, dtype=torch.uint8)).any())


def test_two_codes_of_e2m1_share_a_byte_and_the_even_one_is_low() -> None:
    codes = torch.randint(0, 16, (3, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    stored = E2M1.pack(codes)
    assert stored.shape == (3, 4)
    assert torch.equal(stored[:, 0] & 15, codes[:, 0])
    assert torch.equal(E2M1.unpack(stored), codes)
    assert torch.equal(E4M3.unpack(E4M3.pack(codes)), codes)


def test_every_exponent_byte_has_the_value_of_ml_dtypes() -> None:
    every = np.arange(256, dtype=np.uint8)
    theirs = every.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    assert np.array_equal(ue8m0.decode(torch.from_numpy(every)).numpy(), theirs, equal_nan=True)
    assert theirs[0] == 2.0**-127


def test_the_ceiling_is_the_least_power_of_two_that_is_not_below() -> None:
    powers = torch.ldexp(torch.ones(256), torch.arange(-127, 129, dtype=torch.int32))[:-1]
    above = torch.nextafter(powers, torch.tensor(torch.inf))
    below = torch.nextafter(powers, torch.tensor(0.0))
    expected = torch.arange(255, dtype=torch.int32)
    assert torch.equal(ue8m0.ceil(powers), expected)
    assert torch.equal(ue8m0.ceil(above), expected + 1)
    assert torch.equal(ue8m0.ceil(below), expected)
    assert ue8m0.ceil(torch.tensor([0.0, 1e-45, math.inf, math.nan])).tolist() == [0, 0, 255, 255]


def test_the_only_amax_whose_exponent_hangs_on_the_quotient_is_7_times_a_power_of_two() -> None:
    """G3, over every normal positive bf16: within 2 ulp two exponents at exactly 7 * 2^j, and none differs exactly."""
    bits = torch.arange(0x0080, 0x7F80, dtype=torch.int32) << 16
    a = bits.view(torch.float32).double()
    a = a[a / 448 > 2.0**-120]
    divided, multiplied = ((q.float()) for q in (a / 448, a * float(np.float32(1) / np.float32(448))))
    assert torch.equal(ue8m0.ceil(divided), ue8m0.ceil(multiplied))
    low, high = (ue8m0.ceil((a / 448 * (1 + side * 5 * 2.0**-24)).float()) for side in (-1, 1))
    assert torch.equal(low != high, torch.frexp(a)[0] == 0.875)
    assert int((low != high).sum()) == 239
