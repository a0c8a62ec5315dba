"""The ops that the fused kernel replaces, one by one: all_reduce, add, RMSNorm, quantise.

The collective is `torch.distributed`'s on the rank's process group: gloo on the CPU,
NCCL on CUDA. Everything else is a torch op of its own, with its result rounded to the
activations' dtype where the dataflow `unfused` says so.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fusecheck.backends.emulated_arithmetic import Arithmetic
from fusecheck.backends.emulated_quantise import Quantising
from fusecheck.dataflow import ALONE, Dataflow, dataflow
from fusecheck.interface import Kernel, Limits, Operation, Rank, RankInputs, RankOutputs, Strategy, Support
from fusecheck.operations import COMPOSITIONS, GIVEN_SCALE, Collective
from fusecheck.quantisers.known import quantiser

if TYPE_CHECKING:
    from fusecheck.problem import Problem

E4M3_MAX = 448.0
"""The largest finite E4M3 value."""

DTYPES = (torch.bfloat16, torch.float16)


@functools.cache
def in_switch() -> bool:
    """Whether NCCL may add up in the switch here: there is multicast memory, and NCCL_NVLS_ENABLE is not 0."""
    if os.environ.get("NCCL_NVLS_ENABLE") == "0" or not torch.cuda.is_available():
        return False
    from torch._C import _autograd, _distributed_c10d

    memory: Any = getattr(_distributed_c10d, "_SymmetricMemory", None)
    return memory is not None and bool(memory.has_multicast_support(_autograd.DeviceType.CUDA, 0))


def all_reduce(partial: Tensor, group: ProcessGroup | None, world_size: int) -> Tensor:
    """Sum over the group's ranks, in the dtype of `partial`; `partial` stays as it is."""
    summed = partial.clone(memory_format=torch.contiguous_format)
    if world_size > 1:
        dist.all_reduce(summed, group=group)
    return summed


def add_residual(summed: Tensor, residual: Tensor) -> Tensor:
    """The native sum of two native tensors: one rounding."""
    return summed + residual


def rms_norm(x: Tensor, gamma: Tensor, eps: float, weight_bias: float) -> Tensor:
    """Return x / rms(x) * (gamma + weight_bias) in float32, rounded once to the dtype of `x`."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * inverse * (gamma.float() + weight_bias)).to(x.dtype)


def quantise(norm: Tensor, scale: Tensor) -> Tensor:
    """Return norm / scale, clamped and cast to E4M3; NaN stays NaN."""
    scaled = norm.float() / scale
    # Clamped here, because releases of torch differ in what the cast makes of values beyond 448.
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def finish(summed: Tensor, inputs: RankInputs, op: Operation, flow: Dataflow | None = None) -> RankOutputs:
    """The ops behind the all-reduce, whose result is `summed`, [tokens, hidden]: add, RMSNorm, quantise.

    Scales that are not given come by the rules of `flow`, dataflow `unfused` if none is named.
    """
    total = summed if "total" in op.returns else None
    if not op.norm:
        return RankOutputs(None, total=total)
    residual = add_residual(summed, inputs.residual) if op.residual else summed
    norm = rms_norm(residual, inputs.gamma, inputs.eps, inputs.weight_bias)
    quant, scale = None, None
    if op.quantiser == GIVEN_SCALE:
        quant = quantise(norm, inputs.scale)
    elif op.quantiser != "none":
        quant, scale = quantise_with(op.quantiser, norm, inputs, flow)
    return RankOutputs(residual if op.residual else None, norm if op.returns_norm else None, quant, scale, total)


def quantise_with(name: str, norm: Tensor, inputs: RankInputs, flow: Dataflow | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales as they are stored, by the steps of the emulated kernel and the rules of dataflow `unfused`."""
    rules = (flow or dataflow("unfused")).quant(name)
    quantising = Quantising(quantiser(name), rules, inputs.scale, norm.dtype, inputs.layout)
    scales, codes = quantising.run(norm.float())
    return quantising.pack(codes), quantising.lay_out(scales, norm.shape[1])


