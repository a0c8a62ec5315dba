"""The TensorRT-LLM adapter against ops registered under its schemas; not yet run on TensorRT-LLM."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fusecheck.backends import backend, tensorrt_llm, tensorrt_llm_ops, tensorrt_llm_release
from fusecheck.backends.tensorrt_llm import TensorRTLLMBackend, shape_refusal
from fusecheck.backends.tensorrt_llm_ops import OPERATIONS, number_of, outputs_of
from fusecheck.backends.tensorrt_llm_release import ACCUMULATE, PDL, WITHOUT_MPI
from fusecheck.case.run import request, run_case
from fusecheck.errors import UsageError
from fusecheck.interface import FusionOp, Limits, Operation, Strategy
from fusecheck.problem import Problem
from fusecheck.property_tests.suite import tensorrt_llm_stand_in as stand_in
from fusecheck.property_tests.suite.lone_rank import LoneRank
from fusecheck.ranks import Pool

HERE = stand_in.__name__


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool("fusecheck.case.worker:CaseWorker", 2) as started:
        yield started


def passes(pool: Pool, problem: Problem, name: str = "StandIn") -> bool:
    """Whether real processes with a process group find the stand-in's outputs right; it prints why not."""
    outcome = run_case(pool, request(problem, f"{HERE}:{name}"))
    print(problem, *(f"{each.message} {each.error} {each.traceback}" for each in outcome.findings), sep="\n")
    return outcome.passed


def importable(monkeypatch: pytest.MonkeyPatch, *, peers: bool = True) -> None:
    """Have this process find the stand-in as the library."""
    for name, module in stand_in.modules(peers=peers).items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("op", OPERATIONS, ids=str)
def test_every_op_of_the_library_passes_in_processes_that_are_none_of_mpi(pool: Pool, op: Operation) -> None:
    scale = 700.0 if op.quantiser == "nvfp4" else 0.02
    assert passes(pool, Problem(op=op, tokens=5, hidden=256, strategy=Strategy.ONESHOT, scale=scale))
    assert passes(pool, Problem(op=op, tokens=300, hidden=128, strategy=Strategy.TWOSHOT, scale=scale, dtype="fp16"))


def test_a_sum_of_experts_that_is_not_the_declared_one_is_found(pool: Pool) -> None:
    problem = Problem(op=Operation.named("MOE_FINALIZE_RESIDUAL_RMS_NORM"), tokens=33, hidden=256)
    assert passes(pool, problem)
    assert not passes(pool, problem, "Misdeclared")


def test_scales_in_rows_are_an_op_of_their_own(pool: Pool) -> None:
    op = Operation.named("RESIDUAL_RMS_NORM_OUT_QUANT_NVFP4")
    assert [number_of(op, layout) for layout in ("", "128x4", "linear", "8x4")] == [7, 7, 10, None]
    assert passes(pool, Problem(op=op, tokens=5, hidden=256, layout="linear", scale=700.0))
    assert number_of(Operation.named("RESIDUAL_RMS_NORM_QUANT_NVFP4"), "linear") is None


@pytest.mark.parametrize("tokens", [1, 129, 1000])
def test_what_the_op_makes_of_a_strategy_is_no_refusal(pool: Pool, tokens: int) -> None:
    """One-shot takes any number of rows, two-shot with fewer rows than ranks is one-shot, AUTO may be NCCL."""
    for strategy in Strategy:
        assert passes(pool, Problem(tokens=tokens, hidden=64, strategy=strategy))


def test_what_goes_to_nccl_is_judged_by_the_sums_of_nccl(pool: Pool) -> None:
    for name in ("Nccl", "Cramped"):
        for op in (Operation.RESIDUAL_RMS_NORM_OUT_QUANT_FP8, Operation.named("RMS_NORM")):
            assert passes(pool, Problem(op=op, tokens=64, hidden=256, strategy=Strategy.ONESHOT), name)
    large = Problem(tokens=2**14, hidden=4096, strategy=Strategy.ONESHOT)
    assert TensorRTLLMBackend().dataflow(large).name == "trtllm-nccl"
    assert TensorRTLLMBackend().dataflow(replace(large, tokens=8192)).name == "trtllm-fp32"


@pytest.mark.parametrize("name", ["ALL_REDUCE", "RESIDUAL_RMS_NORM", "RESIDUAL_RMS_NORM_OUT_QUANT_FP8"])
def test_the_op_over_multicast_memory_takes_what_it_has_since_it_has_fp8(pool: Pool, name: str) -> None:
    problem = Problem(op=Operation.named(name), tokens=9, hidden=256)
    assert passes(pool, problem, "Mnnvl")
    refused = TensorRTLLMBackend("mnnvl")._refused(replace(problem, op=Operation.named("RMS_NORM")))
    assert refused == "mnnvl_fusion_allreduce has no RMS_NORM"


def test_auto_is_the_fused_kernel_for_certain_where_the_table_of_sm_90_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(tokens=2048, hidden=4096, strategy=Strategy.AUTO)
    flows = {}
    for chip in (9, 10):
        monkeypatch.setattr(tensorrt_llm, "capability", lambda chip=chip: chip)
        for found in (
            problem,
            replace(problem, tokens=2049),
            replace(problem, hidden=64),
            replace(problem, hidden=16384),
        ):
            flows[chip, found.tokens, found.hidden] = TensorRTLLMBackend().dataflow(found).name
    assert [where for where, name in flows.items() if name == "trtllm-fp32"] == [(9, 2048, 4096)]
    monkeypatch.setattr(tensorrt_llm, "capability", lambda: 9)
    for alone in ("RESIDUAL_RMS_NORM_QUANT_NVFP4", "RESIDUAL_RMS_NORM_OUT_QUANT_MXFP8"):
        why = TensorRTLLMBackend()._refused(replace(problem, op=Operation.named(alone)))
        assert "on capability 9 writes nothing" in why


