"""FlashInfer's sums of experts, patterns 6 and 7, through both APIs against a stand-in for the library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fusecheck.backends import flashinfer
from fusecheck.backends.flashinfer import FlashInferBackend
from fusecheck.backends.flashinfer_experts import expert_refusal
from fusecheck.backends.flashinfer_kernels import LegacyKernel, Options, UnifiedKernel
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import Limits, Strategy
from fusecheck.operations import Operation
from fusecheck.problem import Problem
from fusecheck.property_tests.suite.family import outside
from fusecheck.property_tests.suite.flashinfer_stand_in import FlashInfer
from fusecheck.property_tests.suite.lone_rank import LoneRank

CPU = torch.device("cpu")
REDUCTION, FINALIZE = (Operation.named(f"MOE_{kind}_RESIDUAL_RMS_NORM") for kind in ("REDUCTION", "FINALIZE"))
KINDS: dict[str, type[LegacyKernel | UnifiedKernel]] = {"": LegacyKernel, "unified": UnifiedKernel}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlashInfer]:
    yield from FlashInfer().lent(monkeypatch)


@pytest.mark.parametrize("variant", KINDS)
@pytest.mark.parametrize("op", [REDUCTION, FINALIZE], ids=str)
def test_experts_are_summed_as_declared_through_either_api(library: FlashInfer, variant: str, op: Operation) -> None:
    problem = Problem(op=op, tokens=9, hidden=256, weight_bias=1.0, seed=3)
    source, flow = Inputs(problem, CPU), FlashInferBackend(variant).dataflow(problem)
    library.other = source.partial(1, flow=flow.experts)
    kernel = KINDS[variant](Options(pdl=True), LoneRank(), Limits(16, 256, torch.bfloat16))
    for strategy in (Strategy.ONESHOT, Strategy.AUTO):
        outputs = kernel.run(source.of_rank(0), op=op, strategy=strategy)
        assert outside(problem, flow, outputs) == {}
    other = replace(flow, experts=replace(flow.experts, accumulate="fp32", product_rounded=False))
    assert outside(problem, other, outputs) != {}
    alone = kernel.run(
        replace(source.of_rank(0), experts=replace(source.experts(0), shared=None)), op=op, strategy=strategy
    )
    assert not torch.equal(alone.residual, outputs.residual)
    kernel.close()
    routed = {} if op is REDUCTION else {"routed": None if variant else 2.5}
    assert library.calls == 3 * [{"pattern": 6 if op is REDUCTION else 7, "pdl": True} | routed]


@pytest.mark.parametrize("variant", KINDS)
def test_experts_that_the_kernels_would_misread_never_reach_them(library: FlashInfer, variant: str) -> None:
    kernel = KINDS[variant](Options(), LoneRank(), Limits(16, 256, torch.bfloat16))
    for op, changes, told in (
        (REDUCTION, {"scale": torch.ones(4, 4, 1)}, "experts' scale is"),
        (REDUCTION, {"scale": torch.ones(4, 4, dtype=torch.bfloat16)}, "expected .*float32"),
        (REDUCTION, {"tokens": torch.ones(4, 4, 512, dtype=torch.bfloat16)[..., ::2]}, "tokens is not contiguous"),
        (REDUCTION, {"shared": torch.ones(4, 256)}, "experts' shared is"),
        (FINALIZE, {"rows": torch.zeros(4, 4, dtype=torch.int64)}, "experts' rows is .*int64"),
        (FINALIZE, {"rows": None}, "experts' rows is None"),
        (FINALIZE, {"scale": torch.ones(4, 4)}, "expected .*bfloat16"),
    ):
        made = Inputs(Problem(op=op, tokens=4, hidden=256), CPU).of_rank(0)
        assert made.experts is not None
        wrong = replace(made, experts=replace(made.experts, **changes))
        with pytest.raises(ValueError, match=told):
            kernel.run(wrong, op=op, strategy=Strategy.AUTO)
        with pytest.raises(ValueError, match="without experts"):
            kernel.run(replace(made, experts=None), op=op, strategy=Strategy.AUTO)
        with pytest.raises(ValueError, match="one-shot alone"):
            kernel.run(made, op=op, strategy=Strategy.TWOSHOT)
    kernel.close()
    assert library.calls == []


@pytest.mark.parametrize(
    ("name", "changes", "chip", "told"),
    [
        ("MOE_REDUCTION_RESIDUAL_RMS_NORM", {"hidden": 640}, 9, "no multiple of 256"),
        ("MOE_FINALIZE_RESIDUAL_RMS_NORM", {"hidden": 33 * 256}, 9, "no block and cluster size"),
        ("MOE_FINALIZE_RESIDUAL_RMS_NORM", {"strategy": Strategy.TWOSHOT}, 9, "one-shot alone"),
        ("MOE_REDUCTION_RESIDUAL_RMS_NORM_QUANT_NVFP4", {}, 9, "writes zeros without an error"),
        ("MOE_REDUCTION_RESIDUAL_RMS_NORM_QUANT_NVFP4", {}, 10, "a number on the host"),
        ("MOE_FINALIZE_RESIDUAL_RMS_NORM_QUANT_NVFP4", {}, 10, "never sets NVFP4's factor"),
        ("MOE_FINALIZE_RESIDUAL_RMS_NORM_QUANT_FP8", {}, 9, "a workspace of CuTe DSL"),
        ("MOE_REDUCTION_RESIDUAL_RMS_NORM_QUANT_FP8", {}, 9, "no moe-reduction with static-fp8"),
        ("MOE_REDUCTION_RMS_NORM", {}, 9, "without a residual"),
    ],
)
def test_sums_of_experts_that_the_library_lacks_are_refused(
    name: str, changes: dict[str, int], chip: int, told: str
) -> None:
    problem = Problem(op=Operation.named(name), tokens=5, hidden=7168)
    assert told in expert_refusal(replace(problem, **changes), chip)  # type: ignore[arg-type]


def test_sums_of_experts_are_among_what_is_asked_for_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer, "installed", lambda: "0.6.13")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for op in (REDUCTION, FINALIZE):
        assert op in FlashInferBackend.operations
        for hidden in (256, 7168, 8192, 64 * 256):
            assert FlashInferBackend("pdl").supports(Problem(op=op, hidden=hidden)).ok
        for variant in ("fp32", "early"):
            assert f"no option for the variant {variant}" in FlashInferBackend(variant).supports(Problem(op=op)).reason
