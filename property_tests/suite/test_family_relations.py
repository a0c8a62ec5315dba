"""Relations that hold for every quantiser: of the emulated kernel, and of the nominal values that judge it.

What is drawn shrinks to one group of the least format.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusecheck import DATAFLOWS, Operation, Problem
from fusecheck.backends.emulated_quantise import Quantising
from fusecheck.property_tests.suite.family import emulated, outside
from fusecheck.quantflow import QUANT_FLOWS, QuantFlow
from fusecheck.quantisers.known import quantiser

NAMES = [name for name in QUANT_FLOWS if name != "static-fp8"]
POWERS = ["group-fp8-packed", "mxfp8", "mxfp4"]
GROUPS = (8, 16, 32, 64, 128)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, QuantFlow]:
    """A call of one quantiser, its group and layout among what is drawn, and how it computes."""
    name = draw(st.sampled_from(NAMES), label="format")
    rules = QUANT_FLOWS[name][draw(st.sampled_from(sorted(QUANT_FLOWS[name])), label="rules")]
    if name.startswith("group-fp8"):
        group = draw(st.sampled_from(GROUPS), label="group")
        name = name if group == 128 else f"{name}-{group}"
    of = quantiser(name)
    norm_out = draw(st.booleans(), label="norm returned")
    op = Operation.named(f"RESIDUAL_RMS_NORM{'_OUT' * norm_out}_QUANT_{name.upper().replace('-', '_')}")
    problem = Problem(
        op=op,
        dtype=draw(st.sampled_from(("bf16", "fp16")), label="dtype"),
        tokens=draw(st.integers(1, 9), label="tokens"),
        hidden=max(8, of.group or 8) * draw(st.integers(1, 5), label="groups"),
        layout=draw(st.sampled_from(of.layouts), label="layout"),
        family=draw(st.sampled_from(("gaussian", "outliers", "special", "one-hot", "overflow")), label="family"),
        scale=draw(st.sampled_from((1.0, 448.0 * 6, 0.01)), label="given scale"),
        seed=draw(st.integers(0, 2**16), label="seed"),
    )
    return problem, rules


@given(problems())
@settings(max_examples=150, deadline=None)
def test_the_emulated_kernel_conforms_in_every_group_and_layout(drawn: tuple[Problem, QuantFlow]) -> None:
    problem, rules = drawn
    flow = replace(DATAFLOWS["vllm-c"], quants=((problem.op.quantiser, rules),))
    assert outside(problem, flow, emulated(problem, flow)) == {}


def made(name: str, rules: QuantFlow, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and codes of the emulated kernel, and of the nominal, which must be the same where both are one value."""
    of = quantiser(name)
    given_factor = torch.tensor([2688.0])
    scales, codes = Quantising(of, rules, given_factor, torch.bfloat16).run(norm.float())
    assert torch.equal(codes, of.codes(norm, scales, rules, 2688.0)) or rules.code_rule in ("approx", "rcp")
    return scales, codes


def rows(seed: int, hidden: int = 256) -> Tensor:
    return torch.randn(6, hidden, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@pytest.mark.parametrize("name", POWERS)
def test_a_norm_twice_as_large_has_exponents_one_higher_and_the_same_codes(name: str) -> None:
    for rules in QUANT_FLOWS[name].values():
        (scales, codes), (doubled, same) = (made(name, rules, factor * rows(1)) for factor in (1, 2))
        assert torch.equal(doubled.int(), scales.int() + 1), rules.name
        assert torch.equal(codes, same), rules.name


@pytest.mark.parametrize("name", [name for name in NAMES if name != "dynamic-fp8"])
def test_a_group_alone_is_a_group_in_a_row_and_groups_may_change_places(name: str) -> None:
    size = quantiser(name).group
    assert size is not None
    for rules in QUANT_FLOWS[name].values():
        norm = rows(2)
        scales, codes = made(name, rules, norm)
        alone = made(name, rules, norm[:, size : 2 * size])
        assert torch.equal(alone[0], scales[:, 1:2])
        assert torch.equal(alone[1], codes[:, size : 2 * size])
        turned = made(name, rules, norm.roll(size, -1))
        assert torch.equal(turned[0], scales.roll(1, -1))
        assert torch.equal(turned[1], codes.roll(size, -1))
