"""The float64 oracle against exact rationals, both ways: it contains all that they allow, and hardly more."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import torch

from fusecheck.dataflow import DATAFLOWS, Dataflow
from fusecheck.numerics import enclosure
from fusecheck.oracle import Operands, Oracle
from fusecheck.property_tests.suite import legal_kernels, rational_oracle
from fusecheck.property_tests.suite.dataflows import describe, draw_dataflow, draw_native
from fusecheck.property_tests.suite.legal_inputs import DISTRIBUTIONS, draw
from fusecheck.property_tests.suite.legal_kernels import Floats, Inputs
from fusecheck.property_tests.suite.rational_numbers import (
    BF16,
    FP16,
    FP32,
    Ends,
    Grid,
    Real,
    Root,
    half_ulp,
    nearest,
    ordinal,
    preimage,
)
from fusecheck.property_tests.suite.rational_oracle import U

GRIDS = {torch.bfloat16: BF16, torch.float16: FP16}

SLACK = Fraction(1, 1 << 44)
"""By how much the float64 oracle's ends may lie beside the exact ones, relatively, before they are rounded.

It makes about H + 20 float64 roundings (2^-53 each) on the way to an end, H <= 32 of them in the sum of squares,
that is less than 2^-47; it moves outward by 2^-48 at most four times (sum, squares, root, norm). An end of the norm
may lie inside the exact one by as much and the bound is still sound, for the 2.01 u of the two products (the 1.01 u
of one) is 0.01 u = 2^-31 more than they need.
"""


def _row(inputs: Inputs, token: int) -> rational_oracle.Row:
    def exact(values: Floats) -> list[Fraction]:
        return [Fraction(float(v)) for v in values]

    return rational_oracle.Row(
        [exact(partial[token]) for partial in inputs.partials],
        exact(inputs.residual[token]),
        exact(inputs.gamma + np.float32(inputs.weight_bias)),
        Fraction(inputs.eps),
        Fraction(inputs.scale),
        GRIDS[inputs.native],
    )


def _operands(inputs: Inputs) -> Operands:
    def native(values: Floats) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(inputs.native)

    return Operands(
        [native(partial) for partial in inputs.partials],
        native(inputs.residual),
        native(inputs.gamma),
        inputs.scale,
        inputs.eps,
        inputs.weight_bias,
    )


class _Judged:
    """The float64 oracle's ends for one row, as exact numbers."""

    def __init__(self, flow: Dataflow, inputs: Inputs, observed: Floats, token: int) -> None:
        oracle = Oracle(flow, _operands(inputs))
        residual_out = torch.from_numpy(observed).to(inputs.native)
        columns = torch.arange(oracle.operands.hidden)
        where = (torch.full_like(columns, token), columns)
        self.residual = self._exact(oracle.residual_ends(where))
        self.norm = self._exact(oracle.unrounded_norm_ends(residual_out, where))
        self.quotient = self._exact(oracle.quotient_ends(residual_out, None, where))
        low, high = oracle.code_ends(residual_out, None, where)
        self.ordinals = list(zip(low.tolist(), high.tolist(), strict=True))
        self.nominal_norm = [Fraction(x) for x in oracle.unrounded_norm(residual_out)[token].tolist()]

    @staticmethod
    def _exact(ends: tuple[torch.Tensor, torch.Tensor]) -> list[Ends]:
        low, high = ends
        return [(Fraction(a), Fraction(b)) for a, b in zip(low.tolist(), high.tolist(), strict=True)]


def _reciprocal_slack(flow: Dataflow) -> Fraction:
    """A reciprocal within 1 ulp: the float64 oracle grants 2u around the rounded one, u itself from the exact one."""
    return Fraction(0) if flow.exact_reciprocal else 3 * U


def _moved(end: Real, side: int, relative: Fraction) -> Root:
    """An end moved outward; one that underflow can reach, below 2^-100, to 2^-99."""
    root = Root.of(end)
    if relative > 0 and 0 < root.square < Fraction(1, 1 << 200):
        return Root(side, Fraction(1, 1 << 198))
    return root.times(1 + relative if root.sign == side else 1 - relative)


def _widened(ends: Ends, relative: Fraction) -> Ends:
    return _moved(ends[0], -1, relative), _moved(ends[1], 1, relative)


def _within(inner: Ends, outer: Ends) -> bool:
    return Root.of(outer[0]) <= Root.of(inner[0]) and Root.of(inner[1]) <= Root.of(outer[1])


