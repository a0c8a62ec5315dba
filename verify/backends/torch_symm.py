"""PyTorch's symmetric memory: `symm_mem.one_shot_all_reduce` or `two_shot_all_reduce_`, then torch ops of their own.

Both all-reduces add the ranks' bf16 values in rank order 0, 1, ... and round after every addition, so the sum is one
number on every rank. They need peers' memory (NVLink or PCIe peer-to-peer), and no multicast.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusecheck.backends.operands import check_gpu_process
from fusecheck.backends.unfused import check, finish
from fusecheck.dataflow import ALONE, Dataflow, dataflow
from fusecheck.interface import FusionOp, Kernel, Limits, Rank, RankInputs, RankOutputs, Strategy, Support

if TYPE_CHECKING:
    from fusecheck.problem import Problem

ONESHOT_BYTES = 128 * 1024
"""Where AUTO turns from one-shot to two-shot: the message size at which torch.compile does so by default."""

OPS = ("one_shot_all_reduce", "two_shot_all_reduce_")


class TorchSymmBackend:
    """Backend `torch-symm`: a process per GPU of one host."""

    name = "torch-symm"
    device = "cuda"

    def supports(self, problem: Problem) -> Support:
        """Refuse what the ops refuse, and a machine on which they cannot run."""
        if problem.world_size < 2:
            return Support(ok=False, reason="symmetric memory needs two ranks or more")
        if problem.dtype != "bf16":
            return Support(ok=False, reason=f"torch's symmetric memory adds bf16 and float32 only, got {problem.dtype}")
        if missing := [op for op in OPS if not hasattr(_ops(), op)]:
            return Support(ok=False, reason=f"torch {torch.__version__} lacks symm_mem.{missing[0]}")
        if (pair := _without_access(torch.cuda.device_count(), problem.world_size)) is not None:
            return Support(ok=False, reason=f"GPU {pair[0]} cannot map the memory of GPU {pair[1]}")
        return Support(ok=True)

    def dataflow(self, problem: Problem) -> Dataflow:
        """The dataflow `torch-symm`: rank order, rounded at every addition; then the unfused ops."""
        del problem
        return replace(dataflow("torch-symm"), invariant_below=ALONE)

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        """Make and exchange the symmetric buffer; a collective call.

        Raises:
            ValueError: the rank is not on a GPU, or has no process group.
        """
        check_gpu_process(self.name, rank)
        return TorchSymmKernel(rank, limits)


class TorchSymmKernel:
    """The ops on one rank, over one symmetric buffer."""

    def __init__(self, rank: Rank, limits: Limits) -> None:
        import torch.distributed._symmetric_memory as symm_mem

        assert rank.group is not None
        self._device, self._group = rank.device, rank.group.group_name
        size = limits.max_tokens * limits.hidden
        self._buffer: Tensor | None = symm_mem.empty(size, dtype=limits.dtype, device=rank.device)
        self._handle: Any = symm_mem.rendezvous(self._buffer, rank.group)

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        """Run the all-reduce and the ops behind it on the current stream; a collective call.

        Raises:
            ValueError: an operand of a wrong shape or dtype, or larger than the workspace.
        """
        check(inputs)
        return finish(self._all_reduce(inputs.partial, strategy), inputs, op)

    def _all_reduce(self, partial: Tensor, strategy: Strategy) -> Tensor:
        """The sum over ranks, [tokens, hidden]; with two-shot it lies in the buffer, and lasts until the next call."""
        assert self._buffer is not None
        if partial.numel() > self._buffer.numel() or partial.dtype != self._buffer.dtype:
            room = f"{self._buffer.numel()} of {self._buffer.dtype}"
            raise ValueError(f"partial has {partial.numel()} elements of {partial.dtype}, the workspace takes {room}")
        # Peers have read the last call's values: every call ends in a barrier between the ranks' kernels.
        shared = self._buffer[: partial.numel()].view(partial.shape).copy_(partial)
        if strategy is Strategy.AUTO:
            small = partial.numel() * partial.element_size() <= ONESHOT_BYTES
            strategy = Strategy.ONESHOT if small else Strategy.TWOSHOT
        name = OPS[strategy is Strategy.TWOSHOT]
        summed: Tensor = getattr(_ops(), name)(shared, "sum", self._group)
        return summed

    def close(self) -> None:
        """Give the symmetric memory back, once no kernel uses it."""
        torch.cuda.synchronize(self._device)
        self._handle = self._buffer = None


def _ops() -> Any:
    """The ops; importing the module registers them."""
    import torch.distributed._symmetric_memory

    return torch.ops.symm_mem


@functools.cache
def _without_access(devices: int, world_size: int) -> tuple[int, int] | None:
    """Two GPUs of which the first cannot map the second's memory; None where all can, or where too few are seen."""
    if devices < world_size:
        return None
    pairs = ((a, b) for a in range(world_size) for b in range(world_size) if a != b)
    return next((pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)), None)
