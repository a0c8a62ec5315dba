"""The field's pass criteria: all accept the reference itself, and each has the blind spots it is known for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from fusecheck.faults.comparison import Codes, Evidence, Outputs, decoded, ulps
from fusecheck.faults.criteria import CRITERIA, Criterion
from fusecheck.faults.format_criteria import FORMAT_CRITERIA, FormatEvidence, Quantised
from fusecheck.faults.peer_tests import MOST_ELEMENTS, PROFILES, Profile, inputs_of, operands
from fusecheck.formats.element import E4M3
from fusecheck.quantflow import QUANT_FLOWS

BY_NAME = {criterion.name: criterion for criterion in CRITERIA}
SCALE = 0.0125
Change = Callable[[Outputs], Outputs]


def evidence(change: Change = lambda outputs: outputs) -> Evidence:
    """Outputs of 64 x 256 elements as they should be, then changed."""
    rng = np.random.default_rng(3)
    norm = torch.from_numpy(rng.normal(size=(64, 256))).to(torch.bfloat16)
    codes: Codes = E4M3.encode_float32(norm.float() / SCALE, saturate=True, code_of_nan="nan").numpy()
    right = Outputs(rng.normal(size=(64, 256)), norm.double().numpy(), codes)
    assert right.norm is not None
    got = change(Outputs(right.residual.copy(), right.norm.copy(), codes.copy()))
    return Evidence(got, right, SCALE, right.norm, codes, 8)


def verdict(name: str, change: Change) -> bool:
    return BY_NAME[name].rule(evidence(change))


def all_nan(outputs: Outputs) -> Outputs:
    nan = np.full_like(outputs.residual, np.nan)
    return Outputs(nan, nan, np.full_like(outputs.codes, 0x7F))


def one_code_up(outputs: Outputs) -> Outputs:
    assert outputs.codes is not None
    normal = ((outputs.codes & 0x7F) < 0x7E) & ((outputs.codes & 0x7F) >= 8)
    return replace(outputs, codes=(outputs.codes + normal).astype(np.uint8))


def zero_codes(outputs: Outputs) -> Outputs:
    return replace(outputs, codes=np.zeros_like(outputs.codes))


def no_residual(outputs: Outputs) -> Outputs:
    return replace(outputs, residual=outputs.residual * 2 + 5)


def one_in_128_flipped(outputs: Outputs) -> Outputs:
    assert outputs.codes is not None
    flipped = outputs.codes.copy()
    flipped.reshape(-1)[::128] ^= 0x80
    return replace(outputs, codes=flipped)


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: str(c.name))
def test_a_criterion_accepts_the_reference_itself_and_names_its_source(criterion: Criterion[Evidence]) -> None:
    assert criterion.rule(evidence())
    assert "/" in criterion.source
    assert criterion.formula
    assert not criterion.profile or criterion.profile in PROFILES


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: str(c.name))
def test_a_criterion_rejects_something(criterion: Criterion[Evidence]) -> None:
    def garbage(outputs: Outputs) -> Outputs:
        codes = np.random.default_rng(1).integers(0, 0x7E, outputs.residual.shape).astype(np.uint8)
        return Outputs(outputs.residual + 9, outputs.residual - 9, codes)

    assert not criterion.rule(evidence(garbage))


@pytest.mark.parametrize("name", ["TRT", "TE compare", "TE overlap"])
def test_a_criterion_that_counts_what_is_far_passes_outputs_that_are_all_nan(name: str) -> None:
    assert verdict(name, all_nan)


@pytest.mark.parametrize("name", ["TRT", "FI fusion", "FI bench", "JAX", "torchao", "TE compare"])
def test_every_normal_code_may_be_one_too_large_for_some(name: str) -> None:
    # JAX's tolerance of ten per cent lies inside the widest step, 12.5 %: it sees those codes only.
    assert verdict(name, one_code_up) == (name != "JAX")


@pytest.mark.parametrize("name", ["FI fusion", "FI unified", "FI gemma", "vLLM fused"])
def test_criteria_that_never_look_at_codes_pass_codes_that_are_all_zero(name: str) -> None:
    assert verdict(name, zero_codes)


@pytest.mark.parametrize("name", ["AITER", "FI norm", "vLLM CUDA", "KernelBench", "DeepGEMM", "FI group"])
def test_criteria_that_never_look_at_the_residual_pass_a_wrong_one(name: str) -> None:
    assert verdict(name, no_residual)


def test_one_element_of_a_hundred_may_be_anything_for_tensorrt_llm() -> None:
    assert verdict("TRT", one_in_128_flipped)
    assert not verdict("vLLM CUDA", one_in_128_flipped)


def test_the_units_in_the_last_place_are_those_of_the_format() -> None:
    one = np.array([1.0, 1.0, np.nan])
    other = np.array([1 + 2.0**-7, 1.0, 1.0])
    assert ulps(one, other, 8).tolist() == [1.0, 0.0, np.inf]
    assert ulps(one, other, 11)[0] == 8.0
    assert decoded(np.array([0x38, 0x7E], np.uint8)).tolist() == [1.0, 448.0]


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda p: str(p.name))
def test_the_peers_data_have_the_property_that_their_tests_give_them(profile: Profile) -> None:
    size, tokens, hidden = profile.shapes()[-1]
    assert tokens * hidden <= MOST_ELEMENTS
    made = operands(profile, size, tokens, hidden, seed=1)
    assert len(made.partials) == size
    equal = all((made.partials[0] == other).all() for other in made.partials[1:])
    assert equal == profile.same_on_ranks
    assert bool((made.residual == made.partials[0]).all()) == (profile.residual == "partial")
    assert bool((made.gamma == 1).all()) == (profile.gamma == "ones")
    received = inputs_of(made, size - 1)
    assert bool((received.partial == made.partials[-1]).all())
    assert profile.scale is None or float(received.scale) == np.float32(profile.scale)


def made(change: Callable[[Quantised], Quantised] = lambda right: right) -> FormatEvidence:
    """64 rows of 256 normal numbers in groups of 128 as float32 scales have them, then changed."""
    norm = np.random.default_rng(5).normal(size=(64, 256))
    scales = np.abs(norm.reshape(64, 2, 128)).max(-1).astype(np.float32).astype(np.float64) / 448
    quotient = torch.from_numpy(norm / scales.repeat(128, axis=1)).float()
    codes: Codes = E4M3.encode_float32(quotient, saturate=True, code_of_nan="nan").numpy()
    right = Quantised(codes, decoded(codes), scales, scales.astype(np.float32).reshape(-1).view(np.uint8))
    return FormatEvidence(((norm, norm),), norm, change(right), right, right, bits=8, four_bits=False)


def format_verdict(name: str, change: Callable[[Quantised], Quantised]) -> bool:
    return next(c for c in FORMAT_CRITERIA if c.name == name).rule(made(change))


def scales_times(factor: float) -> Callable[[Quantised], Quantised]:
    def change(right: Quantised) -> Quantised:
        scales = right.scales * factor
        return replace(right, scales=scales, storage=scales.astype(np.float32).reshape(-1).view(np.uint8))

    return change


def garbage_codes(right: Quantised) -> Quantised:
    codes = np.bitwise_xor(right.codes, np.uint8(0x85))
    return replace(scales_times(9.0)(right), codes=codes, numbers=decoded(codes))


@pytest.mark.parametrize("criterion", FORMAT_CRITERIA, ids=lambda c: str(c.name))
def test_a_criterion_of_formats_accepts_the_reference_and_rejects_garbage(criterion: Criterion[FormatEvidence]) -> None:
    assert criterion.rule(made())
    assert not criterion.rule(made(garbage_codes))
    assert "/" in criterion.source
    assert criterion.formula
    assert set(criterion.formats) <= set(QUANT_FLOWS)


def test_every_format_that_makes_its_scales_is_some_projects_test() -> None:
    for name in QUANT_FLOWS:
        assert name == "static-fp8" or any(criterion.takes(name) for criterion in FORMAT_CRITERIA), name
    assert next(c for c in FORMAT_CRITERIA if c.name == "vLLM group").takes("group-fp8-64")


@pytest.mark.parametrize(
    ("name", "factor", "passes"),
    [
        ("FI 8/9", 1 + 2.0**-23, False),
        ("vLLM norm + quant", 1 + 2.0**-18, True),
        ("FI 10/11", 1.04, True),
        ("FI FP4", 1.5, True),  # the scales are small, and so below its absolute tolerance
        ("AITER quant", 1.04, True),
        ("torchao MX", 1.04, True),
        ("DeepGEMM quant", 1.02, True),
        ("torch default quant", 1.015, True),
    ],
)
def test_a_uniform_error_of_all_scales_passes_all_but_exact_criteria(name: str, factor: float, passes: bool) -> None:
    assert format_verdict(name, scales_times(factor)) == passes
