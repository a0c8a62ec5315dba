"""What each implementation answers to zeros, NaN and infinities is declared, and the declaration says what it does.

The answers are those of the published sources: FlashInfer drops a NaN in the amax and makes it a number in the clamp.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fusecheck.quantflow import QUANT_FLOWS
from fusecheck.quantisers.known import QUANTISERS
from fusecheck.quantisers.scaled import Scaled

NAN, INF = math.nan, math.inf
LEAST = float.fromhex("0x1.24924ap-18")

ANSWERS = [
    ("static-fp8", "flashinfer", [NAN, 1.0], 1.0, [0x7F, 0x38]),
    ("static-fp8", "vllm", [NAN, 1.0], 1.0, [0x7E, 0x38]),
    ("static-fp8", "flashinfer", [INF, -INF], 1.0, [0x7E, 0xFE]),
    ("dynamic-fp8", "flashinfer", [0.0, -0.0], LEAST, [0x00, 0x80]),
    ("dynamic-fp8", "flashinfer", [NAN, NAN], LEAST, [0xFE, 0xFE]),
    ("dynamic-fp8", "flashinfer", [NAN, 448.0], 1.0, [0xFE, 0x7E]),
    ("dynamic-fp8", "flashinfer", [INF, 1.0], INF, [0xFE, 0x00]),
    ("dynamic-fp8", "flashinfer-cutedsl", [NAN, 1.0], NAN, [0x7F, 0x7F]),
    ("dynamic-fp8", "sglang", [0.0, 0.0], 0.0, [0x7E, 0x7E]),
    ("dynamic-fp8", "sglang-fast", [0.0, 2.0**-126], 0.0, [0x7E, 0x7E]),
    ("dynamic-fp8", "aiter", [0.0, -0.0], 1.0, [0x00, 0x80]),
    ("group-fp8", "deepgemm", [0.0, 0.0], float(torch.tensor(1e-4) / 448), [0x00, 0x00]),
    ("group-fp8", "vllm-native", [0.0, 0.0], LEAST, [0x00, 0x00]),
    ("group-fp8", "sglang-fast", [0.0, -0.0], float(torch.tensor(1e-10) * (1 / torch.tensor(448.0))), [0x00, 0x80]),
    ("group-fp8", "sglang-fast", [NAN, 448.0], 1.0, [0xFE, 0x7E]),
    ("group-fp8-packed", "sglang", [0.0, 0.0], 85, [0x00, 0x00]),
    ("group-fp8-packed", "sglang", [NAN, 448.0], 127, [0xFE, 0x7E]),
    ("group-fp8-packed", "flashinfer", [0.0, 0.0], 94, [0x00, 0x00]),
    ("group-fp8-packed", "flashinfer", [NAN, 448.0], 127, [0xFE, 0x7E]),
    ("group-fp8-packed", "flashinfer-shared", [NAN, 448.0], 94, [0xFE, 0x7E]),
    ("group-fp8-packed", "flashinfer-shared", [NAN, -1e-3], 94, [0xFE, 0xFE]),
    ("group-fp8-packed", "flashinfer", [INF, 1.0], 255, [0xFE, 0x00]),
    ("mxfp8", "flashinfer", [0.0, -0.0], 0, [0x00, 0x80]),
    ("mxfp8", "flashinfer", [NAN, NAN], 0, [0x7E, 0x7E]),
    ("mxfp8", "flashinfer", [NAN, 448.0], 127, [0x7E, 0x7E]),
    ("mxfp8", "flashinfer", [INF, -1.0], 254, [0x7E, 0x80]),
    ("mxfp8", "flashinfer", [2.0**-120, 2.0**-120], 0, [0x00, 0x00]),
    ("mxfp8", "torchao", [0.0, 0.0], 0, [0x00, 0x00]),
    ("mxfp8", "torchao", [NAN, 1.0], 255, [0x7F, 0x7F]),
    ("mxfp8", "torchao-rceil", [INF, 1.0], 255, [0x7F, 0x7F]),
    ("nvfp4", "flashinfer", [0.0, -0.0], 0, [0, 8]),
    ("nvfp4", "flashinfer", [NAN, 6.0], 0x38, [7, 7]),
    ("nvfp4", "flashinfer", [INF, 1.0], 0x7E, [7, 0]),
    ("nvfp4", "torchao", [0.0, 0.0], 0x08, [0, 0]),
    ("nvfp4", "torchao", [NAN, 1.0], 0x7F, [7, 7]),
    ("mxfp4", "flashinfer", [0.0, 0.0], 0, [0, 0]),
    ("mxfp4", "torchao", [INF, 1.0], 255, [7, 7]),
]


def in_pairs(name: str) -> Scaled:
    """The quantiser with groups of two, where it has groups."""
    quantiser = QUANTISERS[name]
    assert isinstance(quantiser, Scaled)
    return quantiser if quantiser.group is None else replace(quantiser, group=2)


@pytest.mark.parametrize(("name", "flow", "group", "scale", "codes"), ANSWERS)
def test_special_groups_have_the_declared_scale_and_codes(
    name: str, flow: str, group: list[float], scale: float, codes: list[int]
) -> None:
    declared = QUANT_FLOWS[name][flow]
    quantiser = in_pairs(name)
    norm = torch.tensor([group, [1.0, 2.0]], dtype=torch.bfloat16)
    stored = quantiser.scales(norm, declared)
    first = float(stored.reshape(-1)[0])
    assert first == scale or (math.isnan(first) and math.isnan(scale))
    assert quantiser.codes(norm, stored, declared)[0].tolist() == codes
    alone = quantiser.scales(norm[1:], declared)
    assert torch.equal(stored[-1:], alone)  # a group beside a special one is as if it were alone


@pytest.mark.parametrize(("name", "flow", "group", "scale", "codes"), ANSWERS)
def test_the_nominal_answer_is_inside_its_enclosure_there_as_well(
    name: str, flow: str, group: list[float], scale: float, codes: list[int]
) -> None:
    del scale, codes
    declared = QUANT_FLOWS[name][flow]
    quantiser = in_pairs(name)
    norm = torch.tensor([group], dtype=torch.bfloat16)
    wide = (norm.double(), norm.double())
    nominal = quantiser.scales(norm, declared).expand(1, 1)
    ends = tuple(end.expand(1, 1) for end in quantiser.scale_ends(wide, declared))
    assert bool(quantiser.admits(nominal, nominal, (ends[0], ends[1]), declared).all())
    low, high = quantiser.code_ends(wide, nominal, declared)
    place = quantiser.element.ordinal(quantiser.codes(norm, nominal, declared))
    assert bool(((low <= place) & (place <= high)).all())


def test_where_a_nan_hides_what_was_compared_before_it_any_smaller_amax_is_admissible() -> None:
    declared, quantiser = QUANT_FLOWS["dynamic-fp8"]["aiter"], QUANTISERS["dynamic-fp8"]
    norm = torch.tensor([[448.0, NAN, 44.8]])
    nominal, ends = quantiser.scales(norm, declared), quantiser.scale_ends((norm.double(), norm.double()), declared)
    for scale, inside in ((0.1, True), (1.0, True), (NAN, True), (1.5, False)):
        assert bool(quantiser.admits(torch.tensor([[scale]]), nominal, ends, declared)) is inside


def test_a_scale_that_is_no_power_of_two_is_refused_between_two_that_are() -> None:
    declared = QUANT_FLOWS["group-fp8"]["vllm-pow2"]
    quantiser = in_pairs("group-fp8")
    lo, hi = torch.tensor([[1.0]]), torch.tensor([[4.0]])
    stored = torch.tensor([[1.0, 2.0, 3.0, 4.0, 8.0]])
    assert quantiser.admits(stored, lo, (lo, hi), declared).tolist() == [[True, True, False, True, False]]