def _cases(count: int, seed: int) -> list[tuple[Dataflow, Inputs, np.random.Generator]]:
    rng = np.random.default_rng(seed)
    cases = []
    for i in range(count):
        world_size, tokens, hidden = int(rng.integers(1, 5)), int(rng.integers(1, 3)), int(rng.choice([8, 16, 24, 32]))
        depth = [None, 24, 3 + hidden.bit_length()][int(rng.integers(3))]
        named = list(DATAFLOWS.values())
        flow = named[i % len(named)] if rng.random() < 0.4 else draw_dataflow(rng, depth=depth)
        native = draw_native(rng, flow)
        cases.append((flow, draw(rng, DISTRIBUTIONS[i % 12], world_size, tokens, hidden, native), rng))
    return cases


CASES = _cases(72, seed=7)
IDS = [f"{i}-{flow.name}" for i, (flow, _, _) in enumerate(CASES)]


def _observed(flow: Dataflow, inputs: Inputs) -> Floats:
    """The residual_out of one legal kernel."""
    return legal_kernels.run(inputs, flow, np.random.default_rng(0))[0].residual


def _assert_agreement(flow: Dataflow, inputs: Inputs) -> None:
    observed = _observed(flow, inputs)
    for token in range(observed.shape[0]):
        row = _row(inputs, token)
        exact = rational_oracle.enclose(row, flow, [Fraction(float(t)) for t in observed[token]])
        judged = _Judged(flow, inputs, observed, token)
        for i in range(row.hidden):
            context = (i, describe(flow), exact.norm[i], judged.norm[i])
            assert _within(exact.residual[i], judged.residual[i]), context
            narrow, wide = _widened(exact.norm[i], -SLACK), _widened(exact.norm[i], SLACK)
            assert _within(narrow, judged.norm[i]), context
            assert _within(judged.norm[i], wide), context
            assert _within(rational_oracle.quotient_ends(narrow, row, flow), judged.quotient[i]), context
            wide_quotient = _widened(rational_oracle.quotient_ends(wide, row, flow), _reciprocal_slack(flow))
            assert _within(judged.quotient[i], wide_quotient), context
            assert judged.ordinals[i] == (ordinal(judged.quotient[i][0]), ordinal(judged.quotient[i][1])), context


@pytest.mark.parametrize(("flow", "inputs", "rng"), CASES, ids=IDS)
def test_the_oracle_contains_what_exact_rationals_allow_and_hardly_more(
    flow: Dataflow, inputs: Inputs, rng: np.random.Generator
) -> None:
    _assert_agreement(flow, inputs)


def _assert_all_agree(cases: list[tuple[Dataflow, Inputs, np.random.Generator]]) -> None:
    for flow, inputs, _ in cases:
        _assert_agreement(flow, inputs)


