"""The symmetric-memory backend against stand-ins of torch's ops: what it passes, returns, declares and refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

from fusecheck.backends import backend, torch_symm
from fusecheck.backends.torch_symm import ONESHOT_BYTES, TorchSymmBackend, TorchSymmKernel
from fusecheck.dataflow import DATAFLOWS
from fusecheck.inputs.rank_inputs import Inputs
from fusecheck.interface import STATIC_OPS, FusionOp, Limits, RankInputs, Strategy
from fusecheck.problem import Problem
from fusecheck.property_tests.suite.family import outside
from fusecheck.property_tests.suite.lone_rank import LoneRank

CPU = torch.device("cpu")
BF16 = torch.bfloat16


class _Group:
    group_name = "0"


class _Ops:
    """The two ops on rank 0: the other ranks' buffers are known here, and are added in rank order as in torch."""

    def __init__(self) -> None:
        self.others: list[Tensor] = []
        self.calls: list[str] = []

    def one_shot(self, given: Tensor, reduce_op: str, group_name: str) -> Tensor:
        return self._added("one_shot", given, reduce_op, group_name).clone()

    def two_shot(self, given: Tensor, reduce_op: str, group_name: str) -> Tensor:
        return given.copy_(self._added("two_shot", given, reduce_op, group_name))

    def _added(self, name: str, given: Tensor, reduce_op: str, group_name: str) -> Tensor:
        assert (reduce_op, group_name) == ("sum", "0")
        assert given.is_contiguous()
        assert given.storage_offset() == 0
        self.calls.append(name)
        total = given
        for other in self.others:
            total = total + other
        return total


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Ops]:
    """CPU implementations under the schemas that this torch registers, and memory that needs no peers."""
    made = _Ops()
    library: Any = torch.library.Library("symm_mem", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("one_shot_all_reduce", made.one_shot, "CPU")
    library.impl("two_shot_all_reduce_", made.two_shot, "CPU")
    monkeypatch.setattr(symm_mem, "empty", torch.empty)
    monkeypatch.setattr(symm_mem, "rendezvous", lambda tensor, group: (tensor, group))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    yield made
    library._destroy()


def _kernel(limits: Limits) -> TorchSymmKernel:
    group: Any = _Group()
    return TorchSymmKernel(LoneRank(world_size=4, group=group), limits)


@pytest.mark.parametrize("op", list(STATIC_OPS))
@pytest.mark.parametrize("strategy", [Strategy.ONESHOT, Strategy.TWOSHOT])
def test_both_all_reduces_pass_under_the_declared_dataflow_and_under_no_other_order(
    ops: _Ops, op: FusionOp, strategy: Strategy
) -> None:
    problem = Problem(
        op=op, strategy=strategy, world_size=4, tokens=8, hidden=256, weight_bias=1.0, family="cancelling"
    )
    source = Inputs(problem, CPU)
    ops.others = [source.partial(rank) for rank in range(1, 4)]
    kernel = _kernel(Limits(32, 512, BF16))
    outputs = kernel.run(source.of_rank(0), op=op, strategy=strategy)
    assert ops.calls == ["one_shot" if strategy is Strategy.ONESHOT else "two_shot"]
    declared = TorchSymmBackend().dataflow(problem)
    assert replace(declared, invariant_below=None) == DATAFLOWS["torch-symm"]
    assert outside(problem, declared, outputs) == {}
    assert outside(problem, replace(declared, accumulate="fp32"), outputs) != {}


def test_one_buffer_serves_calls_of_changing_size_and_outputs_do_not_alias_it(ops: _Ops) -> None:
    kernel = _kernel(Limits(16, 128, BF16))
    kept = []
    for tokens, hidden in ((16, 128), (1, 64), (9, 128)):
        problem = Problem(world_size=2, tokens=tokens, hidden=hidden, strategy=Strategy.TWOSHOT, seed=tokens)
        source = Inputs(problem, CPU)
        ops.others = [source.partial(1)]
        kept.append((problem, kernel.run(source.of_rank(0), op=problem.op, strategy=problem.strategy)))
    assert [outside(problem, DATAFLOWS["torch-symm"], outputs) for problem, outputs in kept] == [{}, {}, {}]
    kernel.close()


def test_auto_is_one_shot_up_to_the_size_that_torch_compile_takes(ops: _Ops) -> None:
    hidden = 1024
    most = ONESHOT_BYTES // (2 * hidden)
    kernel = _kernel(Limits(most + 1, hidden, BF16))
    for tokens in (most, most + 1):
        problem = Problem(world_size=2, tokens=tokens, hidden=hidden)
        source = Inputs(problem, CPU)
        ops.others = [source.partial(1)]
        kernel.run(source.of_rank(0), op=problem.op, strategy=Strategy.AUTO)
    assert ops.calls == ["one_shot", "two_shot"]


def test_rows_with_gaps_are_copied_and_a_message_beyond_the_workspace_is_refused(ops: _Ops) -> None:
    problem = Problem(world_size=2, tokens=4, hidden=64, strategy=Strategy.ONESHOT)
    source = Inputs(problem, CPU)
    ops.others = [source.partial(1)]
    made = source.of_rank(0)
    spread = torch.zeros(4, 128, dtype=BF16)[:, 32:96].copy_(made.partial)
    kernel = _kernel(Limits(4, 64, BF16))
    outputs = kernel.run(replace(made, partial=spread), op=problem.op, strategy=problem.strategy)
    assert outside(problem, DATAFLOWS["torch-symm"], outputs) == {}
    twice: RankInputs = replace(made, partial=made.partial.repeat(2, 1), residual=made.residual.repeat(2, 1))
    with pytest.raises(ValueError, match=r"partial has 512 elements of torch.bfloat16, the workspace takes 256"):
        kernel.run(twice, op=problem.op, strategy=problem.strategy)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [(Problem(world_size=1), "two ranks or more"), (Problem(dtype="fp16"), "bf16 and float32 only, got fp16")],
)
def test_what_the_ops_refuse_is_refused_with_the_reason(problem: Problem, reason: str) -> None:
    support = backend("torch-symm").supports(problem)
    assert not support.ok
    assert reason in support.reason


def test_gpus_that_cannot_map_each_others_memory_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_symm._without_access.cache_clear()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: a < b)
    support = TorchSymmBackend().supports(Problem(world_size=2))
    torch_symm._without_access.cache_clear()
    assert support.reason == "GPU 1 cannot map the memory of GPU 0"


def test_a_rank_without_a_gpu_or_without_a_group_is_told_what_is_missing() -> None:
    limits = Limits(4, 64, BF16)
    with pytest.raises(ValueError, match="torch-symm on cpu, expected a CUDA device"):
        TorchSymmBackend().open(LoneRank(world_size=4), limits)
    with pytest.raises(ValueError, match="virtual ranks have none"):
        TorchSymmBackend().open(LoneRank(world_size=4, device=torch.device("cuda", 0)), limits)
