"""What stands in for TensorRT-LLM in tests: ops under the schemas of commit 10a94126 (read 2026-11-29), on CPU ranks.

`cpp/tensorrt_llm/thop/allreduceOp.cpp` has the schemas, `_torch/distributed` the modules. The arithmetic is the
emulator's; what the op does with a strategy is as its source says.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusecheck.backends import tensorrt_llm_ops as ops
from fusecheck.backends.emulated_arithmetic import Arithmetic
from fusecheck.backends.tensorrt_llm import TensorRTLLMBackend
from fusecheck.backends.tensorrt_llm_release import WITHOUT_MPI, room, sums
from fusecheck.backends.unfused import finish
from fusecheck.dataflow import Dataflow, ExpertFlow, dataflow
from fusecheck.interface import Operation, RankInputs, RankOutputs
from fusecheck.problem import Problem
from fusecheck.property_tests.suite.family import computed
from fusecheck.stages.experts import Experts

TENSORS = (
    "Tensor input, Tensor? residual, Tensor? norm_weight, Tensor? scale, Tensor? bias, Tensor? workspace, int[] group, "
)
TAIL = "int strategy, int op, float eps, bool trigger_completion_at_end) -> Tensor[]"
SCHEMAS = {
    "allreduce": TENSORS + TAIL,
    "allreduce_pg": f"{TENSORS}int rank, __torch__.torch.classes.c10d.ProcessGroup pg, {TAIL}",
    "moe_allreduce": "Tensor residual, Tensor norm_weight, Tensor device_num_experts, Tensor scale_input, "
    "Tensor active_experts_token_input, Tensor token_input, Tensor workspace, int rank, int nranks, float eps) "
    "-> Tensor[]",
    "moe_finalize_allreduce": "Tensor input, Tensor? residual, Tensor norm_weight, Tensor expanded_idx_to_permuted_idx,"
    " Tensor? shared_expert_output, Tensor? expert_scale_factor, Tensor workspace, int rank, int nranks, float eps) "
    "-> Tensor[]",
    "mnnvl_fusion_allreduce": "Tensor input, Tensor? gamma, Tensor? residual, float? epsilon, Tensor(a!) comm_buffer, "
    "Tensor buffer_flags, bool rmsnorm_fusion, Tensor? scale=None, int fusion_op=0) -> Tensor[]",
}
BY_NUMBER = {number: op for op, number in ops.FUSION_OPS.items()} | {
    10: Operation.named("RESIDUAL_RMS_NORM_OUT_QUANT_NVFP4")
}
CALLS: list[tuple[Any, ...]] = []
"""Strategy, op and trigger of each call of `allreduce_pg` in this process."""


def allreduce(*arguments: object) -> list[Tensor]:
    """The op over MPI: each process here would be rank 0 of 1."""
    raise AssertionError("the ranks are no processes of MPI")


def allreduce_pg(
    given: Tensor, residual: Tensor | None, norm_weight: Tensor | None, scale: Tensor | None, bias: Tensor | None,
    table: Tensor | None, group: list[int], rank: int, pg: Any, strategy: int, op: int, eps: float, trigger: bool,
) -> list[Tensor]:  # fmt: skip
    """The op over torch's process group."""
    assert os.environ[WITHOUT_MPI] == "1"
    assert bias is None
    CALLS.append((strategy, op, trigger))
    chosen = BY_NUMBER[op]
    inputs = inputs_of(given, residual, norm_weight, scale, eps, "linear" if op == 10 else "")
    partials = gathered(given, dist.ProcessGroup.unbox(pg), len(group), rank)
    if strategy in (0, 8) or given.numel() * given.element_size() > room():
        total = torch.stack(partials).float().sum(0).to(given.dtype)
        return listed(finish(total, inputs, chosen), chosen)
    assert table is not None
    two_shot = strategy == 5 and len(given) >= len(group)
    assert not two_shot or given.shape[1] // 8 >= len(group), "a check that ends the process"
    flow = dataflow("trtllm-fp32" if sums() == "fp32" else "trtllm")
    return listed(computed(Arithmetic(flow, 0, len(group)), inputs, partials, chosen), chosen)


def moe_allreduce(
    residual: Tensor, norm_weight: Tensor, device_num_experts: Tensor, scale_input: Tensor,
    active_experts_token_input: Tensor, token_input: Tensor, workspace: Tensor, rank: int, nranks: int, eps: float,
) -> list[Tensor]:  # fmt: skip
    """Experts' tokens reduced, then summed over ranks, in the activations' dtype."""
    assert int(device_num_experts) == len(active_experts_token_input)
    experts = Experts(active_experts_token_input, scale_input, None, token_input)
    return summed_experts(experts, "MOE_REDUCTION_RESIDUAL_RMS_NORM", residual, norm_weight, rank, nranks, eps)


def moe_finalize_allreduce(
    given: Tensor, residual: Tensor | None, norm_weight: Tensor, rows: Tensor, shared: Tensor | None,
    scale: Tensor | None, workspace: Tensor, rank: int, nranks: int, eps: float,
) -> list[Tensor]:  # fmt: skip
    """Experts' rows gathered, then summed over ranks."""
    assert residual is not None
    assert scale is not None
    experts = Experts(given, scale, rows, shared)
    return summed_experts(experts, "MOE_FINALIZE_RESIDUAL_RMS_NORM", residual, norm_weight, rank, nranks, eps)


