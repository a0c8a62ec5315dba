"""No legal quantiser is outside the bounds of its scales and codes, and each bound broken on purpose is seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fusecheck.formats.element import E4M3
from fusecheck.property_tests.suite import legal_quantisers, refutation
from fusecheck.property_tests.suite import quantiser_refutation as quantisers
from fusecheck.property_tests.suite.quantiser_cases import SPECS
from fusecheck.property_tests.suite.quantiser_refutation import Tally
from fusecheck.quantflow import QUANT_FLOWS
from fusecheck.quantisers.dynamic_fp8 import DYNAMIC_FP8
from fusecheck.quantisers.known import QUANTISERS

CHECKS = {"static-fp8": 3_000_000, "dynamic-fp8": 2_000_000}
"""Elements; a tensor has one given scale, so it takes more to see each of them."""


@pytest.mark.parametrize("name", QUANT_FLOWS)
def test_no_legal_quantiser_is_outside_and_every_broken_bound_is_caught(name: str) -> None:
    torch.set_num_threads(1)
    *_, tallies = quantisers.refute(name, CHECKS.get(name, 1_000_000), elements=1 << 15, seed=3)
    assert tallies.elements >= 1_000_000
    assert tallies.verdict() == ([], [])
    assert tallies.broken


@pytest.mark.parametrize(("name", "flushes"), [("flashinfer", True), ("trtllm", False)])
def test_a_subnormal_norm_may_be_flushed_before_it_is_scaled_where_a_kernel_flushes(name: str, flushes: bool) -> None:
    """Found in 1e8 elements: their value is below every code, unless the given scale is hardly normal itself."""
    norm = torch.tensor([[2.0**-130, -(2.0**-127), 1.0, 0.0]], dtype=torch.bfloat16)
    stored, flow, static = torch.tensor([[2.0**-124]]), QUANT_FLOWS["static-fp8"][name], QUANTISERS["static-fp8"]
    low, high = static.code_ends((norm.double(),) * 2, stored, flow)
    ordinals = E4M3.ordinal(static.codes(norm, stored, flow))
    assert ordinals[0, :2].tolist() == [8, -32]  # 2^-6 and -2^-3, by a kernel that keeps subnormals
    assert bool(((low <= ordinals) & (ordinals <= high)).all())
    assert bool(((low <= 0) & (high >= 0))[0, :2].all()) is flushes
    assert bool((low[0, 2:] == high[0, 2:]).all())


UNIQUE = {
    ("group-fp8", "vllm"),
    ("group-fp8", "deepgemm"),
    ("group-fp8-packed", "vllm"),
    ("mxfp8", "flashinfer"),
    ("mxfp8", "torchao"),
    ("mxfp4", "flashinfer"),
    ("mxfp4", "torchao"),
    ("dynamic-fp8", "vllm"),
    ("dynamic-fp8", "flashinfer-cutedsl"),
}
"""Where family.md says that exactly one pair of scale and code is admissible."""


@pytest.mark.parametrize(("name", "flow"), sorted(UNIQUE))
def test_where_every_operation_is_correctly_rounded_one_pair_alone_is_admissible(name: str, flow: str) -> None:
    rng = np.random.default_rng(4)
    declared, tally = QUANT_FLOWS[name][flow], Tally()
    groups = quantisers.draw(rng, name, declared, 1 << 16)
    out = legal_quantisers.run(groups.norm.float().numpy(), groups.spec, declared, groups.given, rng)
    quantisers.judge(groups, out, declared, tally)
    assert (tally.codes, tally.scales, tally.total) == (0, 0, 0)


def test_approximate_division_leaves_two_exponents_at_7_times_a_power_of_two_alone_and_one_code() -> None:
    rng = np.random.default_rng(4)
    declared, tally = QUANT_FLOWS["group-fp8-packed"]["flashinfer"], Tally()
    groups = quantisers.draw(rng, "group-fp8-packed", declared, 1 << 16)
    out = legal_quantisers.run(groups.norm.float().numpy(), groups.spec, declared, groups.given, rng)
    quantisers.judge(groups, out, declared, tally)
    boundary = torch.frexp(groups.norm.float().abs().amax(1))[0] == 0.875
    assert (tally.codes, tally.total) == (0, 0)
    assert 0 < tally.scales <= int(boundary.sum())


def test_the_scale_of_another_group_is_the_codes_fault_and_a_wrong_scale_is_its_own() -> None:
    """G2: what a kernel stored is what its codes are judged by."""
    rng = np.random.default_rng(5)
    declared = QUANT_FLOWS["group-fp8"]["vllm"]
    groups = quantisers.draw(rng, "group-fp8", declared, 1 << 15)
    out = legal_quantisers.run(groups.norm.float().numpy(), groups.spec, declared, groups.given, rng)
    swapped = replace(out, scales=np.roll(out.scales, 1, axis=0))
    doubled = legal_quantisers.run(groups.norm.float().numpy(), groups.spec, replace(declared, least=1e6), 1.0, rng)
    by_pair, by_scale = Tally(), Tally()
    quantisers.judge(groups, swapped, declared, by_pair)
    quantisers.judge(groups, doubled, declared, by_scale)
    assert by_pair.violations["code"] > 10_000
    assert by_scale.violations["scale"] == len(groups.norm)
    assert by_scale.violations["code"] == by_scale.violations["value"] == 0


def test_the_command_takes_a_format_and_says_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--format", "nvfp4", "--checks", "1e6", "--elements", "16384"]
    assert refutation.main(arguments) == 0
    assert "nvfp4: sound bounds hold; broken bounds caught" in capsys.readouterr().out
    with quantisers.without("QUOTIENT"):
        assert refutation.main(arguments) == 1
    assert "nvfp4: sound bounds REFUTED: flashinfer" in capsys.readouterr().out


def test_a_flushed_norm_by_an_infinite_factor_is_no_number_and_no_violation() -> None:
    """Found in 1e8 elements: the scale is flushed to zero, and one end of a norm that was not returned is normal."""
    flow, size = QUANT_FLOWS["dynamic-fp8"]["sglang-fast"], 64
    norm = torch.full((1, size), 127 * 2.0**-133, dtype=torch.bfloat16)  # the greatest subnormal
    groups = quantisers.Groups(replace(DYNAMIC_FP8, group=size), SPECS["dynamic-fp8"], norm, 1.0)
    out = legal_quantisers.run(norm.float().numpy(), groups.spec, flow, 1.0, np.random.default_rng(1))
    assert np.isnan(out.values).all()
    tally = Tally()
    quantisers.judge_codes(groups, out, flow, tally, (norm.double(), torch.full((1, size), 2.0**-126).double()))
    assert tally.total == 0
    quantisers.judge_codes(groups, out, flow, tally, (torch.full((1, size), 2.0**-126).double(),) * 2)
    assert tally.violations["value"] == size