class UnfusedBackend:
    """Backend `unfused`: runs wherever `torch.distributed` does, also on a single rank, and on virtual ranks.

    `unfused:vllm` and the like call that implementation's quantisers behind the norm.
    """

    operations = COMPOSITIONS

    def __init__(self, implementation: str = "") -> None:
        """Choose whose quantisers are called; torch ops by default.

        Raises:
            UsageError: no quantiser is computed by an implementation of that name.
        """
        self.flow = dataflow(f"unfused/{implementation}" if implementation else "unfused")
        self.name = f"unfused:{implementation}" if implementation else "unfused"

    def supports(self, problem: Problem) -> Support:
        """Take every Problem of a known quantiser; the strategy is the collective library's own business."""
        if problem.dtype not in ("bf16", "fp16"):
            return Support(ok=False, reason=f"dtype={problem.dtype} is neither bf16 nor fp16")
        if not self.flow.declares(problem.op.quantiser):
            return Support(ok=False, reason=f"quantiser {problem.op.quantiser} is none of its own")
        return Support(ok=True)

    def dataflow(self, problem: Problem) -> Dataflow:
        """The dataflow `unfused`, any order over the ranks and division by scale; or `nccl-nvls`, see `in_switch`.

        Rings begin at another rank for each part of a batch, so of the bits of a row in a batch nothing is promised.
        """
        del problem
        declared = dataflow(self.flow.name.replace("unfused", "nccl-nvls")) if in_switch() else self.flow
        return replace(declared, invariant_below=ALONE)

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        """Need nothing but the process group, or the board of virtual ranks.

        Raises:
            ValueError: several ranks with neither.
        """
        del limits
        if rank.world_size > 1 and getattr(rank, "board", None) is None and rank.group is None:
            raise ValueError(f"no process group for {rank.world_size} ranks, expected one from torch.distributed")
        return UnfusedKernel(rank, self.flow)


class UnfusedKernel:
    """The unfused ops on one rank."""

    def __init__(self, rank: Rank, flow: Dataflow | None = None) -> None:
        self.rank, self._flow = rank, flow or dataflow("unfused")

    def run(self, inputs: RankInputs, *, op: Operation, strategy: Strategy) -> RankOutputs:
        """Run the four ops; a collective call.

        Raises:
            ValueError: an operand of a wrong shape or dtype.
        """
        del strategy
        check(inputs)
        board, summed = getattr(self.rank, "board", None), inputs.partial
        if op.has_experts:
            assert inputs.experts is not None
            summed = Arithmetic(self._flow, 0, 1).sum_experts(inputs.experts)
        if op.collective is not Collective.NONE and board is not None:
            summed = functools.reduce(torch.add, board.gather(self.rank.index, summed))
        elif op.collective is not Collective.NONE:
            summed = all_reduce(summed, self.rank.group, self.rank.world_size)
        return finish(summed, inputs, op, self._flow)

    def close(self) -> None:
        """Nothing was taken."""


def check(inputs: RankInputs) -> None:
    """Refuse operands that torch would silently promote or broadcast.

    Raises:
        ValueError: what was got and what was expected, in one line.
    """
    partial = inputs.partial
    if partial.dim() != 2 or partial.dtype not in DTYPES:
        raise ValueError(f"partial is {partial.dtype} {list(partial.shape)}, expected bf16 or fp16 [tokens, hidden]")
    for name, tensor, shape, dtype in (
        ("residual", inputs.residual, partial.shape, partial.dtype),
        ("gamma", inputs.gamma, partial.shape[1:], partial.dtype),
        ("scale", inputs.scale, (1,), torch.float32),
    ):
        if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}")
        if tensor.device != partial.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {partial.device} as partial")
