"""The E4M3 table and its one-rounding cast, exhausted against two computations that share no code with it."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fusecheck.formats.element import E4M3

Codes = npt.NDArray[np.uint8]
Float64 = npt.NDArray[np.float64]


def _exact_values() -> list[Fraction]:
    """The 127 non-negative values by the OCP definition: 1-4-3, bias 7, subnormals, the last code not a number."""
    subnormal = [Fraction(mantissa, 8) * Fraction(2) ** (1 - 7) for mantissa in range(8)]
    normal = [
        (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)
        for exponent in range(1, 16)
        for mantissa in range(8)
    ]
    return [*subnormal, *normal[:-1]]


EXACT = _exact_values()
OVERFLOW = Fraction(480)
"""What the last mantissa would stand for; the tie with 448 is at 464."""
TURNS = [(low + high) / 2 for low, high in zip(EXACT, [*EXACT[1:], OVERFLOW], strict=True)]
TURNS64 = np.array([float(turn) for turn in TURNS])


def _nearest(x: Fraction) -> int:
    """The magnitude code of a non-negative rational by exhaustive search; 127 beyond the overflow tie."""
    candidates = [*EXACT, OVERFLOW]
    best = min(abs(x - value) for value in candidates)
    winners = [code for code, value in enumerate(candidates) if abs(x - value) == best]
    if x > OVERFLOW:
        return 127
    return next((code for code in winners if code % 2 == 0), winners[0])


def _search(magnitude: Float64, turns: Float64) -> npt.NDArray[np.int64]:
    """Magnitude codes by binary search among the 127 turning points, ties to the even code."""
    below = np.searchsorted(turns, magnitude, side="left").astype(np.int64)
    tie = turns[np.minimum(below, 126)] == magnitude
    code: npt.NDArray[np.int64] = below + (tie & (below % 2 == 1))
    return code


def _finish(code: npt.NDArray[np.int64], negative: npt.NDArray[np.bool_], *, saturate: bool) -> Codes:
    code = np.minimum(code, 126) if saturate else code
    return np.where(negative, code | 0x80, code).astype(np.uint8)


def _encode(x: Float64, *, saturate: bool = True) -> Codes:
    codes: Codes = E4M3.encode(torch.from_numpy(x), saturate=saturate).numpy()
    return codes


def _bf16_values() -> Float64:
    """All 65,536, NaN and the infinities among them."""
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return bits.view(np.float32).astype(np.float64)


def _scales() -> list[float]:
    """More than 256 positive float32 scales: random, powers of two, tie scales (few-bit mantissas), amax/448."""
    rng = np.random.default_rng(20260822)
    random = (10.0 ** rng.uniform(-6, 4, 80)).astype(np.float32)
    powers = 2.0 ** np.arange(-40, 24, dtype=np.float32)
    mantissas, exponents = np.meshgrid(np.arange(3, 33, 2), np.array([-14, -9, -5, 0, 3]))
    ties = np.ldexp(mantissas.astype(np.float32), exponents).ravel()
    amax = (np.abs(rng.standard_normal(48)).astype(np.float32) * 8).astype(np.float32) / np.float32(448)
    extremes = np.array([2.0**-149, 2.0**-126, 1e-38, 3.4e38], np.float32)
    return [float(scale) for scale in np.concatenate([random, powers, ties, amax, extremes])]


def test_all_256_codes_have_the_value_that_the_standard_defines() -> None:
    for code in range(256):
        if code & 0x7F == 0x7F:
            assert math.isnan(E4M3.value(code))
            continue
        assert Fraction(E4M3.value(code)) == EXACT[code & 0x7F] * (-1 if code & 0x80 else 1)
    assert math.copysign(1, E4M3.value(0x80)) == -1
    assert EXACT[-1] == 448


def test_all_256_codes_survive_a_round_trip() -> None:
    codes = torch.arange(256, dtype=torch.int64).to(torch.uint8)
    again = E4M3.encode(E4M3.decode(codes))
    same = (again == codes) | (E4M3.is_nan(again) & E4M3.is_nan(codes))
    assert bool(same.all())
    assert int(E4M3.is_nan(codes).sum()) == 2


def test_the_framework_reads_the_same_values_from_the_same_codes() -> None:
    codes = torch.arange(256, dtype=torch.int64).to(torch.uint8)
    theirs = codes.view(torch.float8_e4m3fn).to(torch.float64)
    assert torch.equal(torch.nan_to_num(E4M3.decode(codes), nan=1e9), torch.nan_to_num(theirs, nan=1e9))


def test_the_midpoints_are_where_the_cast_turns() -> None:
    assert [Fraction(midpoint) for midpoint in E4M3.midpoints] == TURNS


@pytest.mark.parametrize("saturate", [True, False])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_values_and_midpoints_and_their_neighbours_round_to_the_nearest_code(precision: str, saturate: bool) -> None:
    kind = np.dtype(precision).type
    anchors = np.array([float(x) for x in [*EXACT, *TURNS, OVERFLOW]], kind)
    near = np.concatenate([anchors, np.nextafter(anchors, kind(np.inf)), np.nextafter(anchors, kind(-np.inf))])
    x = np.concatenate([near, -near]).astype(np.float64)
    expected = np.array([_nearest(abs(Fraction(float(v)))) for v in x])
    assert np.array_equal(_encode(x, saturate=saturate), _finish(expected, np.signbit(x), saturate=saturate))


def test_the_search_that_judges_the_cast_agrees_with_exact_rationals() -> None:
    rng = np.random.default_rng(1)
    x = np.concatenate([np.abs(rng.standard_normal(300)) * 10.0 ** rng.uniform(-4, 3, 300), TURNS64])
    assert _search(x, TURNS64).tolist() == [_nearest(Fraction(float(v))) for v in x]


def test_every_bf16_input_over_every_scale_is_the_exact_quotient_rounded_once() -> None:
    x = _bf16_values()
    number = ~np.isnan(x)
    scales = _scales()
    assert len(set(scales)) >= 256
    for scale in scales:
        # x / scale against a midpoint m is x against m * scale, and that product of 5 and 24 bits is exact.
        # No quotient of 8 by 24 bits lies so near a midpoint that its own rounding to float64 could reach it.
        code = _search(np.abs(x), TURNS64 * scale)
        for saturate in (True, False):
            expected = _finish(code, np.signbit(x), saturate=saturate)
            got = _encode(x / scale, saturate=saturate)
            assert np.array_equal(got[number], expected[number]), scale
            assert bool(np.all((got[~number] & 0x7F) == 0x7F)), scale


def test_every_bf16_input_times_every_reciprocal_is_rounded_once_from_the_float32_product() -> None:
    x = _bf16_values()
    x = x[np.isfinite(x)].astype(np.float32)
    for scale in _scales()[::4]:
        with np.errstate(over="ignore"):
            product = (x * (np.float32(1) / np.float32(scale))).astype(np.float64)
        product = product[~np.isnan(product)]
        expected = _finish(_search(np.abs(product), TURNS64), np.signbit(product), saturate=True)
        assert np.array_equal(_encode(product), expected), scale


def test_the_frameworks_cast_of_clamped_float32_is_the_same() -> None:
    x = torch.from_numpy(_bf16_values()).to(torch.float32)
    x = x[~x.isnan()] * 1.0009765625
    theirs = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(E4M3.encode(x.to(torch.float64)), theirs)


def test_float64_just_beside_a_midpoint_is_not_rounded_twice() -> None:
    above = TURNS64[:-1] * (1 + 2.0**-40)
    below = TURNS64[:-1] * (1 - 2.0**-40)
    assert _encode(above).tolist() == list(range(1, 127))
    assert _encode(below).tolist() == list(range(126))
    through_float32 = E4M3.encode(torch.from_numpy(above).to(torch.float32).to(torch.float64))
    assert int((through_float32.numpy() != _encode(above)).sum()) == 63  # what two roundings would do


@pytest.mark.parametrize(("x", "saturated"), [(464.0, 0x7E), (464.00003, 0x7E), (1e300, 0x7E), (math.inf, 0x7E)])
def test_overflow_saturates_or_becomes_nan_as_declared(x: float, saturated: int) -> None:
    pair = torch.tensor([x, -x], dtype=torch.float64)
    assert E4M3.encode(pair).tolist() == [saturated, saturated | 0x80]
    strict = E4M3.encode(pair, saturate=False)
    assert bool(E4M3.is_nan(strict).all()) is (x > 464)
    if x == 464.0:
        assert strict.tolist() == [0x7E, 0xFE]


@pytest.mark.parametrize("saturate", [True, False])
def test_nan_becomes_what_the_dataflow_declares(saturate: bool) -> None:
    x = torch.tensor([math.nan, -math.nan, 1.0], dtype=torch.float64)
    assert bool(E4M3.is_nan(E4M3.encode(x, saturate=saturate, code_of_nan="nan")[:2]).all())
    assert E4M3.encode(x, saturate=saturate, code_of_nan="+max").tolist() == [0x7E, 0x7E, 0x38]
    assert E4M3.encode(x, saturate=saturate, code_of_nan="-max").tolist() == [0xFE, 0xFE, 0x38]


def test_the_sign_of_zero_and_of_what_rounds_to_zero_is_kept() -> None:
    x = torch.tensor([0.0, -0.0, 2.0**-10, -(2.0**-10), 5e-324, -5e-324], dtype=torch.float64)
    assert E4M3.encode(x).tolist() == [0x00, 0x80, 0x00, 0x80, 0x00, 0x80]


def test_ordinals_follow_the_values_and_both_zeros_share_one() -> None:
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    index, value = E4M3.ordinal(codes).to(torch.int64), E4M3.decode(codes)
    assert sorted(set(index.tolist())) == list(range(-126, 127))
    order = torch.argsort(index)
    assert bool((value[order].diff() >= 0).all())
    assert E4M3.ordinal(torch.tensor([0x00, 0x80, 0x7F, 0xFF], dtype=torch.uint8)).abs().tolist() == [0, 0, 127, 127]
    assert [E4M3.code_at(i) for i in (-126, -1, 0, 1, 126)] == [0xFE, 0x81, 0x00, 0x01, 0x7E]


@pytest.mark.parametrize("beyond", [-127, 127])
def test_there_is_no_code_beyond_the_largest_ordinal(beyond: int) -> None:
    with pytest.raises(ValueError, match="ordinal"):
        E4M3.code_at(beyond)


def test_neighbours_are_the_values_next_below_and_above() -> None:
    by_value = sorted({E4M3.value(c) for c in range(256) if c & 0x7F != 0x7F})
    for code in range(256):
        if code & 0x7F == 0x7F:
            with pytest.raises(ValueError, match="NaN"):
                E4M3.neighbours(code)
            continue
        place = by_value.index(E4M3.value(code))
        below, above = E4M3.neighbours(code)
        assert E4M3.value(below) == by_value[max(place - 1, 0)]
        assert E4M3.value(above) == by_value[min(place + 1, len(by_value) - 1)]


def test_the_cast_takes_any_shape_and_layout() -> None:
    x = torch.arange(24, dtype=torch.float64).reshape(4, 6)
    assert torch.equal(E4M3.encode(x.t()), E4M3.encode(x).t())
    assert torch.equal(E4M3.encode(x[:, ::2]), E4M3.encode(x)[:, ::2])
    assert E4M3.encode(torch.empty(0, 8, dtype=torch.float64)).shape == (0, 8)
    assert E4M3.encode(torch.tensor(1.0, dtype=torch.float64)).item() == 0x38
