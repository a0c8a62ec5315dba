"""TensorRT-LLM's fused kernels, `torch.ops.trtllm.allreduce_pg` and its kin. Not yet run there: see `STATUS`.

Variants, after a colon and separated by commas: `fp32` or `native`, the sums that are expected, and one of the
library's own strategies, `nccl`, `min-latency`, `nccl-symmetric`, or `mnnvl`, in place of the Problem's. How the kernel
adds up depends on the release and on ALL_REDUCE_FUSION_KERNEL_ACC_FP32; see `tensorrt_llm_release.sums`.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from fusecheck.backends.flashinfer import capability
from fusecheck.backends.packages import is_installed
from fusecheck.backends.tensorrt_llm_ops import (
    MNNVL_OPS,
    NAMED,
    OPERATIONS,
    AllReduceKernel,
    MnnvlKernel,
    number_of,
)
from fusecheck.backends.tensorrt_llm_release import (
    ACCUMULATE,
    FP32_SINCE,
    WITHOUT_MPI,
    launches_dependently,
    release,
    room,
    sums,
)
from fusecheck.dataflow import ALONE, Dataflow, ExpertFlow, dataflow
from fusecheck.errors import UsageError
from fusecheck.interface import Kernel, Limits, Rank, Strategy, Support
from fusecheck.operations import Collective

if TYPE_CHECKING:
    from fusecheck.problem import Problem

STATUS = "not yet run on TensorRT-LLM: tested against ops registered under its published schemas"

BLOCK_SCALED = {"nvfp4": 16, "mxfp8": 128}
"""Quantisers that are compiled for SM 100 and later alone, and what hidden must be a multiple of."""
MNNVL = "mnnvl"
ONESHOT_TOKENS = 128
"""`kOneShotMaxToken`: a longer call with the strategy min-latency is two-shot."""
TABLE_TOKENS, TABLE_HIDDEN = 2048, range(65, 16384)
"""Where AUTO is one-shot on SM 90 at two ranks for certain, by the library's table; beyond, NCCL comes in between."""


