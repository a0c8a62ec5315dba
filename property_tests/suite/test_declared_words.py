"""What a declaration says about squares, means and quotients: an honest kernel of each kind is inside."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from scipy.stats import binom

from fusecheck import DATAFLOWS, Dataflow, Problem, RankOutputs
from fusecheck.backends.emulated_arithmetic import Arithmetic
from fusecheck.case.run import collect, request
from fusecheck.formats.binary import BF16
from fusecheck.formats.element import E4M3
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import RankInputs
from fusecheck.numerics import enclosure
from fusecheck.numerics.sums import sum_partials
from fusecheck.oracle import Operands, Oracle
from fusecheck.property_tests.suite import legal_kernels
from fusecheck.ranks import Reply
from fusecheck.verdict import FALSE_ALARM, Stage, Tally, judge_rows, off_nominal_budget, off_nominal_share

FP8 = torch.float8_e4m3fn


def test_the_budget_of_off_nominal_norms_separates_rounding_from_a_scale_error() -> None:
    """A shift of a few legal roundings fits; one of 1e-4 does not, though each element might."""
    elements = 2**20
    share, wide = (off_nominal_share(f, BF16, 4096) for f in (DATAFLOWS["trtllm"], Dataflow("any", depth=None)))
    assert share is not None
    assert wide is not None
    budget = off_nominal_budget(share, elements)
    assert 3e-5 * elements < budget < 184 * 1e-4 * elements
    assert off_nominal_budget(wide, elements) > 10 * budget


def test_the_budget_of_off_nominal_norms_is_exceeded_no_more_often_than_it_says() -> None:
    """Exact tails of the binomial: below the stated chance; and of many norms it allows hardly more than the mean."""
    for elements in (64, 10**4, 10**7):
        for share in (1e-7, 3e-4, 0.02):
            tail = float(binom.sf(math.ceil(off_nominal_budget(share, elements)) - 1, elements, share))
            assert tail <= FALSE_ALARM
    assert off_nominal_budget(3e-4, 10**7) < 1.15 * 3e-4 * 10**7


def test_what_the_norm_reads_decides_whether_there_is_a_budget_and_its_name_does_not() -> None:
    own = replace(DATAFLOWS["trtllm"], name="mine")
    assert off_nominal_share(own, BF16, 512) == off_nominal_share(DATAFLOWS["trtllm"], BF16, 512)
    assert off_nominal_share(replace(own, norm_reads_rounded=False, order="any"), BF16, 512) is None
    assert off_nominal_share(replace(own, norm_reads_rounded=False, order="any", accumulate="exact"), BF16, 512)
    assert off_nominal_share(replace(own, statistics="unrounded", order="any"), BF16, 512) is None


def test_a_declaration_of_ones_own_is_held_to_the_budget() -> None:
    problem = Problem(tokens=64, hidden=512, world_size=1)
    share = off_nominal_share(replace(DATAFLOWS["trtllm"], name="mine"), BF16, 512)
    assert share is not None
    allowed = math.floor(off_nominal_budget(share, problem.elements))
    for off, stages in ((allowed, []), (allowed + 1, [Stage.NORM])):
        record = {
            "problem": problem.to_json(),
            "dataflow": "mine",
            "off_nominal_share": share,
            "tallies": [Tally(Stage.NORM, problem.elements, off).to_record()],
        }
        outcome = collect(request(problem, "mine"), [Reply(0, {"calls": [record]})])
        assert [finding.stage for finding in outcome.findings] == stages


def _unlucky_row(hidden: int) -> np.ndarray:
    """A row in which each of the additions of `pairwise` above the first square is rounded up by nearly u."""
    row = np.zeros((1, hidden), np.float32)
    row[0, 0], width = 1.0, hidden
    while width > 1:
        width = (width + 1) // 2
        row[0, width] = 2.0**-12 * (1 + 2.0**-7)
    return row


def test_a_mean_that_is_divided_within_two_ulp_is_inside_where_that_is_declared_and_only_there() -> None:
    """The 3 u that a correctly rounded division does not need: hidden 1016, no power of two."""
    rng, hidden, eps = np.random.default_rng(1), 1016, 2.0**-34 * 1.01
    approx = Dataflow("approx", mean_rule="approx", depth=10)
    row = _unlucky_row(hidden)
    sums, depth = legal_kernels.sum_squares(row, "pairwise", None, rng)
    assert depth == approx.depth
    computed = [float(legal_kernels.mean_square(sums, hidden, eps, approx, rng)[0]) for _ in range(64)]
    exact = torch.from_numpy(row).double().square().sum(-1, keepdim=True)

    def top(flow: Dataflow) -> float:
        return float(enclosure.mean_ends((exact, exact), hidden, eps, flow)[1])

    assert top(replace(approx, mean_rule="exact")) < max(computed) <= top(approx)
    narrow, wide = (replace(approx, mean_rule=rule, exact_pow2=True) for rule in ("exact", "approx"))
    powers = (exact, exact), 1024, eps
    assert enclosure.mean_ends(*powers, narrow)[1] == enclosure.mean_ends(*powers, wide)[1]


@pytest.mark.parametrize("scaling", ["multiply", "either"])
@pytest.mark.parametrize("scale", [0.25, 1.0, 0.3])
def test_an_inexact_reciprocal_has_its_slack_at_powers_of_two_unless_declared_exact_there(
    scaling: Literal["multiply", "either"], scale: float
) -> None:
    """Norms on the midpoints of E4M3 show one ulp of the reciprocal: the code below the tie."""
    inexact = Dataflow("inexact", scaling=scaling, exact_reciprocal=False)
    ties = torch.tensor([[1.0625, 1.1875, 1.3125, -1.0625]], dtype=torch.float64) * scale
    norm = ties.to(torch.float16)
    low = np.nextafter(np.float32(1) / np.float32(scale), np.float32(0))
    codes = legal_kernels.cast(norm.float().numpy() * low)
    operands = Operands([norm], norm, norm[0], scale, 1e-6)
    where = (torch.zeros(4, dtype=torch.int64), torch.arange(4))

    def admits(flow: Dataflow) -> bool:
        least, most = Oracle(flow, operands).code_ends(norm, norm, where)
        got = E4M3.ordinal(torch.from_numpy(codes)[0])
        return bool(((least <= got) & (got <= most)).all())

    assert admits(inexact)
    if scale != 0.3:
        assert not admits(replace(inexact, exact_pow2=True))
        factor = Arithmetic(inexact, 0, 1).reciprocal(torch.tensor([scale]))
        assert float(factor) == float(low)  # the emulator does it, so a plug-in of its kind is right


def totals(family: str, ranks: int) -> dict[str, torch.Tensor]:
    """The sums over ranks of a family's case, as each kind of addition forms them, in rank order."""
    problem = Problem(tokens=32, hidden=256, world_size=ranks, family=family)
    partials = Inputs(problem, torch.device("cpu")).partials(range(problem.tokens))
    kinds: dict[str, Dataflow] = {
        "native": Dataflow("native"),
        "truncated": Dataflow("truncated", sum_rounding="truncate"),
        "fp32": Dataflow("fp32", accumulate="fp32", round_sum=False),
        "exact": Dataflow("exact", accumulate="exact", round_sum=False),
    }
    return {name: sum_partials(partials, flow, flushing=False).double() for name, flow in kinds.items()}


