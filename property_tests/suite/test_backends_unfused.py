"""The unfused reference keeps to its declaration: any order over ranks, one rounding a step, division."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fusecheck import backends
from fusecheck.backends import unfused
from fusecheck.backends.unfused import UnfusedBackend
from fusecheck.interface import STATIC_OPS, FusionOp, Limits, RankInputs, Strategy
from fusecheck.problem import Problem
from fusecheck.property_tests.suite.backend_calls import (
    Call,
    Outputs,
    as_bytes,
    e4m3_codes,
    float32,
    floats,
    normalised,
    residual_in_rank_order,
    rounded,
    steps_apart,
)
from fusecheck.property_tests.suite.lone_rank import LoneRank
from fusecheck.ranks import Pool, values

BOTH = FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8
LIMITS = Limits(64, 512, torch.bfloat16)


GROUPS = [("cpu", 2), ("cpu", 4), *(("cuda", n) for n in (1, 2, 4, 8) if n <= torch.cuda.device_count())]
"""gloo everywhere, and NCCL on as many GPUs as there are."""


@pytest.fixture(scope="module", params=GROUPS, ids="{0[0]}-{0[1]}".format)
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    device, world_size = request.param
    with Pool("fusecheck.property_tests.suite.backend_calls:BackendCalls", world_size, device=device) as ranks:
        yield ranks


def assert_stages_conform(call: Call, outputs: Outputs) -> None:
    """Norm and codes, judged from the residual that was returned."""
    norm = floats(outputs, "norm", call.dtype)
    expected = rounded(normalised(floats(outputs, "residual", call.dtype), call), call.dtype)
    apart = steps_apart(norm, expected, call.dtype)
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.003
    assert np.array_equal(outputs["quant"], e4m3_codes(float32(norm / np.float64(np.float32(call.scale)))))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_stage_conforms_on_every_rank(pool: Pool, dtype: str) -> None:
    calls = [Call(t, h, dtype=dtype, seed=t, scale=0.07, weight_bias=t % 2) for t, h in [(1, 8), (20, 512), (3, 2880)]]
    ranks = values(pool.call("run", "unfused", calls, timeout=60.0))
    for number, call in enumerate(calls):
        for rank in ranks[1:]:
            assert all(np.array_equal(rank[number][name], ranks[0][number][name]) for name in rank[number])
        assert_stages_conform(call, ranks[0][number])
        if pool.world_size <= 2:
            expected = residual_in_rank_order(call, pool.world_size, accumulate="native")
            assert np.array_equal(floats(ranks[0][number], "residual", dtype), expected)


def test_a_group_of_one_needs_no_process_group() -> None:
    call = Call(4, 64, seed=5)
    outputs = (
        UnfusedBackend().open(LoneRank(world_size=1), LIMITS).run(call.inputs(0, 1), op=BOTH, strategy=Strategy.AUTO)
    )
    expected = residual_in_rank_order(call, 1, accumulate="native")
    assert np.array_equal(outputs.residual.double().numpy(), expected)
    assert_stages_conform(call, as_bytes(outputs))


@pytest.mark.parametrize("op", STATIC_OPS)
def test_each_op_returns_its_outputs_and_leaves_the_inputs_alone(op: FusionOp) -> None:
    inputs = Call(4, 64).inputs(0, 1)
    before = inputs.partial.clone()
    outputs = UnfusedBackend().open(LoneRank(world_size=1), LIMITS).run(inputs, op=op, strategy=Strategy.AUTO)
    assert (outputs.norm is not None) == op.returns_norm
    assert (outputs.quant is not None) == op.returns_quant
    assert torch.equal(inputs.partial, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda i: replace(i, gamma=i.gamma.float()),
        lambda i: replace(i, gamma=i.gamma[:1]),
        lambda i: replace(i, residual=i.residual[:1]),
        lambda i: replace(i, scale=i.scale.half()),
        lambda i: replace(i, scale=i.scale.repeat(64)),
        lambda i: replace(i, partial=i.partial.float()),
        lambda i: replace(i, partial=i.partial[None]),
    ],
)
def test_operands_that_torch_would_promote_or_broadcast_are_refused(change: object) -> None:
    assert callable(change)
    inputs: RankInputs = change(Call(4, 64).inputs(0, 1))
    with pytest.raises(ValueError, match="expected"):
        UnfusedBackend().open(LoneRank(world_size=1), LIMITS).run(inputs, op=BOTH, strategy=Strategy.AUTO)


def test_several_ranks_without_a_process_group_are_refused() -> None:
    with pytest.raises(ValueError, match="no process group for 2 ranks"):
        UnfusedBackend().open(LoneRank(), LIMITS)


def test_every_problem_is_supported() -> None:
    assert UnfusedBackend().supports(Problem(hidden=65544, strategy=Strategy.ONESHOT)).ok


@pytest.mark.parametrize(
    ("multicast", "variable", "name"), [(True, None, "nccl-nvls"), (True, "0", "unfused"), (False, "1", "unfused")]
)
def test_nccl_is_judged_by_either_rounding_where_it_may_add_up_in_the_switch(
    monkeypatch: pytest.MonkeyPatch, *, multicast: bool, variable: str | None, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory = SimpleNamespace(has_multicast_support=lambda *_: multicast)
    monkeypatch.setattr(torch._C._distributed_c10d, "_SymmetricMemory", memory)
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    if variable is not None:
        monkeypatch.setenv("NCCL_NVLS_ENABLE", variable)
    unfused.in_switch.cache_clear()
    try:
        assert backends.backend("unfused").dataflow(Problem()).name == name
        assert backends.backend("unfused:vllm").dataflow(Problem()).name == f"{name}/vllm"
        flow = backends.backend("flashinfer-norm").dataflow(Problem())
        assert (flow.sum_rounding == "either") is (name == "nccl-nvls")
    finally:
        unfused.in_switch.cache_clear()
