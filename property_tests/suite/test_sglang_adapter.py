"""The backend of sglang-kernel against stand-ins for its ops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from fusecheck.backends import backend, sglang
from fusecheck.backends.sglang import OPERATIONS, SglangBackend, SglangKernel, op_support
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import Limits, Strategy
from fusecheck.operations import Operation
from fusecheck.problem import Problem
from fusecheck.property_tests.suite.family import outside
from fusecheck.property_tests.suite.lone_rank import LoneRank
from fusecheck.property_tests.suite.sglang_stand_in import Sglang
from fusecheck.quantisers.known import quantiser

CPU = torch.device("cpu")
LIMITS = Limits(16, 256, torch.bfloat16)
QUANTISERS = {
    "none": "dispose",
    "dynamic-fp8": "sgl_per_token_quant_fp8",
    "group-fp8": "sgl_per_token_group_quant_8bit_v2",
    "group-fp8-packed": "sgl_per_token_group_quant_8bit_v2",
}
DYNAMIC = Operation.named("RESIDUAL_RMS_NORM_QUANT_DYNAMIC_FP8")


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sglang]:
    yield from Sglang().lent(monkeypatch)


def _kernel() -> SglangKernel:
    return SglangKernel(LoneRank(group=cast("Any", object())), LIMITS)


def _layouts(op: Operation) -> tuple[str, ...]:
    return quantiser(op.quantiser).layouts if op.returns_scale else ("",)


@pytest.mark.parametrize("bias", [0.0, 1.0])
@pytest.mark.parametrize(("op", "layout"), [(op, layout) for op in OPERATIONS for layout in _layouts(op)], ids=str)
def test_every_operation_calls_the_ops_of_the_wheel_and_passes(
    ops: Sglang, op: Operation, layout: str, bias: float
) -> None:
    problem = Problem(op=op, tokens=9, hidden=256, layout=layout, weight_bias=bias)
    source = Inputs(problem, CPU)
    ops.other = source.partial(1)
    inputs = source.of_rank(0)
    kernel = _kernel()
    outputs = kernel.run(inputs, op=op, strategy=Strategy.AUTO)
    assert outside(problem, SglangBackend().dataflow(problem), outputs) == {}
    assert torch.equal(inputs.residual, source.of_rank(0).residual)
    kernel.close()
    behind = ops.called[ops.called.index("all_reduce") + 1 :]
    norm = ["gemma_fused_add_rmsnorm" if bias else "fused_add_rmsnorm"] if op.norm else []
    assert behind[: len(norm) + 1] == [*norm, QUANTISERS[op.quantiser]]


@pytest.mark.parametrize("change", [{"round_normed": True}, {"norm_reads_rounded": True}])
def test_the_norm_is_of_the_float32_stream_and_rounded_once(ops: Sglang, change: dict[str, Any]) -> None:
    problem = Problem(op=Operation.named("RESIDUAL_RMS_NORM"), tokens=9, hidden=256)
    source = Inputs(problem, CPU)
    ops.other = source.partial(1)
    outputs = _kernel().run(source.of_rank(0), op=problem.op, strategy=Strategy.AUTO)
    other = replace(SglangBackend().dataflow(problem), **change)
    assert outside(problem, other, outputs) != {}


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Problem(world_size=16), "world size 16 is none of"),
        (Problem(weight_bias=0.5), "the kernels know 0 and 1"),
        (Problem(op=Operation.named("RESIDUAL_RMS_NORM_QUANT_FP8")), "sglang-kernel has no kernels for"),
        (Problem(op=Operation.named("RMS_NORM")), "sglang-kernel has no kernels for"),
        (Problem(hidden=57600), "a row of more than 57344 fits no block"),
        (Problem(op=Operation.named("RESIDUAL_RMS_NORM_QUANT_GROUP_FP8_8"), hidden=256), "groups of 8 in rows of 256"),
        (Problem(op=DYNAMIC, tokens=2112, hidden=64), "2112 rows: from 2112 on another kernel"),
    ],
)
def test_what_the_wheel_lacks_is_refused(problem: Problem, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend("sglang").supports(Problem()).reason == "no sglang-kernel with sm90/common_ops.abi3.so is installed"
    monkeypatch.setattr(sglang, "library", lambda: sglang.LIBRARY)
    monkeypatch.setattr(sglang, "rows_of_one_kernel", lambda: 16 * 132)
    plain = Operation.named("RESIDUAL_RMS_NORM")
    if problem.op == Problem().op:  # the default, which has a given scale, is refused for that
        problem = replace(problem, op=plain)
    refused = backend("sglang").supports(problem)
    assert (refused.ok, reason in refused.reason) == (False, True), refused.reason
    for op in (plain, DYNAMIC, Operation.named("RESIDUAL_RMS_NORM_QUANT_GROUP_FP8_64")):
        assert op_support(Problem(op=op, tokens=2111, hidden=192), 2112).ok


def test_on_a_cpu_rank_the_missing_gpu_is_named() -> None:
    with pytest.raises(ValueError, match="sglang on cpu, expected a CUDA device"):
        SglangBackend().open(LoneRank(), LIMITS)
