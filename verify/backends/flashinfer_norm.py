"""FlashInfer's norm kernels behind NCCL's all-reduce: `fused_add_rmsnorm` and `fused_add_rmsnorm_quant`.

One more unfused path, also on a single GPU, where nothing is reduced. Both kernels add the residual in place and
normalise the sum before it is rounded; the quantising one casts without rounding the norm first. FlashInfer has either
kernel in CUDA C++ and in CuTe DSL, which differ in what becomes of a NaN; here the CUDA ones run.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fusecheck.backends.flashinfer import installed, refused_here
from fusecheck.backends.operands import allocate, check_dense
from fusecheck.backends.unfused import all_reduce, check, in_switch
from fusecheck.dataflow import ALONE, Dataflow, dataflow
from fusecheck.interface import FusionOp, Kernel, Limits, Rank, RankInputs, RankOutputs, Strategy, Support

if TYPE_CHECKING:
    from fusecheck.problem import Problem

USE_CUDA = "FLASHINFER_USE_CUDA_NORM"
"""The variable by which FlashInfer takes its CUDA kernels rather than the CuTe DSL ones; read when it is imported."""

MOST_HIDDEN = 57344
"""A row must fit the shared memory of a block, in float32."""


class FlashInferNormBackend:
    """Backend `flashinfer-norm`: needs FlashInfer's module `norm`, and NCCL where there are several ranks."""

    name = "flashinfer-norm"
    binaries = ("flashinfer",)
    device = "cuda"

    def supports(self, problem: Problem) -> Support:
        """Refuse without FlashInfer, and what its kernels lack."""
        if (reason := refused_here(installed())) is not None:
            return Support(ok=False, reason=reason)
        if problem.hidden > MOST_HIDDEN:
            return Support(ok=False, reason=f"hidden {problem.hidden}: a row of more than {MOST_HIDDEN} fits no block")
        if problem.weight_bias not in (0.0, 1.0):
            return Support(ok=False, reason=f"weight bias {problem.weight_bias}: the kernels know 0 and 1")
        if problem.weight_bias and problem.op.returns_quant:
            return Support(ok=False, reason="fused_add_rmsnorm_quant has no weight bias")
        return Support(ok=True)

    def dataflow(self, problem: Problem) -> Dataflow:
        """The dataflow `flashinfer-norm-quant`; where NCCL may add up in the switch, with either rounding."""
        del problem
        declared = replace(dataflow("flashinfer-norm-quant"), invariant_below=ALONE)
        return replace(declared, sum_rounding="either", reproducible=False) if in_switch() else declared

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        """Load the kernels; nothing else is kept.

        Raises:
            ValueError: the rank is not on a GPU, or several ranks have no process group.
        """
        del limits
        if rank.device.type != "cuda":
            raise ValueError(f"flashinfer-norm on {rank.device}, expected a CUDA device: give --device cuda")
        if rank.world_size > 1 and rank.group is None:
            raise ValueError(f"no process group for {rank.world_size} ranks, and virtual ranks have none")
        return FlashInferNormKernel(rank)


def library() -> Any:
    """FlashInfer's module of norm kernels, set to those in CUDA C++.

    Raises:
        RuntimeError: it was imported before with the others.
    """
    os.environ[USE_CUDA] = "1"
    norm = importlib.import_module("flashinfer.norm")
    if not norm._USE_CUDA_NORM:
        raise RuntimeError(f"flashinfer.norm was imported without {USE_CUDA}=1: set it before the ranks start")
    return norm


class FlashInferNormKernel:
    """The all-reduce and the norm kernels on one rank."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._library = library()

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        """Run them on the current stream; a collective call. Norm and codes are one kernel each, on equal inputs.

        Raises:
            ValueError: an operand of a wrong shape, dtype or layout.
        """
        del strategy
        check(inputs)
        check_dense(inputs, ("gamma",))
        summed = all_reduce(inputs.partial, self._rank.group, self._rank.world_size)
        outputs = allocate(inputs, op)
        # Both kernels turn the residual that they are given into the sum: each gets a copy of its own.
        outputs.residual.copy_(inputs.residual)
        if outputs.quant is not None:
            stream = outputs.residual if outputs.norm is None else outputs.residual.clone()
            self._library.fused_add_rmsnorm_quant(outputs.quant, summed, stream, inputs.gamma, inputs.scale, inputs.eps)
        if outputs.norm is not None:
            self._normalise(outputs.norm.copy_(summed), outputs.residual, inputs)
        return outputs

    def _normalise(self, norm: Tensor, residual: Tensor, inputs: RankInputs) -> None:
        """Turn the sum in `norm` into the norm, and `residual` into the stream, both in place."""
        plain, gemma = self._library.fused_add_rmsnorm, self._library.gemma_fused_add_rmsnorm
        (gemma if inputs.weight_bias else plain)(norm, residual, inputs.gamma, inputs.eps)

    def close(self) -> None:
        """Nothing was taken."""