def test_there_are_inputs_on_which_all_sums_agree_and_inputs_that_tell_each_from_the_others() -> None:
    first, *others = totals("exact", 8).values()
    assert all(torch.equal(first, other) for other in others)
    found = totals("cancelling", 8)
    apart = {(a, b): float((found[a] != found[b]).double().mean()) for a in found for b in found if a < b}
    assert min(apart.values()) > 0.01, apart
    assert bool((found["truncated"].abs() <= found["exact"].abs()).all()) is False  # partial sums of both signs
    plain = totals("gaussian", 2)
    assert bool((plain["truncated"].abs() <= plain["exact"].abs()).all())


def test_a_truncated_sum_that_overflows_on_the_way_may_end_below_the_largest_number() -> None:
    """Found by an emulated kernel: the partial sum stays at the largest number, and a small addend takes one step."""
    addends = [torch.full((1, 8), value, dtype=torch.bfloat16) for value in (2.0**127, 2.0**127, -0.0625)]
    zero, largest = torch.zeros(1, 8, dtype=torch.bfloat16), torch.finfo(torch.bfloat16).max
    truncated = Dataflow("truncated", sum_rounding="truncate", order="any", depth=None)
    total = Arithmetic(replace(truncated, order="rank"), 0, 3).total(addends)
    assert 0.99 * largest < float(total[0, 0]) < largest
    where = (torch.zeros(8, dtype=torch.int64), torch.arange(8))
    low, high = Oracle(truncated, Operands(addends, zero, zero[0], 1.0, 1e-6)).residual_ends(where)
    assert bool(((low <= total[0].double()) & (total[0].double() <= high)).all())


def test_a_row_that_is_scaled_before_it_is_squared_may_hold_any_finite_number() -> None:
    flow = Dataflow("scaled", scaled_squares=True)
    huge = torch.full((1, 64), 2.0**100, dtype=torch.bfloat16)
    zero = torch.zeros_like(huge)
    inputs = RankInputs(huge, zero, torch.ones(64, dtype=torch.bfloat16), torch.ones(1), 1e-6, 0.0)
    outputs = RankOutputs(torch.empty_like(huge), torch.empty_like(huge), torch.empty_like(huge, dtype=FP8))
    arithmetic = Arithmetic(flow, 0, 1)
    arithmetic.epilogue(huge, zero, arithmetic.prepare(inputs), outputs)
    assert outputs.norm is not None
    assert bool((outputs.norm == 1.0).all())
    for declared, outside in ((flow, 0), (replace(flow, scaled_squares=False), 64)):
        oracle = Oracle(declared, Operands([huge], zero, inputs.gamma, 1.0, 1e-6))
        assert {t.stage: t.outside for t in judge_rows(oracle, outputs, 0)}[Stage.NORM] == outside
