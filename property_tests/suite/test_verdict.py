"""The verdict on outputs made here, without ranks: what conforms passes, and one wrong element is found and named."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fusecheck import DATAFLOWS, Dataflow, Problem, RankOutputs
from fusecheck.dataflow import dataflow
from fusecheck.formats.binary import BF16, FP16, NATIVE, round_to, ulp
from fusecheck.inputs.families import FAMILIES
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.numerics.enclosure import kappa, preimage, root_ends, squares_ends, sum_ends
from fusecheck.numerics.nominal import inverse_root, reciprocal
from fusecheck.oracle import Oracle
from fusecheck.testing import conforms
from fusecheck.verdict import Stage, Tally, admissible_codes, judge_rows

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
TOKENS = 6


def oracle_of(problem: Problem, flow: Dataflow) -> Oracle:
    return Oracle(flow, Inputs(problem, CPU).operands(range(problem.tokens)))


def nominal_outputs(oracle: Oracle) -> RankOutputs:
    """Fresh copies of the nominal outputs, to be spoilt."""
    residual = oracle.residual().clone()
    norm = oracle.norm(residual).clone()
    return RankOutputs(residual, norm, oracle.codes(residual, norm).clone().view(torch.float8_e4m3fn))


def judged(oracle: Oracle, outputs: RankOutputs) -> dict[Stage, Tally]:
    return {tally.stage: tally for tally in judge_rows(oracle, outputs, 0)}


def bump(tensor: Tensor, row: int, column: int, steps: int = 1) -> None:
    """Move one element by some bit patterns, away from zero."""
    bits = tensor.view(torch.int16 if tensor.element_size() == 2 else torch.uint8)
    bits[row, column] += steps


@pytest.mark.parametrize("flow", DATAFLOWS.values(), ids=DATAFLOWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_nominal_outputs_conform(flow: Dataflow, family: str) -> None:
    for dtype in NATIVE:
        problem = Problem(family=family, dtype=dtype, world_size=4, tokens=TOKENS, hidden=128, seed=8)
        oracle = oracle_of(problem, flow)
        tallies = judged(oracle, nominal_outputs(oracle))
        assert {stage: tally.outside for stage, tally in tallies.items()} == dict.fromkeys(tallies, 0)


@pytest.mark.parametrize("flow", DATAFLOWS.values(), ids=DATAFLOWS)
def test_the_nominal_lies_inside_its_enclosure(flow: Dataflow) -> None:
    """What makes nominal-first sound, asked of every element."""
    problem = Problem(world_size=4, tokens=TOKENS, hidden=512, family="outliers", seed=21)
    oracle = oracle_of(problem, flow)
    outputs = nominal_outputs(oracle)
    rows, columns = torch.meshgrid(torch.arange(TOKENS), torch.arange(512), indexing="ij")
    where = (rows.reshape(-1), columns.reshape(-1))
    assert outputs.norm is not None
    for got, (lo, hi) in (
        (outputs.residual[where], oracle.residual_ends(where)),
        (outputs.norm[where], oracle.norm_ends(outputs.residual, where)),
    ):
        assert bool(((lo <= got.double()) & (got.double() <= hi)).all())


@pytest.mark.parametrize("name", ["trtllm", "flashinfer-fp32", "vllm-c"])
def test_one_residual_one_ulp_off_is_found_and_named(name: str) -> None:
    oracle = oracle_of(Problem(world_size=4, tokens=TOKENS, hidden=512), dataflow(name))
    outputs = nominal_outputs(oracle)
    bump(outputs.residual, 4, 77)
    tally = judged(oracle, outputs)[Stage.RESIDUAL]
    assert tally.outside == 1
    assert (tally.shown[0].row, tally.shown[0].column) == (4, 77)
    assert "in=[" in tally.shown[0].context


def test_one_norm_one_ulp_off_is_found_where_the_depth_is_declared() -> None:
    oracle = oracle_of(Problem(tokens=TOKENS, hidden=512), DATAFLOWS["trtllm"])
    outputs = nominal_outputs(oracle)
    assert outputs.norm is not None
    bump(outputs.norm, 2, 500)
    tallies = judged(oracle, outputs)
    assert tallies[Stage.NORM].outside == 1
    assert (tallies[Stage.NORM].shown[0].row, tallies[Stage.NORM].shown[0].column) == (2, 500)


def test_one_code_one_step_off_is_found_and_shown_with_its_bits() -> None:
    oracle = oracle_of(Problem(tokens=TOKENS, hidden=64, scale=0.02), DATAFLOWS["trtllm"])
    outputs = nominal_outputs(oracle)
    assert outputs.quant is not None
    bump(outputs.quant, 1, 3)
    tally = judged(oracle, outputs)[Stage.QUANT]
    assert tally.outside == 1
    shown = tally.shown[0]
    code = int(outputs.quant.view(torch.uint8)[1, 3])
    assert shown.got.startswith(f"{code:#04x} (")
    assert shown.admissible == f"{code - 1:#04x}..{code - 1:#04x}"
    assert "y/scale in [" in shown.context


@pytest.mark.parametrize("stage", [Stage.RESIDUAL, Stage.NORM, Stage.QUANT])
def test_nan_is_never_inside(stage: Stage) -> None:
    oracle = oracle_of(Problem(tokens=TOKENS, hidden=64), DATAFLOWS["trtllm"])
    outputs = nominal_outputs(oracle)
    assert outputs.norm is not None
    assert outputs.quant is not None
    tensor = {Stage.RESIDUAL: outputs.residual, Stage.NORM: outputs.norm, Stage.QUANT: outputs.quant}[stage]
    tensor.view(torch.int16 if tensor.element_size() == 2 else torch.uint8).fill_(0x7F)
    if stage is not Stage.QUANT:
        tensor.fill_(torch.nan)
    assert judged(oracle, outputs)[stage].outside == tensor.numel()


def test_a_nan_of_either_sign_stands_where_the_nominal_is_nan() -> None:
    oracle = oracle_of(Problem(family="special", tokens=10, hidden=64, seed=1), DATAFLOWS["trtllm"])
    outputs = nominal_outputs(oracle)
    assert outputs.norm is not None
    assert outputs.quant is not None
    nan = outputs.norm.isnan()
    assert bool(nan.any())
    outputs.norm.view(torch.int16)[nan] ^= -(2**15)
    outputs.quant.view(torch.uint8)[nan] = 0xFF
    assert all(tally.outside == 0 for tally in judged(oracle, outputs).values())
    outputs.quant.view(torch.uint8)[nan] = 0x7E
    assert judged(oracle, outputs)[Stage.QUANT].outside == int(nan.sum())


def test_both_zeros_stand_unless_the_dataflow_keeps_the_sign() -> None:
    problem = Problem(family="negative-zero", tokens=8, hidden=64)
    for flow, expected in ((DATAFLOWS["trtllm"], False), (Dataflow("kept", zero_sign="kept"), True)):
        oracle = oracle_of(problem, flow)
        outputs = nominal_outputs(oracle)
        zero = outputs.residual == 0
        assert bool(zero.any())
        outputs.residual.view(torch.int16)[zero] ^= -(2**15)
        assert (judged(oracle, outputs)[Stage.RESIDUAL].outside > 0) is expected


def test_an_infinite_row_does_not_poison_the_enclosure_of_its_finite_elements() -> None:
    """Sums in any order whose row holds an infinity had NaN ends once, and finite zeros were refused."""
    for seed in range(6):
        problem = Problem(family="special", world_size=8, tokens=10, hidden=64, gamma="ones", seed=seed)
        oracle = oracle_of(problem, DATAFLOWS["flashinfer-norm-quant"])
        outputs = nominal_outputs(oracle)
        assert outputs.norm is not None
        zeros = outputs.norm == 0
        outputs.norm.view(torch.int16)[zeros] ^= -(2**15)
        tallies = judged(oracle, RankOutputs(outputs.residual, outputs.norm))
        assert tallies[Stage.NORM].outside == 0


def test_a_norm_that_skips_its_rounding_before_the_cast_is_rejected() -> None:
    problem = Problem(tokens=TOKENS, hidden=1024, seed=4)
    outputs = nominal_outputs(oracle_of(problem, Dataflow("direct", round_norm=False)))
    assert judged(oracle_of(problem, DATAFLOWS["trtllm"]), outputs)[Stage.QUANT].outside > 0


def test_an_element_has_about_one_admissible_code_when_the_depth_is_declared() -> None:
    problem = Problem(tokens=16, hidden=4096, seed=2)
    outputs = {}
    for flow in (Dataflow("deep"), Dataflow("any", depth=None)):
        oracle = oracle_of(problem, flow)
        full = nominal_outputs(oracle)
        codes, elements = admissible_codes(oracle, RankOutputs(full.residual, None, full.quant))
        outputs[flow.name] = codes / elements
    assert 1 <= outputs["deep"] < 1.001
    assert outputs["deep"] <= outputs["any"] < 1.02


def test_kappa_grows_with_the_depth_and_never_beyond_any_order() -> None:
    values = [kappa(Dataflow("d", depth=depth), 4096) for depth in (1, 24, 4095, 10**6)]
    assert values == sorted(values)
    assert values[-1] == kappa(Dataflow("any", depth=None), 4096)


def test_every_value_of_a_preimage_rounds_back() -> None:
    bits = torch.arange(0x0080, 0x7F80, 13, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16).double()
    lo, hi = preimage(values, BF16)
    nudge = ulp(values, BF16) * 2.0**-20
    for inside in (lo + nudge, hi - nudge, values):
        assert torch.equal(round_to(inside, BF16), values)
    assert bool((round_to(hi + nudge, BF16) > values).all())


def test_what_rounds_to_an_infinity_reaches_down_to_the_overflow_threshold() -> None:
    lo, hi = preimage(torch.tensor([torch.inf, -torch.inf], dtype=torch.float64), FP16)
    assert (lo.tolist(), hi.tolist()) == ([65520.0, -math.inf], [math.inf, -65520.0])
    assert round_to(torch.tensor([65520.0, 65519.9], dtype=torch.float64), FP16).tolist() == [math.inf, 65504.0]


def test_cancelling_sums_in_any_native_order_are_enclosed_widely_and_exact_ones_to_a_point() -> None:
    flow = DATAFLOWS["unfused"]
    wide = torch.tensor([[4096.0], [1.0], [-4096.0], [0.7]], dtype=torch.float64)
    lo, hi = sum_ends(wide, flow, BF16)
    assert float(lo) <= 0.0 <= 1.7 <= float(hi)
    exact = torch.tensor([[3.0], [-7.0], [12.0], [1.0]], dtype=torch.float64)
    lo, hi = sum_ends(exact, flow, BF16)
    assert float(lo) == float(hi) == 9.0


def test_the_reciprocal_is_flushed_where_the_dataflow_flushes() -> None:
    fast, exact = DATAFLOWS["flashinfer"], DATAFLOWS["trtllm"]
    assert reciprocal(1e-40, fast) == float("inf")
    assert reciprocal(1e38, exact) > 0.0
    assert reciprocal(2.0**127, fast) == 0.0
    assert reciprocal(0.25, fast) == reciprocal(0.25, exact) == 4.0


@pytest.mark.parametrize(
    ("flow", "addends", "admissible", "others"),
    [
        ("unfused", (60000, 60000, -60000, -60000), (0, math.inf, -math.inf, math.nan), ()),
        ("unfused", (60000, 6000, -6000, -50000), (10000, math.inf), (-math.inf, math.nan)),
        ("unfused", (60000, 5000, -5000, -60000), (0,), (math.inf, -math.inf, math.nan)),
        ("flashinfer-cutedsl", (60000, 60000, -60000, -60000), (0,), (math.inf, -math.inf, math.nan)),
    ],
)
def test_a_sum_in_any_order_may_overflow_on_the_way_where_some_order_does(
    flow: str, addends: tuple[float, ...], admissible: tuple[float, ...], others: tuple[float, ...]
) -> None:
    partials = [torch.full((1, 16), float(each)).half() for each in addends]
    for got in (*admissible, *others):
        residual = torch.full((1, 16), float(got)).half()
        found = conforms(residual, partials=partials, residual_in=0 * partials[0], dataflow=flow)
        assert bool(found) == (got in admissible), got


def test_rounded_squares_of_an_unrounded_stream_are_nominally_inside_their_own_enclosure() -> None:
    flow = replace(DATAFLOWS["trtllm-mnnvl"], norm_reads_rounded=False)
    stream = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    root = inverse_root(stream, 1e-6, flow, torch.bfloat16).double()
    ends = squares_ends((stream.double(), stream.double()), flow, BF16)
    low, high = root_ends(ends, 16, 1e-6, flow)
    assert bool(((low <= root) & (root <= high)).all())
