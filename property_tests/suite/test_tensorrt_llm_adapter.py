"""The TensorRT-LLM adapter against ops registered under the published schemas; not yet run on TensorRT-LLM."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor

from fusecheck.backends import backend, tensorrt_llm
from fusecheck.backends.tensorrt_llm import ACCUMULATE, TensorRTLLMBackend, TensorRTLLMKernel, outputs_of, shape_support
from fusecheck.backends.unfused import quantise, rms_norm
from fusecheck.errors import UsageError
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import STATIC_OPS, FusionOp, Limits, RankInputs, Strategy
from fusecheck.oracle import Oracle
from fusecheck.problem import Problem
from fusecheck.property_tests.suite.lone_rank import LoneRank
from fusecheck.verdict import judge_rows

OLD = (
    "allreduce(Tensor input, Tensor? residual, Tensor? norm_weight, Tensor? scale, Tensor? bias, Tensor? workspace,"
    " int[] group, int strategy, int op, float eps) -> Tensor[]"
)
NEW = OLD.replace("float eps)", "float eps, bool trigger_completion_at_end)")
CPU = torch.device("cpu")


class _Stub:
    """The op on two ranks whose partial sums are known here: what the other rank holds is in `others`."""

    def __init__(self) -> None:
        self.others: Tensor = torch.empty(0)
        self.calls: list[tuple[object, ...]] = []

    def __call__(
        self,
        given: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        workspace: Tensor | None,
        group: list[int],
        strategy: int,
        op: int,
        eps: float,
        trigger: bool | None = None,
    ) -> list[Tensor]:
        assert residual is not None
        assert norm_weight is not None
        self.calls.append((tuple(group), strategy, op, eps, trigger, scale is None, bias is None, workspace is None))
        stream = (given + self.others) + residual
        norm = rms_norm(stream, norm_weight, eps, 0.0)
        codes = [] if scale is None else [quantise(norm, scale)]
        return [*([norm] if op in (1, 6) else []), *codes, stream]


@pytest.fixture(params=[OLD, NEW], ids=["without-trigger", "with-trigger"])
def stub(request: pytest.FixtureRequest) -> Iterator[_Stub]:
    made = _Stub()
    library: Any = torch.library.Library("trtllm", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(request.param)
    library.impl("allreduce", made, "CPU")
    try:
        yield made
    finally:
        library._destroy()
        if hasattr(torch.ops.trtllm, "allreduce"):
            delattr(torch.ops.trtllm, "allreduce")


def _kernel(variant: str = "") -> TensorRTLLMKernel:
    return TensorRTLLMKernel(TensorRTLLMBackend(variant), LoneRank(), torch.zeros(7, dtype=torch.int64))


@pytest.mark.parametrize("op", list(STATIC_OPS))
@pytest.mark.parametrize(("variant", "number"), [("", 5), ("nccl", 0), ("min-latency", 1), ("nccl-symmetric", 8)])
def test_every_op_and_strategy_reaches_the_library_by_its_number_and_passes(
    stub: _Stub, op: FusionOp, variant: str, number: int
) -> None:
    problem = Problem(op=op, tokens=4, hidden=64, strategy=Strategy.TWOSHOT)
    source = Inputs(problem, CPU)
    stub.others = source.partial(1)
    outputs = _kernel(variant).run(source.of_rank(0), op=op, strategy=problem.strategy)
    group, strategy, value, eps, trigger, no_scale, no_bias, no_workspace = stub.calls[0]
    assert (group, strategy, value, eps) == ((0, 1), number, tensorrt_llm.FUSION_OPS[op], problem.eps)
    assert trigger in (True, None)
    assert (no_scale, no_bias, no_workspace) == (not op.returns_quant, True, False)
    assert (outputs.norm is not None, outputs.quant is not None) == (op.returns_norm, op.returns_quant)
    flow = TensorRTLLMBackend("nccl").dataflow(problem)
    tallies = judge_rows(Oracle(flow, source.operands(range(4))), outputs, 0)
    assert [tally.outside for tally in tallies] == [0] * len(tallies)


def test_the_schema_of_the_release_decides_about_the_trigger(stub: _Stub) -> None:
    problem = Problem(tokens=4, hidden=64)
    source = Inputs(problem, CPU)
    stub.others = source.partial(1)
    _kernel().run(source.of_rank(0), op=problem.op, strategy=problem.strategy)
    names = [argument.name for argument in torch.ops.trtllm.allreduce.default._schema.arguments]
    assert stub.calls[0][4] is (True if "trigger_completion_at_end" in names else None)


def test_outputs_are_named_in_the_library_order_and_counted() -> None:
    norm, codes, residual = torch.ones(1, 8), torch.full((1, 8), 0x38, dtype=torch.uint8), torch.zeros(1, 8)
    named = outputs_of([norm, codes, residual], FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8)
    assert named.norm is norm
    assert named.residual is residual
    assert named.quant is not None
    assert named.quant.dtype is torch.float8_e4m3fn
    assert outputs_of([norm, residual], FusionOp.RESIDUAL_RMS_NORM).residual is residual
    with pytest.raises(ValueError, match="returned 2 tensors, expected norm, quant, residual"):
        outputs_of([norm, residual], FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8)


def test_a_layout_that_the_op_would_misread_is_refused(stub: _Stub) -> None:
    problem = Problem(tokens=4, hidden=64)
    made = Inputs(problem, CPU).of_rank(0)
    wide = torch.zeros(4, 128, dtype=torch.bfloat16)
    inputs = RankInputs(made.partial, wide[:, ::2], made.gamma, made.scale, made.eps, made.weight_bias)
    with pytest.raises(ValueError, match="residual is not contiguous"):
        _kernel().run(inputs, op=problem.op, strategy=problem.strategy)
    assert stub.calls == []


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Problem(tokens=1, world_size=2, strategy=Strategy.TWOSHOT), "at least one token a rank"),
        (Problem(tokens=129, strategy=Strategy.ONESHOT), "one-shot takes 128 tokens"),
        (Problem(hidden=8200), "no block and cluster size"),
        (Problem(weight_bias=1.0), "no weight bias"),
        (Problem(world_size=1), "world size 1"),
    ],
)
def test_shapes_that_would_end_the_process_are_refused_with_the_reason(problem: Problem, reason: str) -> None:
    support = shape_support(problem)
    assert not support.ok
    assert reason in support.reason


def test_without_the_library_it_says_that_it_has_not_been_run_there() -> None:
    support = backend("tensorrt_llm").supports(Problem())
    assert not support.ok
    assert "not yet run on TensorRT-LLM" in support.reason


@pytest.mark.parametrize(
    ("version", "variable", "dataflow"),
    [
        ("1.3.0rc21", None, "trtllm"),
        ("1.3.0rc21", "0", "trtllm-fp32"),
        ("1.3.0rc15.post1", "1", "trtllm-fp32"),
        ("1.2.1", None, "trtllm"),
        ("1.3.0rc23", "1", "trtllm-fp32"),
        ("1.3.0rc24", None, "trtllm-fp32"),
        ("1.3.0rc24", "0", "trtllm"),
        ("1.3.0", "1", "trtllm-fp32"),
        (None, None, "trtllm-fp32"),
    ],
)
def test_release_and_environment_decide_about_the_sums(
    monkeypatch: pytest.MonkeyPatch, version: str | None, variable: str | None, dataflow: str
) -> None:
    """Pull request 16753 made float32 the default in July 2026."""
    _installed(monkeypatch, version, variable)
    assert TensorRTLLMBackend().dataflow(Problem()).name == dataflow
    other = "native" if dataflow == "trtllm-fp32" else "fp32"
    with pytest.raises(ValueError, match=f"tensorrt_llm:{other}: this release adds up in"):
        TensorRTLLMBackend(other).open(LoneRank(), Limits(4, 64, torch.bfloat16))


def test_the_one_release_that_does_not_tell_is_refused_with_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (None, "0"):
        _installed(monkeypatch, "1.3.0rc23", variable)
        with pytest.raises(ValueError, match=f"depends on the build: set {ACCUMULATE}=1"):
            TensorRTLLMBackend().open(LoneRank(), Limits(4, 64, torch.bfloat16))


def _installed(monkeypatch: pytest.MonkeyPatch, version: str | None, variable: str | None) -> None:
    def answer(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", answer)
    monkeypatch.delenv(ACCUMULATE, raising=False)
    if variable is not None:
        monkeypatch.setenv(ACCUMULATE, variable)


def test_each_variant_declares_its_dataflow_and_unknown_ones_are_refused() -> None:
    names = {v: TensorRTLLMBackend(v).dataflow(Problem()).name for v in ("native", "fp32", "nccl", "fp32,min-latency")}
    assert list(names.values()) == ["trtllm", "trtllm-fp32", "trtllm-nccl", "trtllm-fp32"]
    with pytest.raises(UsageError, match="variant 'ub'"):
        TensorRTLLMBackend("ub")