def test_programmatic_dependent_launch_is_on_unless_it_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PDL, raising=False)
    assert (TensorRTLLMBackend().pdl, TensorRTLLMBackend("nccl").pdl) == (True, False)
    monkeypatch.setenv(PDL, "0")
    assert not TensorRTLLMBackend().pdl


def test_ranks_without_access_to_each_others_memory_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    importable(monkeypatch, peers=False)
    with pytest.raises(
        RuntimeError, match="without peer-to-peer access every call goes to NCCL; ask tensorrt_llm:nccl"
    ):
        tensorrt_llm_ops.workspace(LoneRank())
    importable(monkeypatch)
    assert tensorrt_llm_ops.workspace(LoneRank()).shape == (8,)


def test_a_rank_needs_a_group_and_a_release_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    importable(monkeypatch)
    with pytest.raises(ValueError, match="needs a process group of the ranks"):
        TensorRTLLMBackend().open(LoneRank(), Limits(4, 64, torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"neither torch.ops.trtllm nor .* has allreduce_of_tomorrow"):
        tensorrt_llm_ops.operator("allreduce_of_tomorrow")
    monkeypatch.setenv(WITHOUT_MPI, "0")
    with pytest.raises(ValueError, match=f"{WITHOUT_MPI}=0: the ranks are no processes of MPI"):
        TensorRTLLMBackend().open(LoneRank(), Limits(4, 64, torch.bfloat16))


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


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Problem(hidden=8, tokens=4, strategy=Strategy.TWOSHOT), "fewer threads in a block than ranks"),
        (Problem(hidden=24, tokens=4, world_size=4, strategy=Strategy.AUTO), "fewer threads in a block than ranks"),
        (Problem(hidden=8200), "no block and cluster size"),
        (Problem(weight_bias=1.0), "no weight bias"),
        (Problem(world_size=1), "world size 1"),
    ],
)
def test_shapes_that_would_end_the_process_are_refused_with_the_reason(problem: Problem, reason: str) -> None:
    assert reason in shape_refusal(problem, None)
    assert shape_refusal(replace(problem, hidden=4096, weight_bias=0.0, world_size=4), None) == ""


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"op": Operation.named("RESIDUAL_RMS_NORM_QUANT_DYNAMIC_FP8")},
            "TensorRT-LLM has no RESIDUAL_RMS_NORM_QUANT_DY",
        ),
        ({"op": Operation.named("RESIDUAL_RMS_NORM_OUT_QUANT_MXFP8"), "hidden": 96}, "no multiple of 128"),
        (
            {"op": Operation.named("RESIDUAL_RMS_NORM_QUANT_NVFP4"), "layout": "linear"},
            "no scales in the layout linear",
        ),
    ],
)
def test_what_the_library_does_not_have_is_refused_with_the_reason(fields: dict[str, object], reason: str) -> None:
    assert reason in TensorRTLLMBackend()._refused(Problem(**fields))  # type: ignore[arg-type]


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
    assert TensorRTLLMBackend().dataflow(Problem(strategy=Strategy.ONESHOT)).name == dataflow
    other = "native" if dataflow == "trtllm-fp32" else "fp32"
    with pytest.raises(ValueError, match=f"tensorrt_llm:{other}: this release adds up in"):
        TensorRTLLMBackend(other).open(LoneRank(), Limits(4, 64, torch.bfloat16))


def test_the_one_release_that_does_not_tell_is_refused_with_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (None, "0"):
        _installed(monkeypatch, "1.3.0rc23", variable)
        with pytest.raises(ValueError, match=f"depends on the build: set {ACCUMULATE}=1"):
            TensorRTLLMBackend().open(LoneRank(), Limits(4, 64, torch.bfloat16))


def _installed(monkeypatch: pytest.MonkeyPatch, version: str | None, variable: str | None) -> None:
    monkeypatch.setattr(tensorrt_llm_release, "release_of", {"tensorrt_llm": version}.get)
    monkeypatch.delenv(ACCUMULATE, raising=False)
    if variable is not None:
        monkeypatch.setenv(ACCUMULATE, variable)


def test_finalize_adds_experts_up_in_float32_from_the_release_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pull request 16778."""
    finalize, reduction = (Operation.named(f"MOE_{kind}_RESIDUAL_RMS_NORM") for kind in ("FINALIZE", "REDUCTION"))
    for version, wide in (("1.3.0rc22", "native"), ("1.3.0rc24", "fp32")):
        _installed(monkeypatch, version, "1")
        flows = [TensorRTLLMBackend().dataflow(Problem(op=op, hidden=128)).experts for op in (finalize, reduction)]
        assert [flow.accumulate for flow in flows] == [wide, "native"]


def test_each_variant_declares_its_dataflow_and_unknown_ones_are_refused() -> None:
    asked = Problem(strategy=Strategy.ONESHOT)
    names = {
        v: TensorRTLLMBackend(v).dataflow(asked).name for v in ("native", "fp32", "nccl", "fp32,min-latency", "mnnvl")
    }
    assert list(names.values()) == ["trtllm", "trtllm-fp32", "trtllm-nccl", "trtllm-fp32", "trtllm-mnnvl"]
    with pytest.raises(UsageError, match="variant 'ub'"):
        TensorRTLLMBackend("ub")
