"""A kernel judged by a dataflow that is not its own is rejected wherever the two can be told apart."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest

from fusecheck import DATAFLOWS
from fusecheck.case.run import request, run_case
from fusecheck.kernel.plan import Plan
from fusecheck.ranks import Pool, values

WORLD_SIZE = 4

COVERED = {
    "trtllm": {"trtllm-nccl", "unfused", "torch-symm"},
    "trtllm-fp32": {"trtllm-nccl", "unfused"},
    "trtllm-nccl": {"unfused"},
    "flashinfer-fp32": {"flashinfer-mnnvl-twoshot"},
    "flashinfer-mnnvl-twoshot": {"flashinfer-fp32"},
    "torch-symm": {"trtllm", "trtllm-nccl", "unfused"},
    "unfused": {"trtllm-nccl"},
}
"""By kernel: the other dataflows whose licences contain it. Native sums in any order contain rank order and one
rounding of a float32 sum; an undeclared scaling contains both; the two of FlashInfer are the same arithmetic; trtllm
multiplies and torch-symm divides by the scale, which seldom makes another code and in none of these cases does."""


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool("fusecheck.case.worker:CaseWorker", WORLD_SIZE, preload=["fusecheck.case.worker"]) as started:
        yield started


@pytest.mark.parametrize("ran", DATAFLOWS)
def test_only_dataflows_that_contain_the_kernels_own_explain_every_element(ran: str, pool: Pool) -> None:
    explained = set(DATAFLOWS)
    wanted = COVERED.get(ran, set()) | {ran}
    for case in islice(Plan(seed=3, most_elements=2**14, schedules=False).cases(WORLD_SIZE), 60):
        assert run_case(pool, request(case.problem, f"emulated:{ran}")).passed
        explained &= set.intersection(*map(set, values(pool.call("explain", timeout=60))))
        assert wanted <= explained
        if explained == wanted:
            break
    assert explained == wanted