def summed_experts(
    experts: Experts, name: str, residual: Tensor, gamma: Tensor, rank: int, nranks: int, eps: float
) -> list[Tensor]:
    op = Operation.named(name)
    flow = TensorRTLLMBackend().dataflow(SimpleNamespace(op=op, strategy=None, tokens=1, hidden=8))  # type: ignore[arg-type]
    kernel = Arithmetic(flow, 0, nranks)
    addend = kernel.sum_experts(experts)
    assert dist.group.WORLD is not None
    partials = gathered(addend, dist.group.WORLD, nranks, rank)
    return listed(computed(kernel, inputs_of(addend, residual, gamma, None, eps, ""), partials, op), op)


def mnnvl_fusion_allreduce(
    given: Tensor, gamma: Tensor | None, residual: Tensor | None, epsilon: float | None, comm_buffer: Tensor,
    buffer_flags: Tensor, rmsnorm_fusion: bool, scale: Tensor | None = None, fusion_op: int = 0,
) -> list[Tensor]:  # fmt: skip
    """The op over multicast memory."""
    assert comm_buffer.shape[0] == 3
    op = BY_NUMBER[1 if fusion_op == 0 and rmsnorm_fusion else fusion_op]
    assert dist.group.WORLD is not None
    size, rank = dist.get_world_size(), dist.get_rank()
    inputs = inputs_of(given, residual, gamma, scale, epsilon or 0.0, "")
    partials = gathered(given, dist.group.WORLD, size, rank)
    return listed(computed(Arithmetic(dataflow("trtllm-mnnvl"), 0, size), inputs, partials, op), op)


def gathered(addend: Tensor, group: dist.ProcessGroup, size: int, rank: int) -> list[Tensor]:
    """Every rank's tensor; gloo moves bytes."""
    mine = addend.contiguous().view(torch.uint8)
    found = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(found, mine, group=group)
    assert torch.equal(found[rank], mine)
    return [each.view(addend.dtype) for each in found]


def inputs_of(
    given: Tensor, residual: Tensor | None, gamma: Tensor | None, scale: Tensor | None, eps: float, layout: str
) -> RankInputs:
    """What was passed; ones where nothing was."""
    one = torch.ones(1)
    added = torch.zeros_like(given) if residual is None else residual
    weight = torch.ones_like(given[0]) if gamma is None else gamma
    return RankInputs(given, added, weight, one if scale is None else scale, eps, 0.0, layout)


def listed(made: RankOutputs, op: Operation) -> list[Tensor]:
    """The outputs in the op's order."""
    every = (made.total, made.norm, made.quant, made.scale, made.residual if op.residual else None)
    return [tensor for tensor in every if tensor is not None]


@cache
def registered() -> Any:
    """The ops, once a process; they last as long as what is returned."""
    library: Any = torch.library.Library("trtllm", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, schema in SCHEMAS.items():
        library.define(f"{name}({schema}")
        library.impl(name, globals()[name], "CPU")
    return library


def modules(*, peers: bool = True) -> dict[str, ModuleType]:
    """What `import tensorrt_llm` and the imports below it find; the ops are there, too."""
    registered()
    names = ("tensorrt_llm", *(f"tensorrt_llm.{name}" for name in ("mapping", "_torch", "_torch.distributed")))
    made: dict[str, Any] = {name: ModuleType(name) for name in (*names, "tensorrt_llm._torch.distributed.ops")}
    made["tensorrt_llm"].__spec__ = SimpleNamespace()
    made["tensorrt_llm.mapping"].Mapping = SimpleNamespace
    made["tensorrt_llm._torch.distributed"].AllReduce = lambda mapping: SimpleNamespace(
        workspace=torch.full((3 * mapping.world_size + 2,), int(peers))
    )
    made["tensorrt_llm._torch.distributed.ops"].get_or_scale_allreduce_mnnvl_workspace = lambda *_, buffer_size_bytes: {
        "uc_buffer": torch.zeros(buffer_size_bytes // 4 * 3),
        "buffer_flags": torch.zeros(9, dtype=torch.int32),
    }
    return made


class StandIn(TensorRTLLMBackend):
    """The adapter with the library's stand-in, on CPU ranks."""

    device = "cpu"
    variant = ""

    def __init__(self) -> None:
        sys.modules |= modules()
        super().__init__(self.variant)
        self.name = f"{type(self).__module__}:{type(self).__name__}"


class Nccl(StandIn):
    """A strategy of the library's own."""

    variant = "nccl"


class Mnnvl(StandIn):
    """The op over multicast memory."""

    variant = "mnnvl"


class Cramped(StandIn):
    """With room for so small messages that most go to NCCL."""

    def __init__(self) -> None:
        os.environ["TRTLLM_ALLREDUCE_FUSION_WORKSPACE_SIZE"] = "4096"
        super().__init__()


class Misdeclared(StandIn):
    """One that promises experts summed in the activations' dtype."""

    def dataflow(self, problem: Problem) -> Dataflow:
        """Another than the op keeps."""
        return replace(super().dataflow(problem), experts=ExpertFlow(scaling="never"))
