"""TensorRT-LLM's ops by their schemas at commit 10a94126 (read November 2026): numbers, arguments, outputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusecheck.backends.operands import check_layout
from fusecheck.interface import Operation, Rank, RankInputs, RankOutputs, Strategy
from fusecheck.operations import Collective
from fusecheck.quantflow import QuantFlow
from fusecheck.quantisers.known import quantiser

STRATEGIES = {Strategy.AUTO: 3, Strategy.ONESHOT: 4, Strategy.TWOSHOT: 5}
NAMED = {"nccl": 0, "min-latency": 1, "nccl-symmetric": 8}
"""`AllReduceStrategy` by value."""

FUSION_OPS = {
    Operation.named(name): number
    for name, number in (
        ("NONE", 0),
        ("RESIDUAL_RMS_NORM", 1),
        ("RESIDUAL_RMS_NORM_QUANT_FP8", 4),
        ("RESIDUAL_RMS_NORM_QUANT_NVFP4", 5),
        ("RESIDUAL_RMS_NORM_OUT_QUANT_FP8", 6),
        ("RESIDUAL_RMS_NORM_OUT_QUANT_NVFP4", 7),
        ("MOE_FINALIZE_ALLREDUCE_RESIDUAL_RMS_NORM", 8),
        ("RMS_NORM", 9),
        ("RESIDUAL_RMS_NORM_OUT_QUANT_MXFP8", 11),
    )
}
"""`AllReduceFusionOp` by value; 8 is an op of its own."""
LINEAR = {7: 10}
"""The value that stands for the same with scales in rows."""
OPERATIONS = (*FUSION_OPS, Operation.named("MOE_ALLREDUCE_RESIDUAL_RMS_NORM"))
TRIGGER_AT_END = True
MNNVL_OPS = (0, 1, 4, 5, 6, 7)
"""What `mnnvl_fusion_allreduce` takes since pull request 14476 (May 2026); before it, the first two."""


def number_of(op: Operation, layout: str) -> int | None:
    """The op's `AllReduceFusionOp` with scales in this layout; None where there is none."""
    number = FUSION_OPS.get(op)
    if layout in ("", "128x4") or number is None:
        return number
    return LINEAR.get(number) if layout == "linear" else None


def outputs_of(returned: Sequence[Tensor], op: Operation, layout: str = "") -> RankOutputs:
    """Name the op's outputs, whose order is norm, codes, scales, residual, less what was not asked for.

    Raises:
        ValueError: another number of outputs.
    """
    order = {"total": not op.norm, "norm": op.returns_norm, "quant": op.returns_quant, "scale": op.returns_scale}
    expected = [name for name, there in (order | {"residual": op.residual}).items() if there]
    if len(returned) != len(expected):
        raise ValueError(f"{op.value} returned {len(returned)} tensors, expected {', '.join(expected)}")
    named = dict(zip(expected, returned, strict=True))
    if "quant" in named:
        named["quant"] = named["quant"].view(torch.uint8 if op.quantiser == "nvfp4" else torch.float8_e4m3fn)
    if "scale" in named:
        tokens, hidden = returned[expected.index("residual")].shape
        found = quantiser(op.quantiser).layout(tokens, hidden, QuantFlow(), layout or None)
        named["scale"] = named["scale"].view(torch.uint8).view(found.shape)
    return RankOutputs(**{"residual": None} | named)


def operator(name: str) -> Callable[..., Sequence[Tensor]]:
    """One of the library's ops, which must have been imported.

    Raises:
        RuntimeError: this release does not have it.
    """
    for namespace in ("trtllm", "tensorrt_llm"):
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if packet is not None:
            return packet  # type: ignore[no-any-return]
    raise RuntimeError(f"neither torch.ops.trtllm nor torch.ops.tensorrt_llm has {name}: take a release that has it")


def workspace(rank: Rank) -> Tensor:
    """The pointer table that the library's own `AllReduce` module makes for this rank's `Mapping`, one a process.

    Raises:
        RuntimeError: this release makes none, or the ranks cannot map each other's memory.
    """
    module = importlib.import_module("tensorrt_llm._torch.distributed").AllReduce(mapping=_mapping(rank))
    made: Tensor | None = getattr(module, "workspace", None)
    if made is None or not bool((made[: 3 * rank.world_size] != 0).all()):
        raise RuntimeError(
            "tensorrt_llm's AllReduce has no workspace with pointers of all ranks: without peer-to-peer access every "
            "call goes to NCCL; ask tensorrt_llm:nccl"
        )
    return made