class TensorRTLLMBackend:
    """Backend `tensorrt_llm`: the ops with the workspace that the library's own `AllReduce` module makes.

    Args:
        variant: comma-separated: at most one of `fp32` and `native`, and at most one name of `NAMED`, or `mnnvl`.

    Raises:
        UsageError: an unknown variant.
    """

    device = "cuda"
    binaries = ("tensorrt_llm",)
    operations = OPERATIONS
    one_workspace = True

    def __init__(self, variant: str = "") -> None:
        given = [part for part in variant.split(",") if part]
        asked = [part for part in given if part in ("fp32", "native")]
        named = [part for part in given if part not in asked]
        if len(asked) > 1 or len(named) > 1 or any(part not in (*NAMED, MNNVL) for part in named):
            raise UsageError(
                f"tensorrt_llm variant {variant!r}, expected of: fp32 or native, and one of {', '.join(NAMED)}, {MNNVL}"
            )
        self.asked = asked[0] if asked else None
        self.strategy = named[0] if named else None
        self.name = f"tensorrt_llm:{','.join(given)}" if given else "tensorrt_llm"

    @property
    def pdl(self) -> bool:
        """Whether the fused kernels are launched by programmatic dependent launch, as they are by default."""
        return launches_dependently() and not self._is_nccl

    @property
    def _is_nccl(self) -> bool:
        return self.strategy in ("nccl", "nccl-symmetric")

    def supports(self, problem: Problem) -> Support:
        """Refuse without TensorRT-LLM, and what its kernel would abort the process for."""
        if not is_installed("tensorrt_llm"):
            return Support(ok=False, reason=f"tensorrt_llm is not installed ({STATUS})")
        reasons = (self._refused(call) for _, call in problem.calls())
        reason = self._conflict() or next((reason for reason in reasons if reason), "")
        return Support(ok=not reason, reason=reason)

    def _refused(self, call: Problem) -> str:
        """Why one call is not taken; empty where it is."""
        op = call.op
        if op not in OPERATIONS:
            return f"TensorRT-LLM has no {op.name}"
        number = number_of(op, call.layout)
        if op.collective is Collective.ALL_REDUCE and number is None:
            return f"{op.name} has no scales in the layout {call.layout}"
        if self.strategy == MNNVL and number not in MNNVL_OPS:
            return f"mnnvl_fusion_allreduce has no {op.name}"
        if op.has_experts and self.strategy is not None:
            return f"{op.name} is an op without a strategy: leave the variant {self.strategy} out"
        multiple, chip = BLOCK_SCALED.get(op.quantiser, 1), capability()
        if multiple > 1 and chip is not None and chip < 10:
            return f"{op.quantiser} on capability {chip} writes nothing: its body is compiled for 10 and later"
        if call.hidden % multiple:
            return f"hidden {call.hidden} is no multiple of {multiple}, which {op.quantiser} needs here"
        return "" if self._goes_to_nccl(call) else shape_refusal(call, self.strategy)

    def _goes_to_nccl(self, call: Problem) -> bool:
        """Whether the op gives the call to NCCL and ops of their own, whatever strategy is asked for."""
        fused = call.op.has_experts or self.strategy == MNNVL
        return self._is_nccl or (not fused and 2 * call.tokens * call.hidden > room())

    def dataflow(self, problem: Problem) -> Dataflow:
        """`trtllm` or `trtllm-fp32`; `trtllm-nccl`, which contains both, where NCCL adds up or may do so."""
        return replace(self._declared(problem), invariant_below=ALONE)

    def _declared(self, problem: Problem) -> Dataflow:
        if self.strategy == MNNVL:
            return dataflow("trtllm-mnnvl")
        if self._goes_to_nccl(problem) or (self.strategy is None and _may_be_nccl(problem)):
            return dataflow("trtllm-nccl")
        if problem.op.has_experts:
            return replace(dataflow("trtllm"), experts=_experts(problem.op.collective))
        return dataflow("trtllm-fp32" if (self.asked or sums()) == "fp32" else "trtllm")

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        """Make the workspace, or find it: the library keeps one a mapping. A collective call.

        Raises:
            ValueError: the sums of this release in this environment are not those of the variant; or no process group.
            RuntimeError: the release lacks the op, or the ranks have no access to each other's memory.
        """
        if reason := self._conflict():
            raise ValueError(reason)
        os.environ.setdefault(WITHOUT_MPI, "1")  # read at the import: a rank here is no process of MPI
        importlib.import_module("tensorrt_llm")
        if self.strategy == MNNVL:
            return MnnvlKernel(rank, 4 * limits.max_tokens * limits.hidden * rank.world_size)
        return AllReduceKernel(rank, self.strategy, fused=not self._is_nccl)

    def _conflict(self) -> str:
        """Why release and environment do not keep what the variant says; empty where they do."""
        if os.environ.get(WITHOUT_MPI, "1") != "1":
            return (
                f"{WITHOUT_MPI}={os.environ[WITHOUT_MPI]}: the ranks are no processes of MPI; unset it, or set it to 1"
            )
        found, given = sums(), f"{ACCUMULATE}={os.environ.get(ACCUMULATE, '(unset)')}"
        if found is None:
            return f"whether 1.3.0rc23 adds up in float32 with {given} depends on the build: set {ACCUMULATE}=1"
        if self.asked not in (None, found):
            return f"{self.name}: this release adds up in {found} with {given}; set it before the ranks start"
        return ""


def _may_be_nccl(problem: Problem) -> bool:
    """Whether the library's table may give an AUTO call to NCCL."""
    if problem.strategy is not Strategy.AUTO or problem.op.has_experts:
        return False
    small = problem.tokens <= TABLE_TOKENS and problem.hidden in TABLE_HIDDEN
    swept = problem.op.residual and problem.op.quantiser not in BLOCK_SCALED
    return not (capability() == 9 and problem.world_size == 2 and small and swept)


def _experts(collective: Collective) -> ExpertFlow:
    """Finalize adds up in float32 and rounds once since pull request 16778; the routed factor is its caller's."""
    wide = collective is Collective.MOE_FINALIZE and release() >= FP32_SINCE
    return ExpertFlow("fp32" if wide else "native", product_rounded=not wide, scaling="never")


def shape_refusal(call: Problem, strategy: str | None) -> str:
    """Why the fused kernel does not take a shape, for which a check inside the op would end the process; or empty."""
    eighths = call.hidden // 8
    if call.world_size not in (2, 4, 8, 16):
        return f"world size {call.world_size} is none of 2, 4, 8, 16"
    if call.hidden > 65536 or (call.hidden > 8192 and eighths % 2):
        return f"hidden {call.hidden}: no block and cluster size covers it"
    if call.weight_bias:
        return "the op has no weight bias"
    two_shot = call.tokens >= call.world_size and (
        call.tokens > ONESHOT_TOKENS if strategy == "min-latency" else call.strategy is not Strategy.ONESHOT
    )
    if two_shot and strategy != MNNVL and not call.op.has_experts and eighths < call.world_size:
        return f"two-shot at hidden {call.hidden} has fewer threads in a block than ranks, and ends the process"
    return ""
