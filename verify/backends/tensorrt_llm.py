"""TensorRT-LLM's fused kernel, `torch.ops.trtllm.allreduce`. Not yet run on TensorRT-LLM: see `STATUS`.

Variants, after a colon and separated by commas: `fp32` or `native`, the sums that are expected, and one of the
library's own strategies, `nccl`, `min-latency`, `nccl-symmetric`, in place of the Problem's. How the kernel adds up
depends on the release and on ALL_REDUCE_FUSION_KERNEL_ACC_FP32; see `sums`.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fusecheck.backends.operands import check_layout
from fusecheck.dataflow import ALONE, Dataflow, dataflow
from fusecheck.errors import UsageError
from fusecheck.interface import FusionOp, Kernel, Limits, Rank, RankInputs, RankOutputs, Strategy, Support

if TYPE_CHECKING:
    from fusecheck.problem import Problem

STATUS = "not yet run on TensorRT-LLM: tested against ops registered under its published schemas"

FUSION_OPS = {
    FusionOp.RESIDUAL_RMS_NORM: 1,
    FusionOp.RESIDUAL_RMS_NORM_QUANT_FP8: 4,
    FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8: 6,
}
"""`AllReduceFusionOp` by value."""

STRATEGIES = {Strategy.AUTO: 3, Strategy.ONESHOT: 4, Strategy.TWOSHOT: 5}
NAMED = {"nccl": 0, "min-latency": 1, "nccl-symmetric": 8}
"""`AllReduceStrategy` by value."""

ACCUMULATE = "ALL_REDUCE_FUSION_KERNEL_ACC_FP32"
MERGED_IN, FP32_SINCE = (1, 3, 0, 23), (1, 3, 0, 24)
"""Pull request 16753 was merged while the main branch was called 1.3.0rc23; all that is newer has it."""
ONESHOT_TOKENS = 128
"""`kOneShotMaxToken`: a longer one-shot call becomes two-shot."""


class TensorRTLLMBackend:
    """Backend `tensorrt_llm`: the op with the workspace that the library's own `AllReduce` module makes.

    Args:
        variant: comma-separated: at most one of `fp32` and `native`, and at most one name of `NAMED`.

    Raises:
        UsageError: an unknown variant.
    """

    device = "cuda"
    binaries = ("tensorrt_llm",)

    def __init__(self, variant: str = "") -> None:
        given = [part for part in variant.split(",") if part]
        asked = [part for part in given if part in ("fp32", "native")]
        named = [part for part in given if part not in asked]
        if len(asked) > 1 or len(named) > 1 or any(part not in NAMED for part in named):
            raise UsageError(
                f"tensorrt_llm variant {variant!r}, expected of: fp32 or native, and one of {', '.join(NAMED)}"
            )
        self.asked = asked[0] if asked else None
        self.strategy = named[0] if named else None
        self.name = f"tensorrt_llm:{','.join(given)}" if given else "tensorrt_llm"

    def supports(self, problem: Problem) -> Support:
        """Refuse without TensorRT-LLM, and what its kernel would abort the process for."""
        if importlib.util.find_spec("tensorrt_llm") is None:
            return Support(ok=False, reason=f"tensorrt_llm is not installed ({STATUS})")
        reason = self._conflict()
        return Support(ok=False, reason=reason) if reason else shape_support(problem)

    def dataflow(self, problem: Problem) -> Dataflow:
        """`trtllm`, `trtllm-fp32`, or `trtllm-nccl` where NCCL adds up and the rest are ops of their own."""
        del problem
        if self.strategy in ("nccl", "nccl-symmetric"):
            return replace(dataflow("trtllm-nccl"), invariant_below=ALONE)
        named = "trtllm-fp32" if (self.asked or sums()) == "fp32" else "trtllm"
        return replace(dataflow(named), invariant_below=ALONE)

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        """Make the workspace; a collective call.

        Raises:
            ValueError: the sums of this release in this environment are not those of the variant.
        """
        del limits
        if reason := self._conflict():
            raise ValueError(reason)
        return TensorRTLLMKernel(self, rank, workspace(rank))

    def _conflict(self) -> str:
        """Why release and environment do not keep what the variant says; empty where they do."""
        found, given = sums(), f"{ACCUMULATE}={os.environ.get(ACCUMULATE, '(unset)')}"
        if found is None:
            return f"whether 1.3.0rc23 adds up in float32 with {given} depends on the build: set {ACCUMULATE}=1"
        if self.asked not in (None, found):
            return f"{self.name}: this release adds up in {found} with {given}; set it before the ranks start"
        return ""


def sums() -> Literal["fp32", "native"] | None:
    """How the fused kernel adds up in this release and environment; None where the release does not tell.

    Until pull request 16753 (July 2026) float32 sums were asked for by setting the variable to whatever; since then
    they are the default, and 0 turns them off.
    """
    given, found = os.environ.get(ACCUMULATE), release()
    before: Literal["fp32", "native"] = "native" if given is None else "fp32"
    since: Literal["fp32", "native"] = "native" if given == "0" else "fp32"
    if before == since:
        return since
    return since if found >= FP32_SINCE else before if found < MERGED_IN else None


def release() -> tuple[float, ...]:
    """The numbers of the installed release, (1, 3, 0, 24) for 1.3.0rc24; beyond all where there is none."""
    try:
        text = metadata.version("tensorrt_llm")
    except metadata.PackageNotFoundError:
        return (math.inf,)
    final, _, candidate = text.partition("rc")
    numbers = [float(number) for number in re.findall(r"\d+", final)[:3]]
    return (*numbers, float(re.findall(r"\d+", candidate)[0]) if candidate else math.inf)


def shape_support(problem: Problem) -> Support:
    """Whether the fused kernel takes the shape; a failing check inside the op ends the process."""
    eighths = problem.hidden // 8
    if problem.world_size not in (2, 4, 8, 16):
        return Support(ok=False, reason=f"world size {problem.world_size} is none of 2, 4, 8, 16")
    if problem.hidden > 65536 or (problem.hidden > 8192 and eighths % 2):
        return Support(ok=False, reason=f"hidden {problem.hidden}: no block and cluster size covers it")
    if problem.weight_bias:
        return Support(ok=False, reason="the op has no weight bias")
    if problem.strategy is Strategy.TWOSHOT and problem.tokens < problem.world_size:
        return Support(ok=False, reason=f"two-shot needs at least one token a rank, got {problem.tokens}")
    if problem.strategy is Strategy.ONESHOT and problem.tokens > ONESHOT_TOKENS:
        return Support(ok=False, reason=f"one-shot takes {ONESHOT_TOKENS} tokens, got {problem.tokens}")
    return Support(ok=True)


def workspace(rank: Rank) -> Tensor:
    """The pointer table that the library's own `AllReduce` module makes for this rank's `Mapping`.

    Raises:
        RuntimeError: this release offers no workspace where older and newer ones do.
    """
    mapping_of = importlib.import_module("tensorrt_llm.mapping").Mapping
    mapping = mapping_of(world_size=rank.world_size, rank=rank.index, tp_size=rank.world_size)
    module = importlib.import_module("tensorrt_llm._torch.distributed").AllReduce(mapping=mapping)
    made = getattr(module, "workspace", None)
    if made is None:
        raise RuntimeError("tensorrt_llm's AllReduce has no workspace for this mapping: is there peer-to-peer access?")
    return made  # type: ignore[no-any-return]


def operator() -> tuple[Callable[..., Sequence[Tensor]], bool]:
    """The all-reduce op of this release, and whether it ends in `trigger_completion_at_end`.

    Raises:
        RuntimeError: neither namespace has it.
    """
    for namespace in ("trtllm", "tensorrt_llm"):
        packet = getattr(getattr(torch.ops, namespace), "allreduce", None)
        if packet is not None:
            names = [argument.name for argument in packet.default._schema.arguments]
            return packet, "trigger_completion_at_end" in names
    raise RuntimeError("neither torch.ops.trtllm nor torch.ops.tensorrt_llm has allreduce: import tensorrt_llm first")


class TensorRTLLMKernel:
    """The op on one rank."""

    def __init__(self, backend: TensorRTLLMBackend, rank: Rank, table: Tensor) -> None:
        self._backend, self._rank, self._table = backend, rank, table
        self._op, self._triggers = operator()

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        """Run the op; a collective call.

        Raises:
            ValueError: an operand of a wrong shape, dtype or layout, which the op does not check.
        """
        check_layout(inputs)
        named = self._backend.strategy
        arguments: list[Any] = [
            inputs.partial,
            inputs.residual,
            inputs.gamma,
            inputs.scale if op.returns_quant else None,
            None,
            self._table,
            list(range(self._rank.world_size)),
            NAMED[named] if named is not None else STRATEGIES[strategy],
            FUSION_OPS[op],
            inputs.eps,
        ]
        return outputs_of(self._op(*arguments, *([True] if self._triggers else [])), op)

    def close(self) -> None:
        """The library keeps the workspace of a mapping."""


def outputs_of(returned: Sequence[Tensor], op: FusionOp) -> RankOutputs:
    """Name the op's outputs, whose order is norm, codes, residual, less what was not asked for.

    Raises:
        ValueError: another number of outputs.
    """
    expected = [*(["norm"] if op.returns_norm else []), *(["quant"] if op.returns_quant else []), "residual"]
    if len(returned) != len(expected):
        raise ValueError(f"{op.value} returned {len(returned)} tensors, expected {', '.join(expected)}")
    named = dict(zip(expected, returned, strict=True))
    if "quant" in named:
        named["quant"] = named["quant"].view(torch.float8_e4m3fn)
    return RankOutputs(**named)
