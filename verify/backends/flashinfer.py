"""FlashInfer's port of TensorRT-LLM's fused kernels, `trtllm_allreduce_fusion` and those for experts, on CUDA ranks.

Variants, after a colon and separated by commas: `fp32` (accumulate in float32), `pdl` (programmatic dependent
launch), `early` (trigger dependents before the end), `unified` (through the API with a workspace object, in place of
the legacy functions), as in `flashinfer:fp32,pdl`. The kernel is the same through either API.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fusecheck.backends.flashinfer_experts import expert_refusal
from fusecheck.backends.flashinfer_limits import shape_support
from fusecheck.backends.flashinfer_patterns import OPERATIONS, declared, op_support
from fusecheck.backends.packages import is_installed, release_of
from fusecheck.dataflow import ALONE, Dataflow, dataflow
from fusecheck.errors import UsageError
from fusecheck.interface import Kernel, Limits, Rank, Support
from fusecheck.operations import Collective

if TYPE_CHECKING:
    from fusecheck.backends.flashinfer_kernels import Options
    from fusecheck.problem import Problem

VARIANTS = ("fp32", "pdl", "early", "unified")
OLDEST = (0, 6, 13)
"""The first release that was tried; earlier ones lack arguments."""
CAPABILITIES = (9, 10, 12)
"""Major compute capabilities for which FlashInfer builds the kernel; 12 from release 0.7 on."""


@functools.cache
def installed() -> str | None:
    """FlashInfer's version, or None."""
    if not is_installed("flashinfer"):
        return None
    return release_of("flashinfer-python") or "unknown"


def numbers_of(version: str | None) -> tuple[int, ...] | None:
    """The first three numbers of a version; None where it has none."""
    return tuple(int(part) for part in re.findall(r"\d+", version or "")[:3]) or None


@functools.cache
def capability() -> int | None:
    """The major compute capability of the first GPU, or None."""
    return torch.cuda.get_device_capability(0)[0] if torch.cuda.is_available() else None


def refused_here(version: str | None) -> str | None:
    """Why no kernel of FlashInfer is used on this machine, or None."""
    if version is None:
        return "flashinfer-python is not installed"
    numbers = numbers_of(version)
    if numbers is not None and numbers < OLDEST:
        return f"flashinfer-python {version} is older than {'.'.join(map(str, OLDEST))}, the first that was tried"
    return None


@functools.cache
def refused_gpu(devices: int, capabilities: tuple[int, ...] = CAPABILITIES) -> str | None:
    """Why the fused kernel does not run on the first of so many GPUs, or None."""
    if not devices:
        return None  # nothing to ask; whoever starts ranks will tell
    major, minor = torch.cuda.get_device_capability(0)
    if major in capabilities:
        return None
    *most, last = map(str, capabilities)
    built = " and ".join((*filter(None, [", ".join(most)]), last))
    return f"{torch.cuda.get_device_name(0)} has capability {major}.{minor}, the kernel is built for {built}"


class FlashInferBackend:
    """Backend `flashinfer`: one process per GPU, or virtual ranks on one GPU.

    Args:
        variant: comma-separated names of `VARIANTS`.

    Raises:
        UsageError: an unknown variant.
    """

    device = "cuda"
    library = "flashinfer"
    variants: tuple[str, ...] = VARIANTS
    operations = OPERATIONS
    binaries: tuple[str, ...] = ("flashinfer",)

    def __init__(self, variant: str = "") -> None:
        given = [part for part in variant.split(",") if part]
        unknown = [part for part in given if part not in self.variants]
        if unknown:
            raise UsageError(f"{self.library} variant {unknown[0]!r}, expected of: {', '.join(self.variants)}")
        self.fp32 = "fp32" in given
        self.pdl = "pdl" in given
        self.early = "early" in given
        self.unified = "unified" in given
        self.name = f"{self.library}:{','.join(given)}" if given else self.library

    def supports(self, problem: Problem) -> Support:
        """Refuse without FlashInfer or a GPU that it builds for, and the shapes that its kernel refuses."""
        reason = refused_here(installed()) or refused_gpu(torch.cuda.device_count())
        if reason is not None:
            return Support(ok=False, reason=reason)
        for _, call in problem.calls():
            able = (
                self._experts_support(call)
                if call.op.has_experts
                else op_support(call.op, call.hidden, numbers_of(installed()), capability())
            )
            if not able.ok:
                return able
        return shape_support(problem)

    def _experts_support(self, call: Problem) -> Support:
        lacks = [f"the variant {name}" for name in ("fp32", "early") if getattr(self, name)]
        reason = (
            f"the kernels for experts have no option for {lacks[0]}" if lacks else expert_refusal(call, capability())
        )
        return Support(ok=not reason, reason=reason)

    def dataflow(self, problem: Problem) -> Dataflow:
        """The dataflow `flashinfer`, or `flashinfer-fp32` with that variant, and the rules of a group's path."""
        flow = replace(dataflow("flashinfer-fp32" if self.fp32 else "flashinfer"), invariant_below=ALONE)
        reduces = problem.op.collective is Collective.MOE_REDUCTION
        if problem.op.has_experts and (self.unified or reduces):  # takes no routed factor: that is its caller's
            flow = replace(flow, experts=replace(flow.experts, scaling="never"))
        return declared(flow, problem.op)

    def options(self) -> Options:
        """How the kernel is launched."""
        from fusecheck.backends.flashinfer_kernels import Options

        return Options(self.fp32, self.pdl, self.early)

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        """Make the workspace; a collective call.

        Raises:
            ValueError: the rank is not on a GPU, or is virtual and the variant `unified`.
        """
        if rank.device.type != "cuda":
            raise ValueError(f"{self.library} on {rank.device}, expected a CUDA device: give --device cuda")
        from fusecheck.backends import flashinfer_kernels as kernels

        options = self.options()
        shared = getattr(rank, "board", None)
        if shared is not None and self.unified:
            raise ValueError("virtual ranks make their own pointer tables: leave the variant unified out")
        if shared is not None:
            return kernels.VirtualKernel(options, rank, shared, limits)
        return (kernels.UnifiedKernel if self.unified else kernels.legacy_kernel)(options, rank, limits)
