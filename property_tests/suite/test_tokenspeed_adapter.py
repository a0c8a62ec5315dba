"""The backend of tokenspeed-kernel against a stand-in for the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fusecheck.backends import backend, flashinfer, tokenspeed
from fusecheck.backends.flashinfer_kernels import LegacyKernel
from fusecheck.backends.tokenspeed import LAYOUT, TokenSpeedBackend, op_support
from fusecheck.errors import UsageError
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import Limits, Strategy
from fusecheck.operations import Operation
from fusecheck.problem import Problem
from fusecheck.property_tests.suite.family import outside
from fusecheck.property_tests.suite.lone_rank import LoneRank
from fusecheck.property_tests.suite.tokenspeed_stand_in import TokenSpeed

CPU = torch.device("cpu")
PATTERNS = {
    0: Operation.named("ALL_REDUCE"),
    1: Operation.named("kARResidualRMSNorm"),
    2: Operation.named("kARResidualRMSNormFP8Quant"),
    4: Operation.named("kARResidualRMSNormOutFP8Quant"),
    6: Operation.named("RESIDUAL_RMS_NORM_QUANT_GROUP_FP8"),
}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[TokenSpeed]:
    yield from TokenSpeed().lent(monkeypatch)


@pytest.mark.parametrize(("pattern", "op"), PATTERNS.items(), ids=map(str, PATTERNS))
def test_every_pattern_of_the_fork_is_called_by_its_number_and_passes(
    library: TokenSpeed, pattern: int, op: Operation
) -> None:
    layout = LAYOUT if op.returns_scale else ""
    problem = Problem(op=op, tokens=9, hidden=256, layout=layout, scale=0.0123)
    source, chosen = Inputs(problem, CPU), TokenSpeedBackend("fp32,pdl,early")
    library.other = source.partial(1)
    kernel = LegacyKernel(chosen.options(), LoneRank(), Limits(16, 256, torch.bfloat16))
    for strategy in Strategy:
        outputs = kernel.run(source.of_rank(0), op=op, strategy=strategy)
        assert outside(problem, chosen.dataflow(problem), outputs) == {}
    kernel.close()
    told = {"pattern": pattern, "pdl": True, "end": False, "fp32": True}
    assert library.calls == [told | {"oneshot": choice} for choice in (True, False, None)]


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Problem(op=PATTERNS[6], hidden=256), "only in the layout column-major-aligned"),
        (Problem(op=PATTERNS[1], weight_bias=1.0), "no weight bias"),
        (Problem(op=Operation.named("RESIDUAL_RMS_NORM_OUT_QUANT_GROUP_FP8"), hidden=256), "no pattern for"),
        (Problem(op=Operation.named("RESIDUAL_RMS_NORM_QUANT_MXFP8"), hidden=256), "no pattern for"),
        (Problem(op=Operation.named("RMS_NORM")), "no pattern for"),
    ],
)
def test_what_the_fork_has_no_pattern_for_is_refused(problem: Problem, reason: str) -> None:
    refused = op_support(problem)
    assert (refused.ok, reason in refused.reason) == (False, True), refused.reason
    for op in PATTERNS.values():
        assert op_support(replace(Problem(op=op, hidden=256), layout=LAYOUT if op.returns_scale else "")).ok


def test_without_the_package_or_its_gpu_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenspeed, "installed", lambda: False)
    assert backend("tokenspeed").supports(Problem()).reason == "tokenspeed-kernel is not installed"
    monkeypatch.setattr(tokenspeed, "installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX")
    flashinfer.refused_gpu.cache_clear()
    told = backend("tokenspeed").supports(Problem()).reason
    flashinfer.refused_gpu.cache_clear()
    assert told == "NVIDIA RTX has capability 12.0, the kernel is built for 9 and 10"
    with pytest.raises(UsageError, match="tokenspeed variant 'unified', expected of: fp32, pdl, early"):
        TokenSpeedBackend("unified")
