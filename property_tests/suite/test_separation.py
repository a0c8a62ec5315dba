"""A kernel judged by a dataflow that is not its own is rejected wherever the two can be told apart."""

from __future__ import annotations

import pytest

from fusecheck import DATAFLOWS
from fusecheck.kernel.plan import Plan
from fusecheck.property_tests.suite.family import emulated, outside

WORLD_SIZE = 4

ANY_NATIVE = {"trtllm-nccl", "nccl-nvls", "multimem-bf16"}
COVERED = {
    "trtllm": {"trtllm-nccl"},
    "trtllm-fp32": {"trtllm-nccl", "flashinfer-cutedsl", "flashinfer-mnnvl-chunked"},
    "flashinfer-fp32": {"flashinfer-mnnvl-twoshot", "flashinfer-mnnvl-chunked"},
    "flashinfer-mnnvl-twoshot": {"flashinfer-fp32", "flashinfer-mnnvl-chunked"},
    "flashinfer-cutedsl": {"trtllm-nccl", "flashinfer-mnnvl-chunked"},
    "torch-symm": {"unfused", *ANY_NATIVE},
    "unfused": ANY_NATIVE,
    "nccl-nvls": {"trtllm-nccl", "multimem-bf16"},
    "multimem-bf16": {"trtllm-nccl", "nccl-nvls"},
    "multimem-fp32": {"unfused", "flashinfer-mnnvl-chunked", *ANY_NATIVE},
}
"""By kernel: the other dataflows whose licences contain it. Native sums in any order contain rank order, the exact sum
and one rounding of a float32 sum, and of four ranks, toward zero, those to nearest; float32 sums in any order contain
rank order and the exact sum; either rounding contains both, and where that is declared the emulator truncates; an
undeclared scaling contains both; the two of FlashInfer are the same arithmetic; trtllm multiplies by the reciprocal
of the scale, torch-symm and the separate ops divide by it, which seldom makes another code: in some of these cases it
does."""


@pytest.mark.parametrize("ran", DATAFLOWS)
def test_only_dataflows_that_contain_the_kernels_own_explain_every_element(ran: str) -> None:
    explained, wanted = set(DATAFLOWS), COVERED.get(ran, set()) | {ran}
    plan = Plan(seed=3, tokens=(3, 12, 33), hidden=(128, 520), schedules=False)
    for problem in (plan.draw(WORLD_SIZE, index).problem for index in range(120)):
        outputs = emulated(problem, DATAFLOWS[ran])
        explained = {name for name in explained if outside(problem, DATAFLOWS[name], outputs) == {}}
        assert wanted <= explained, problem
        if explained == wanted:
            break
    assert explained == wanted
