"""FlashInfer's port of TensorRT-LLM's fused kernel, `trtllm_allreduce_fusion`, on CUDA ranks.

Variants, after a colon and separated by commas: `fp32` (accumulate in float32), `pdl` (programmatic dependent
launch), `early` (trigger dependents before the end), `unified` (through the API with a workspace object, in place of
the legacy functions), as in `flashinfer:fp32,pdl`. The kernel is the same through either API.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from importlib import metadata
from typing import TYPE_CHECKING

import torch

from verify.dataflow import Dataflow, dataflow
from verify.errors import UsageError
from verify.interface import Kernel, Limits, Rank, Strategy, Support

if TYPE_CHECKING:
    from verify.problem import Problem

WORLD_SIZES = (2, 4, 8, 16)
VARIANTS = ("fp32", "pdl", "early", "unified")
OLDEST = (0, 6, 13)
"""The first release that was tried; earlier ones lack arguments."""
CAPABILITIES = (9, 10, 12)
"""Major compute capabilities for which FlashInfer builds the kernel; 12 from release 0.7 on."""
ONESHOT_BYTES = {2: 512 << 20, 4: 64 << 20, 8: 42 << 20}
"""FlashInfer's own limits for one-shot when it may choose, by four bytes an element of every rank; at world size 16
it has none and raises KeyError."""
CLEARED_BYTES = 2**30 - 1
"""The largest third of a Lamport buffer that one-shot clears rightly: it multiplies it by 0, 1 or 2 in int32."""


def installed() -> str | None:
    """FlashInfer's version, or None."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    try:
        return metadata.version("flashinfer-python")
    except metadata.PackageNotFoundError:
        return "unknown"


def refused_here(version: str | None) -> str | None:
    """Why no kernel of FlashInfer is used on this machine, or None."""
    if version is None:
        return "flashinfer-python is not installed"
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if numbers and numbers < OLDEST:
        return f"flashinfer-python {version} is older than {'.'.join(map(str, OLDEST))}, the first that was tried"
    return None


@functools.cache
def refused_gpu(devices: int) -> str | None:
    """Why the fused kernel does not run on the first of so many GPUs, or None."""
    if not devices:
        return None  # nothing to ask; whoever starts ranks will tell
    major, minor = torch.cuda.get_device_capability(0)
    if major in CAPABILITIES:
        return None
    return f"{torch.cuda.get_device_name(0)} has capability {major}.{minor}, the kernel is built for 9, 10 and 12"


def shape_support(problem: Problem) -> Support:
    """Whether the kernel takes this shape; its own limits, with its own reasons."""
    eighths = problem.hidden // 8
    if problem.world_size not in WORLD_SIZES:
        return Support(ok=False, reason=f"world size {problem.world_size} is none of {WORLD_SIZES}")
    if problem.hidden > 65536 or (problem.hidden > 8192 and eighths % 2):
        return Support(ok=False, reason=f"hidden {problem.hidden}: no block and cluster size covers it")
    if problem.strategy is Strategy.TWOSHOT and problem.tokens <= problem.world_size:
        return Support(ok=False, reason=f"two-shot needs more tokens than ranks, got {problem.tokens}")
    if problem.strategy is Strategy.AUTO and problem.world_size not in ONESHOT_BYTES:
        return Support(ok=False, reason="AUTO has no rule at world size 16")
    if problem.strategy is Strategy.TWOSHOT and eighths < problem.world_size:
        return Support(ok=False, reason=f"two-shot at hidden {problem.hidden} has fewer threads in a block than ranks")
    calls = [call for _, call in problem.calls()]
    if all(call.strategy is Strategy.TWOSHOT for call in calls):
        return Support(ok=True)
    # AUTO picks one-shot for the shorter calls of the same workspace.
    room = max(call.tokens for call in calls), max(call.hidden for call in calls)
    reason = cleared_wrongly(problem.world_size, *room)
    return Support(ok=reason is None, reason=reason or "")


def cleared_wrongly(world_size: int, max_tokens: int, hidden: int) -> str | None:
    """Why one-shot calls on a workspace of this size return what earlier calls left, or None.

    The library takes them without an error; `golden/h200x2/findings` shows what happens.
    """
    third = 2 * world_size * max_tokens * hidden
    if third <= CLEARED_BYTES:
        return None
    return (
        f"one-shot on a workspace for {max_tokens} x {hidden} at {world_size} ranks clears beside it: "
        f"the offset of {third} bytes a third overflows an int32, at most {CLEARED_BYTES} do not"
    )


def picks_oneshot(world_size: int, tokens: int, hidden: int, strategy: Strategy) -> bool:
    """Whether a call runs the one-shot kernel; where it is AUTO, as FlashInfer decides."""
    if strategy is Strategy.AUTO:
        return 4 * tokens * hidden * world_size <= ONESHOT_BYTES.get(world_size, 0)
    return strategy is Strategy.ONESHOT


class FlashInferBackend:
    """Backend `flashinfer`: one process per GPU, or virtual ranks on one GPU.

    Args:
        variant: comma-separated names of `VARIANTS`.

    Raises:
        UsageError: an unknown variant.
    """

    device = "cuda"

    def __init__(self, variant: str = "") -> None:
        given = [part for part in variant.split(",") if part]
        unknown = [part for part in given if part not in VARIANTS]
        if unknown:
            raise UsageError(f"flashinfer variant {unknown[0]!r}, expected of: {', '.join(VARIANTS)}")
        self.fp32 = "fp32" in given
        self.pdl = "pdl" in given
        self.early = "early" in given
        self.unified = "unified" in given
        self.name = f"flashinfer:{','.join(given)}" if given else "flashinfer"

    def supports(self, problem: Problem) -> Support:
        """Refuse without FlashInfer or a GPU that it builds for, and the shapes that its kernel refuses."""
        reason = refused_here(installed()) or refused_gpu(torch.cuda.device_count())
        return Support(ok=False, reason=reason) if reason is not None else shape_support(problem)

    def dataflow(self, problem: Problem) -> Dataflow:
        """The dataflow `flashinfer`, or `flashinfer-fp32` with that variant."""
        del problem
        return dataflow("flashinfer-fp32" if self.fp32 else "flashinfer")

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        """Make the workspace; a collective call.

        Raises:
            ValueError: the rank is not on a GPU, or is virtual and the variant `unified`.
        """
        if rank.device.type != "cuda":
            raise ValueError(f"flashinfer on {rank.device}, expected a CUDA device: give --device cuda")
        from verify.backends import flashinfer_kernels as kernels

        options = kernels.Options(self.fp32, self.pdl, self.early)
        shared = getattr(rank, "board", None)
        if shared is not None and self.unified:
            raise ValueError("virtual ranks make their own pointer tables: leave the variant unified out")
        if shared is not None:
            return kernels.VirtualKernel(options, rank, shared, limits)
        return (kernels.UnifiedKernel if self.unified else kernels.LegacyKernel)(options, rank, limits)
