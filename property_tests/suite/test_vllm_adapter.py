"""The backend of vLLM's kernels against stand-ins for its ops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from fusecheck.backends import backend, vllm
from fusecheck.backends.vllm import OPERATIONS, VllmBackend, VllmKernel, op_support
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import Limits, Strategy
from fusecheck.operations import Operation
from fusecheck.problem import Problem
from fusecheck.property_tests.suite.family import outside
from fusecheck.property_tests.suite.lone_rank import LoneRank
from fusecheck.property_tests.suite.vllm_stand_in import Vllm
from fusecheck.quantisers.known import quantiser

CPU = torch.device("cpu")
LIMITS = Limits(16, 256, torch.bfloat16)
FUSED = {
    "QUANT_FP8": "fused_add_rms_norm_static_fp8_quant",
    "QUANT_DYNAMIC_FP8": "rms_norm_dynamic_per_token_quant",
    "QUANT_GROUP_FP8": "rms_norm_per_block_quant",
}

ROUNDED_TWICE = [Operation.named(f"RESIDUAL_RMS_NORM_{name}") for name in FUSED if name != "QUANT_FP8"]
"""Whose norm is rounded before the product with gamma, too."""


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vllm]:
    yield from Vllm().lent(monkeypatch)


def _kernel(limits: Limits = LIMITS) -> VllmKernel:
    return VllmKernel(LoneRank(group=cast("Any", object())), limits)


def _layouts(op: Operation) -> tuple[str, ...]:
    return quantiser(op.quantiser).layouts if op.returns_scale else ("",)


@pytest.mark.parametrize("op", [op for op in OPERATIONS if op.returns_scale], ids=str)
def test_codes_of_nan_are_those_that_the_kernels_have_on_a_chip(ops: Vllm, op: Operation) -> None:
    layout = _layouts(op)[0]
    problem = Problem(op=op, tokens=9, hidden=1024, layout=layout, gamma="groups", family="special-groups")
    source, flow = Inputs(problem, CPU), VllmBackend().dataflow(problem)
    ops.other = source.partial(1)
    kernel = _kernel(Limits(16, 1024, torch.bfloat16))
    outputs = kernel.run(source.of_rank(0), op=op, strategy=Strategy.AUTO)
    assert outside(problem, flow, outputs) == {}
    assert flow.quant(op.quantiser).code_of_nan == ("-max" if "per_token_group" in ops.called[-1] else "+max")
    kernel.close()


@pytest.mark.parametrize(("op", "layout"), [(op, layout) for op in OPERATIONS for layout in _layouts(op)], ids=str)
def test_every_operation_calls_the_ops_of_vllm_and_passes(ops: Vllm, op: Operation, layout: str) -> None:
    problem = Problem(op=op, tokens=9, hidden=256, layout=layout, scale=0.0123)
    source, flow = Inputs(problem, CPU), VllmBackend().dataflow(problem)
    ops.other = source.partial(1)
    inputs = source.of_rank(0)
    kept = [tensor.clone() for tensor in (inputs.partial, inputs.residual, inputs.gamma)]
    kernel = _kernel()
    outputs = kernel.run(inputs, op=op, strategy=Strategy.AUTO)
    assert outside(problem, flow, outputs) == {}
    if op.norm and op.quantiser != "none":
        other = replace(flow, round_normed=not flow.round_normed)
        assert (flow.round_normed, outside(problem, other, outputs) != {}) == (op in ROUNDED_TWICE, True)
    for tensor, before in zip((inputs.partial, inputs.residual, inputs.gamma), kept, strict=True):
        assert torch.equal(tensor, before)
    kernel.close()
    behind = ops.called[ops.called.index("all_reduce") + 1]
    expected = FUSED.get(op.name.removeprefix("RESIDUAL_RMS_NORM_"), "fused_add_rms_norm")
    assert behind == (expected if op.norm else "dispose")


def test_a_call_beyond_the_workspace_never_reaches_the_all_reduce(ops: Vllm) -> None:
    problem = Problem(tokens=17, hidden=256)
    kernel = _kernel()
    with pytest.raises(ValueError, match="partial has 8704 bytes, the workspace takes 8192"):
        kernel.run(Inputs(problem, CPU).of_rank(0), op=problem.op, strategy=problem.strategy)
    kernel.close()
    assert "all_reduce" not in ops.called


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Problem(world_size=16), "world size 16 is none of"),
        (Problem(weight_bias=1.0), "no weight bias"),
        (Problem(op=Operation.named("RESIDUAL_RMS_NORM_QUANT_MXFP8"), hidden=256), "is not adapted"),
        (Problem(op=Operation.named("RMS_NORM")), "is not adapted"),
        (Problem(op=Operation.named("RESIDUAL_RMS_NORM_QUANT_GROUP_FP8"), hidden=33024), "multiple of 128 up to 32768"),
    ],
)
def test_what_vllm_lacks_is_refused(problem: Problem, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend("vllm").supports(Problem()).reason == "no vLLM with _C_stable_libtorch.abi3.so is installed"
    monkeypatch.setattr(vllm, "library", lambda: vllm.LIBRARY)
    refused = backend("vllm").supports(problem)
    assert (refused.ok, reason in refused.reason) == (False, True), refused.reason
    assert backend("vllm").supports(Problem()).ok
    assert op_support(replace(Problem(), hidden=256)).ok


def test_on_a_cpu_rank_the_missing_gpu_is_named() -> None:
    with pytest.raises(ValueError, match="vllm on cpu, expected a CUDA device"):
        VllmBackend().open(LoneRank(), LIMITS)
    with pytest.raises(ValueError, match="virtual ranks have none"):
        VllmBackend().open(LoneRank(device=torch.device("cuda", 0)), LIMITS)