def _mapping(rank: Rank) -> Any:
    made = importlib.import_module("tensorrt_llm.mapping").Mapping
    return made(world_size=rank.world_size, rank=rank.index, tp_size=rank.world_size)


class AllReduceKernel:
    """`trtllm::allreduce_pg` and the ops for a mixture of experts, on one rank.

    Args:
        rank: with a process group of all ranks, which the op takes in the place of MPI's.
        strategy: of the library's own, in the place of the Problem's.
        fused: whether a workspace is needed; NCCL has its own.
    """

    def __init__(self, rank: Rank, strategy: str | None, *, fused: bool) -> None:
        if rank.group is None:
            raise ValueError("tensorrt_llm needs a process group of the ranks, and virtual ranks have none")
        self._rank, self._strategy = rank, strategy
        self._group: Any = rank.group.boxed()
        self._op = operator("allreduce_pg")
        self._table = workspace(rank) if fused else None

    def run(self, inputs: RankInputs, *, op: Operation, strategy: Strategy) -> RankOutputs:
        """Run the op; a collective call.

        Raises:
            ValueError: an operand of a wrong shape, dtype or layout, which the op does not check.
        """
        check_layout(inputs)
        if op.has_experts:
            return outputs_of(self._sum_experts(inputs, op), op)
        number = number_of(op, inputs.layout)
        assert number is not None
        named = self._strategy
        returned = self._op(
            inputs.partial,
            inputs.residual if op.residual else None,
            inputs.gamma if op.norm else None,
            inputs.scale if op.quantiser in ("static-fp8", "nvfp4") else None,
            None,
            self._table,
            list(range(self._rank.world_size)),
            self._rank.index,
            self._group,
            STRATEGIES[strategy] if named is None else NAMED[named],
            number,
            inputs.eps,
            TRIGGER_AT_END,
        )
        return outputs_of(returned, op, inputs.layout)

    def _sum_experts(self, inputs: RankInputs, op: Operation) -> Sequence[Tensor]:
        experts, index, ranks = inputs.experts, self._rank.index, self._rank.world_size
        assert experts is not None
        if op.collective is Collective.MOE_FINALIZE:
            table = (experts.tokens, inputs.residual, inputs.gamma, experts.rows, experts.shared, experts.scale)
            return operator("moe_finalize_allreduce")(*table, self._table, index, ranks, inputs.eps)
        shared = torch.zeros_like(inputs.residual) if experts.shared is None else experts.shared
        count = torch.tensor([len(experts.tokens)], dtype=torch.int32, device=inputs.residual.device)
        table = (inputs.residual, inputs.gamma, count, experts.scale, experts.tokens, shared)
        return operator("moe_allreduce")(*table, self._table, index, ranks, inputs.eps)

    def close(self) -> None:
        """The library keeps the workspace of a mapping."""


class MnnvlKernel:
    """`trtllm::mnnvl_fusion_allreduce` on one rank, with the library's buffer of this mapping."""

    def __init__(self, rank: Rank, nbytes: int) -> None:
        ops = importlib.import_module("tensorrt_llm._torch.distributed.ops")
        self._made = ops.get_or_scale_allreduce_mnnvl_workspace(
            _mapping(rank), torch.bfloat16, buffer_size_bytes=nbytes
        )
        self._op = operator("mnnvl_fusion_allreduce")

    def run(self, inputs: RankInputs, *, op: Operation, strategy: Strategy) -> RankOutputs:
        """Run the op, which chooses the exchange by the size of the message; a collective call.

        Raises:
            ValueError: an operand of a wrong shape, dtype or layout.
        """
        check_layout(inputs)
        number = number_of(op, inputs.layout)
        buffer = self._made["uc_buffer"].view(inputs.partial.dtype).view(3, -1)
        operands = (inputs.gamma, inputs.residual, inputs.eps) if op.norm else (None, None, None)
        scale = inputs.scale if op.returns_quant else None
        returned = list(self._op(inputs.partial, *operands, buffer, self._made["buffer_flags"], op.norm, scale, number))
        return outputs_of([tensor for tensor in returned if tensor.numel()], op, inputs.layout)

    def close(self) -> None:
        """The library keeps the buffer of a mapping."""
