"""tokenspeed-kernel's fork of FlashInfer's fused kernel, which its wheel brings prebuilt for 9.0a, 10.0a and 10.3a.

Variants, after a colon and separated by commas: `fp32`, `pdl` and `early`, as of the backend `flashinfer`. Launch,
workspace and exchange are FlashInfer's; patterns 6 to 10 are its own, of which only 6 is a composition of the family.
Read at commit 27a74a33 of github.com/lightseekorg/tokenspeed, `csrc/cuda/trtllm_allreduce_fusion.cu` and its header,
compiled with `-use_fast_math`; the release 0.1.4 (October 2026) has the same functions in Python.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fusecheck.backends.flashinfer import FlashInferBackend, refused_gpu
from fusecheck.backends.flashinfer_kernels import Options
from fusecheck.backends.flashinfer_limits import shape_support
from fusecheck.backends.packages import is_installed
from fusecheck.dataflow import ALONE, Dataflow, dataflow
from fusecheck.interface import RankInputs, RankOutputs, Strategy, Support
from fusecheck.operations import GIVEN_SCALE, Collective, Operation

if TYPE_CHECKING:
    from fusecheck.problem import Problem

PATTERNS = {"none": (1, 1), GIVEN_SCALE: (2, 4), "group-fp8": (6, None)}
"""`AllReduceFusionPattern` by quantiser: without the norm among the outputs, and with it."""
GROUP = 128
"""Elements of a group: 16 threads of 8."""
LAYOUT = "column-major-aligned"
"""The only layout of scales that the kernel takes."""
CAPABILITIES = (9, 10)
"""Major compute capabilities for which the wheel has the kernel."""

OPERATIONS = tuple(
    Operation.named(name)
    for name in (
        *("RESIDUAL_RMS_NORM", "RESIDUAL_RMS_NORM_QUANT_FP8", "RESIDUAL_RMS_NORM_OUT_QUANT_FP8", "ALL_REDUCE"),
        "RESIDUAL_RMS_NORM_QUANT_GROUP_FP8",
    )
)
"""What the kernel is asked for unless told otherwise."""


def installed() -> bool:
    """Whether the package is there; it is not imported."""
    return is_installed("tokenspeed_kernel")


@dataclass(frozen=True)
class TokenSpeedOptions(Options):
    """How the fork is launched: as FlashInfer's, without a weight bias and without groups of other sizes."""

    module: ClassVar[str] = "tokenspeed_kernel.thirdparty.cuda.trtllm"

    def pattern(self, op: Operation) -> int:
        """The fork's number of an operation that `op_support` takes."""
        number = PATTERNS[op.quantiser][op.returns_norm] if op.norm else 0
        assert number is not None
        return number

    def arguments(self, inputs: RankInputs, outputs: RankOutputs, op: Operation, strategy: Strategy) -> dict[str, Any]:
        """FlashInfer's, as far as the fork has them."""
        made = super().arguments(inputs, outputs, op, strategy)
        return {name: value for name, value in made.items() if name not in ("block_quant_group_size", "weight_bias")}


class TokenSpeedBackend(FlashInferBackend):
    """Backend `tokenspeed`: one process per GPU, or virtual ranks on one GPU.

    Args:
        variant: comma-separated names of `variants`.

    Raises:
        UsageError: an unknown variant.
    """

    library = "tokenspeed"
    variants = ("fp32", "pdl", "early")
    operations = OPERATIONS
    binaries = ("tokenspeed_kernel",)

    def supports(self, problem: Problem) -> Support:
        """Refuse without the package or a GPU that it is built for, and what its kernel has no pattern for."""
        if not installed():
            return Support(ok=False, reason="tokenspeed-kernel is not installed")
        reason = refused_gpu(torch.cuda.device_count(), CAPABILITIES)
        if reason is not None:
            return Support(ok=False, reason=reason)
        for _, call in problem.calls():
            able = op_support(call)
            if not able.ok:
                return able
        return shape_support(problem)

    def dataflow(self, problem: Problem) -> Dataflow:
        """FlashInfer's dataflow with the fork's own way to quantise groups."""
        del problem
        return replace(dataflow(f"flashinfer{'-fp32' if self.fp32 else ''}/tokenspeed"), invariant_below=ALONE)

    def options(self) -> Options:
        """How the kernel is launched."""
        return TokenSpeedOptions(self.fp32, self.pdl, self.early)


def op_support(call: Problem) -> Support:
    """Whether the fork has a pattern for a call, and why not."""
    op = call.op
    if op.collective is not Collective.ALL_REDUCE:
        return Support(ok=False, reason=f"tokenspeed-kernel's {op.collective.value} is not adapted")
    if op.norm and (not op.residual or op.quantiser not in PATTERNS or PATTERNS[op.quantiser][op.returns_norm] is None):
        return Support(ok=False, reason=f"tokenspeed-kernel has no pattern for {op}")
    if call.weight_bias:
        return Support(ok=False, reason="tokenspeed-kernel adds no weight bias")
    if op.quantiser != "group-fp8":
        return Support(ok=True)
    if call.layout != LAYOUT:
        return Support(ok=False, reason=f"tokenspeed-kernel takes scales only in the layout {LAYOUT}")
    if call.hidden % GROUP:
        return Support(ok=False, reason=f"groups of {GROUP} in rows of {call.hidden}, expected a multiple")
    return Support(ok=True)