TRUE_KAPPA, TRUE_TREE = enclosure.kappa, enclosure._native_error
BROKEN = {
    "no error of the squares": ("kappa", lambda flow, hidden: 0.0),
    "half as much again for the squares": ("kappa", lambda flow, hidden: 1.5 * TRUE_KAPPA(flow, hidden)),
    "a better root than documented": ("RSQRT", 4 * enclosure.U),
    "a worse root than documented": ("RSQRT", 6 * enclosure.U),
    "a better division than documented": ("QUOTIENT", 4 * enclosure.U),
    "a rounded division of the mean": ("mean_error", lambda flow, hidden: enclosure.gamma_factor(2)),
    "nine tenths of the tree bound": (
        "_native_error",
        lambda partials, fmt, units: 0.9 * TRUE_TREE(partials, fmt, units),
    ),
    "truncation no worse than rounding": ("TRUNCATION", 1.0),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_bound_that_is_broken_either_way_does_not_agree(broken: str) -> None:
    name, replacement = BROKEN[broken]
    with mock.patch.object(enclosure, name, replacement), pytest.raises(AssertionError):
        _assert_all_agree(CASES)


@pytest.mark.parametrize(("flow", "inputs", "rng"), CASES, ids=IDS)
def test_the_oracle_contains_the_exact_nominal_and_its_own_nominal_is_legal(
    flow: Dataflow, inputs: Inputs, rng: np.random.Generator
) -> None:
    for token in range(inputs.residual.shape[0]):
        row = _row(inputs, token)
        nominal = rational_oracle.nominal(row, flow)
        observed = np.zeros_like(inputs.residual)
        observed[token] = [float(t) for t in nominal.residual]
        judged = _Judged(flow, inputs, observed, token)
        exact = rational_oracle.enclose(row, flow, nominal.residual)
        for i in range(row.hidden):
            assert _within((nominal.residual[i], nominal.residual[i]), judged.residual[i]), describe(flow)
            assert _within((nominal.norm[i], nominal.norm[i]), judged.norm[i]), describe(flow)
            assert judged.ordinals[i][0] <= nominal.ordinals[i] <= judged.ordinals[i][1], describe(flow)
            assert _within((judged.nominal_norm[i], judged.nominal_norm[i]), exact.norm[i]), describe(flow)


@pytest.mark.parametrize(("flow", "inputs", "rng"), CASES, ids=IDS)
def test_a_swarm_of_legal_kernels_lies_inside_both_oracles(
    flow: Dataflow, inputs: Inputs, rng: np.random.Generator
) -> None:
    tokens, hidden = inputs.residual.shape
    bounds: dict[tuple[Dataflow, int, bytes], tuple[rational_oracle.Enclosed, _Judged]] = {}
    for _ in range(6):
        out, depth = legal_kernels.run(inputs, flow, rng)
        declared = flow if flow.depth is None else replace(flow, depth=max(flow.depth, depth))
        for token in range(tokens):
            key = declared, token, out.residual[token].tobytes()
            if key not in bounds:  # kernels that return the same stream have the same bounds
                seen = [Fraction(float(t)) for t in out.residual[token]]
                exact = rational_oracle.enclose(_row(inputs, token), declared, seen)
                bounds[key] = exact, _Judged(declared, inputs, out.residual, token)
            codes = np.where(out.codes[token] >= 128, 128 - out.codes[token].astype(int), out.codes[token])
            for i in range(hidden):
                for bound in bounds[key]:
                    for value, ends in (
                        (out.residual[token, i], bound.residual[i]),
                        (out.unrounded_norm[token, i], bound.norm[i]),
                        (out.quotient[token, i], bound.quotient[i]),
                    ):
                        point = Fraction(float(value))
                        assert _within((point, point), ends), (describe(declared), type(bound).__name__)
                    assert bound.ordinals[i][0] <= codes[i] <= bound.ordinals[i][1]


# ------------------------------------------------------------------ the second oracle's own numbers


def _numbers(seed: int) -> list[float]:
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(400) * 10.0 ** rng.uniform(-6, 3, 400)).astype(np.float32)
    ties = np.ldexp(rng.integers(1, 1 << 9, 100) * 2 + 1, rng.integers(-12, 4, 100)).astype(np.float32)
    return [float(v) for v in np.concatenate([values, ties, -ties, np.zeros(1, np.float32)])]


@pytest.mark.parametrize(("grid", "dtype"), [(BF16, torch.bfloat16), (FP16, torch.float16), (FP32, torch.float32)])
def test_rounding_a_rational_agrees_with_the_framework_on_float32(grid: Grid, dtype: torch.dtype) -> None:
    values = _numbers(3)
    theirs = torch.tensor(values, dtype=torch.float32).to(dtype).to(torch.float64).tolist()
    assert [float(nearest(Fraction(v), grid)) for v in values] == theirs


def test_the_cast_of_a_rational_agrees_with_the_framework_on_float32() -> None:
    values = [v * 3 for v in _numbers(4)]
    codes = legal_kernels.cast(np.array(values, np.float32)).astype(int)
    signed = np.where(codes >= 128, 128 - codes, codes)
    assert [ordinal(Fraction(v)) for v in np.array(values, np.float32).tolist()] == signed.tolist()


def test_a_root_is_compared_and_rounded_without_approximation() -> None:
    two: Real = Root(1, Fraction(2))
    assert Fraction(14142135623730950488, 10**19) < two < Fraction(14142135623730950489, 10**19)
    assert Root(-1, Fraction(9)) == Fraction(-3)
    assert nearest(Root(1, Fraction(257**2, 256**2)), BF16) == 1  # 257/256 is a tie, to even
    assert nearest(Root(1, Fraction(257**2, 256**2) + Fraction(1, 10**40)), BF16) == Fraction(129, 128)


def test_the_preimage_of_a_value_is_what_rounds_to_it() -> None:
    beyond = Fraction(1, 10**12)
    for value in (Fraction(1), Fraction(-1), Fraction(3, 2), Fraction(-255, 128), Fraction(0)):
        low, high = preimage(value, BF16)
        assert nearest(low + beyond * half_ulp(value, BF16), BF16) == value
        assert nearest(high - beyond * half_ulp(value, BF16), BF16) == value
        assert nearest(low - beyond * half_ulp(value, BF16), BF16) != value
        assert nearest(high + beyond * half_ulp(value, BF16), BF16) != value
