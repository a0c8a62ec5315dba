"""The FlashInfer backends against a stand-in for the library."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from fusecheck.backends import backend, flashinfer, flashinfer_norm
from fusecheck.backends.flashinfer import FlashInferBackend, refused_gpu, refused_here
from fusecheck.backends.flashinfer_kernels import LegacyKernel, Options, UnifiedKernel
from fusecheck.backends.flashinfer_limits import ONESHOT_BYTES, picks_oneshot, shape_support
from fusecheck.backends.flashinfer_norm import FlashInferNormBackend, FlashInferNormKernel
from fusecheck.backends.flashinfer_patterns import declared, op_support, shares_memory
from fusecheck.backends.packages import release_of
from fusecheck.dataflow import DATAFLOWS
from fusecheck.errors import UsageError
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import STATIC_OPS, FusionOp, Limits, Strategy
from fusecheck.operations import Operation
from fusecheck.problem import Call, Problem
from fusecheck.property_tests.suite.family import outside
from fusecheck.property_tests.suite.flashinfer_stand_in import FlashInfer
from fusecheck.property_tests.suite.lone_rank import LoneRank

CPU = torch.device("cpu")
LIMITS = Limits(16, 256, torch.bfloat16)


PATTERNS = {
    1: Operation.named("kARResidualRMSNorm"),
    2: Operation.named("kARResidualRMSNormFP8Quant"),
    4: Operation.named("kARResidualRMSNormOutFP8Quant"),
    8: Operation.named("kARResidualRMSNormPerTokenGroupFP8PackedQuant"),
    9: Operation.named("RESIDUAL_RMS_NORM_OUT_QUANT_GROUP_FP8_PACKED_64"),
    10: Operation.named("kARResidualRMSNormDynamicFP8Quant"),
    11: Operation.named("kARResidualRMSNormOutDynamicFP8Quant"),
    13: Operation.named("kARResidualRMSNormMXFP8Quant"),
    14: Operation.named("kARResidualRMSNormOutMXFP8Quant"),
}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlashInfer]:
    yield from FlashInfer().lent(monkeypatch)


@pytest.mark.parametrize("kind", [LegacyKernel, UnifiedKernel])
@pytest.mark.parametrize("op", PATTERNS.values(), ids=map(str, PATTERNS))
def test_both_apis_pass_the_same_arguments_and_give_everything_back(
    library: FlashInfer, kind: type[LegacyKernel | UnifiedKernel], op: FusionOp
) -> None:
    problem = Problem(op=op, tokens=9, hidden=256, weight_bias=1.0)
    source = Inputs(problem, CPU)
    library.other = source.partial(1)
    kernel = kind(Options(fp32=True, pdl=True, early=True), LoneRank(), LIMITS)
    for strategy in Strategy:
        outputs = kernel.run(source.of_rank(0), op=op, strategy=strategy)
        assert outside(problem, DATAFLOWS["flashinfer-fp32"], outputs) == {}
    kernel.close()
    pattern = next(number for number, each in PATTERNS.items() if each == op)
    told = {"pattern": pattern, "pdl": True, "end": False, "fp32": True}
    assert library.calls == [told | {"oneshot": choice} for choice in (True, False, None)]


@pytest.mark.parametrize("kind", [LegacyKernel, UnifiedKernel])
def test_layouts_that_the_kernel_would_misread_never_reach_it(
    library: FlashInfer, kind: type[LegacyKernel | UnifiedKernel]
) -> None:
    problem = Problem(tokens=4, hidden=64)
    made = Inputs(problem, CPU).of_rank(0)
    spread = torch.zeros(4, 128, dtype=torch.bfloat16)[:, ::2]
    shifted = torch.zeros(65, dtype=torch.bfloat16)[1:]
    kernel = kind(Options(), LoneRank(), LIMITS)
    for wrong, told in (
        (replace(made, residual=spread), "residual is not contiguous"),
        (replace(made, gamma=shifted), "gamma is not 16-byte aligned"),
        (replace(made, gamma=made.gamma.float()), "gamma is torch.float32"),
    ):
        with pytest.raises(ValueError, match=told):
            kernel.run(wrong, op=problem.op, strategy=problem.strategy)
    kernel.close()
    assert library.calls == []


@pytest.mark.parametrize(
    ("op", "bias"), [*((op, 0.0) for op in STATIC_OPS), (FusionOp.RESIDUAL_RMS_NORM, 1.0)], ids=str
)
def test_norm_kernels_work_on_copies_and_pass_under_their_dataflow(
    library: FlashInfer, op: FusionOp, bias: float
) -> None:
    problem = Problem(op=op, tokens=9, hidden=256, world_size=1, weight_bias=bias, scale=0.0123)
    chosen = FlashInferNormBackend()
    made = Inputs(problem, CPU).of_rank(0)
    before = [tensor.clone() for tensor in (made.partial, made.residual, made.gamma)]
    outputs = FlashInferNormKernel(LoneRank(world_size=1)).run(made, op=op, strategy=problem.strategy)
    for tensor, kept in zip((made.partial, made.residual, made.gamma), before, strict=True):
        assert torch.equal(tensor, kept)
    assert outside(problem, chosen.dataflow(problem), outputs) == {}
    if op.returns_quant:
        assert outside(problem, replace(chosen.dataflow(problem), round_norm=True), outputs) != {}


def test_norm_kernels_are_those_in_cuda_even_if_others_are_installed(library: FlashInfer) -> None:
    vars(sys.modules["flashinfer.norm"])["_USE_CUDA_NORM"] = False
    with pytest.raises(RuntimeError, match="FLASHINFER_USE_CUDA_NORM=1: set it before the ranks start"):
        FlashInferNormKernel(LoneRank(world_size=1))


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Problem(hidden=65536), "fits no block"),
        (Problem(weight_bias=1.0, op=FusionOp.RESIDUAL_RMS_NORM_QUANT_FP8), "no weight bias"),
    ],
)
def test_what_the_norm_kernels_lack_is_refused(problem: Problem, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_norm, "installed", lambda: "0.7.2.post1")
    support = backend("flashinfer-norm").supports(problem)
    assert not support.ok
    assert reason in support.reason
    assert backend("flashinfer-norm").supports(Problem(world_size=1)).ok


@pytest.mark.parametrize(
    ("version", "told"),
    [
        (None, "flashinfer-python is not installed"),
        ("0.6.12", "older than 0.6.13"),
        ("0.6.13", None),
        ("0.7.2.post1", None),
        ("unknown", None),
    ],
)
def test_releases_before_the_first_that_was_tried_are_refused(version: str | None, told: str | None) -> None:
    reason = refused_here(version)
    assert (reason is None) == (told is None)
    assert told is None or told in str(reason)


@pytest.mark.parametrize(
    ("version", "found"), [("0.7.4", "0.7.4"), (None, "unknown")], ids=["installed", "without metadata"]
)
def test_the_release_is_looked_up_once_for_all_the_cases_of_a_run(
    monkeypatch: pytest.MonkeyPatch, version: str | None, found: str
) -> None:
    asked: list[str] = []

    def answer(name: str) -> str:
        asked.append(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", answer)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: SimpleNamespace(origin="flashinfer/__init__.py"))
    for cached in (flashinfer.installed, release_of):
        cached.cache_clear()
    told = [flashinfer.installed() for _ in range(5)]
    for cached in (flashinfer.installed, release_of):
        cached.cache_clear()
    assert told == [found] * 5
    assert asked == ["flashinfer-python"]


def test_a_gpu_that_the_kernel_is_not_built_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(flashinfer, "installed", lambda: "0.7.2.post1")
    refused_gpu.cache_clear()
    support = FlashInferBackend().supports(Problem())
    refused_gpu.cache_clear()
    assert support.reason == "NVIDIA A100 has capability 8.0, the kernel is built for 9, 10 and 12"


@pytest.mark.parametrize(("world_size", "narrow"), [(2, 8), (4, 24), (8, 56), (16, 120)])
def test_rows_with_fewer_threads_than_ranks_are_refused_to_the_two_shot_kernel_only(
    world_size: int, narrow: int
) -> None:
    problem = Problem(tokens=33, world_size=world_size, strategy=Strategy.TWOSHOT, hidden=narrow)
    assert "fewer threads in a block than ranks" in shape_support(problem).reason
    assert shape_support(replace(problem, hidden=narrow + 8)).ok
    assert shape_support(replace(problem, strategy=Strategy.ONESHOT)).ok


@pytest.mark.parametrize("kind", [LegacyKernel, UnifiedKernel])
@pytest.mark.parametrize("strategy", [Strategy.ONESHOT, Strategy.AUTO])
def test_a_workspace_whose_offsets_overflow_never_sees_a_one_shot_call(
    library: FlashInfer, kind: type[LegacyKernel | UnifiedKernel], strategy: Strategy
) -> None:
    small, largest = Problem(tokens=4, hidden=64, strategy=strategy), Problem(tokens=16384, hidden=16384)
    library.other = Inputs(small, CPU).partial(1)
    assert shape_support(replace(largest, tokens=16383)).ok
    assert "overflows an int32" in shape_support(replace(largest, strategy=strategy)).reason
    assert shape_support(replace(largest, strategy=Strategy.TWOSHOT)).ok
    assert "overflows an int32" in shape_support(replace(largest, tokens=1, schedule=(Call(16384),))).reason
    kernel = kind(Options(), LoneRank(), Limits(16384, 16384, torch.bfloat16))
    with pytest.raises(ValueError, match="1073741824 bytes a third overflows an int32"):
        kernel.run(Inputs(small, CPU).of_rank(0), op=small.op, strategy=strategy)
    assert library.calls == []
    kernel.run(Inputs(small, CPU).of_rank(0), op=small.op, strategy=Strategy.TWOSHOT)
    kernel.close()


@pytest.mark.parametrize(("world_size", "tokens"), [(2, 64), (4, 8), (8, 2)])
def test_which_kernel_runs_is_decided_as_flashinfer_decides(world_size: int, tokens: int) -> None:
    elements = ONESHOT_BYTES[world_size] // (4 * world_size)
    hidden = elements // tokens
    assert picks_oneshot(world_size, tokens, hidden, Strategy.AUTO)
    assert not picks_oneshot(world_size, tokens, hidden + 8, Strategy.AUTO)
    assert picks_oneshot(world_size, tokens, hidden + 8, Strategy.ONESHOT)
    assert not picks_oneshot(world_size, tokens, 8, Strategy.TWOSHOT)


def test_the_unified_variant_is_named_combined_and_refused_to_virtual_ranks() -> None:
    chosen = FlashInferBackend("fp32,unified")
    assert (chosen.name, chosen.unified, chosen.fp32) == ("flashinfer:fp32,unified", True, True)
    assert chosen.dataflow(Problem()).name == "flashinfer-fp32"
    rank = LoneRank(device=torch.device("cuda", 0))
    vars(rank)["board"] = object()
    with pytest.raises(ValueError, match="leave the variant unified out"):
        chosen.open(rank, LIMITS)
    with pytest.raises(UsageError, match="flashinfer variant 'legacy', expected of: fp32, pdl, early, unified"):
        FlashInferBackend("legacy")


@pytest.mark.parametrize("name", ["flashinfer", "flashinfer:unified", "flashinfer-norm"])
def test_on_a_cpu_rank_the_missing_gpu_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="on cpu, expected a CUDA device"):
        backend(name).open(LoneRank(), LIMITS)


@pytest.mark.parametrize(
    ("op", "hidden", "release", "chip", "reason"),
    [
        ("RESIDUAL_RMS_NORM_QUANT_DYNAMIC_FP8", 256, (0, 6, 13), 9, "dynamic-fp8 came with flashinfer-python 0.6.18"),
        ("RESIDUAL_RMS_NORM_QUANT_MXFP8", 256, (0, 7, 2), 9, "mxfp8 came with flashinfer-python 0.7.4"),
        ("RESIDUAL_RMS_NORM_QUANT_NVFP4", 256, (0, 7, 4), 9, "NVFP4 on capability 9 writes zeros without an error"),
        ("RESIDUAL_RMS_NORM_QUANT_MXFP8", 264, (0, 7, 4), 9, "hidden 264 is no multiple of 32, the group of MXFP8"),
        ("RESIDUAL_RMS_NORM_QUANT_GROUP_FP8_PACKED_96", 256, (0, 7, 4), 9, "groups of 96 in rows of 256"),
        ("RESIDUAL_RMS_NORM_QUANT_GROUP_FP8", 256, (0, 7, 4), 9, "FlashInfer has no pattern with group-fp8"),
        ("LOCAL_RESIDUAL_RMS_NORM", 256, (0, 7, 4), 9, "no operation without a collective"),
        ("RMS_NORM", 256, (0, 7, 4), 9, "no pattern with a norm and without a residual"),
    ],
)
def test_an_operation_that_a_release_or_chip_lacks_is_refused_with_what_has_it(
    op: str, hidden: int, release: tuple[int, ...], chip: int, reason: str
) -> None:
    refused = op_support(Operation.named(op), hidden, release, chip)
    assert (refused.ok, reason in refused.reason) == (False, True), refused.reason
    for each in PATTERNS.values():
        assert op_support(each, 256, (0, 7, 4), 9).ok


def test_groups_that_meet_in_shared_memory_have_rules_of_their_own() -> None:
    shared = {group: shares_memory(group) for group in (16, 32, 48, 64, 96, 128, 256, 512)}
    assert [group for group, through in shared.items() if through] == [48, 96, 512]
    op = Operation.named("RESIDUAL_RMS_NORM_QUANT_GROUP_FP8_PACKED_96")
    assert declared(DATAFLOWS["flashinfer"], op).quant(op.quantiser).amax_nan == "bits"
    assert DATAFLOWS["flashinfer"].quant(op.quantiser).amax_nan == "drop"
