"""SGLang's kernels from the wheel sglang-kernel: its custom all-reduce, FlashInfer's norm in place, its quantisers.

What an operation calls: `all_reduce`, then `fused_add_rmsnorm` (Gemma's where the weight bias is 1), then
`sgl_per_token_quant_fp8` or `sgl_per_token_group_quant_8bit_v2`. The wheel quantises by no given scale.
Only the library for sm_90 is loaded; the package is not imported, which would take FlashInfer's norm where that is
installed. Operators, their arguments and when Python enables PDL are as in the wheel 0.4.6 (read 2026-11-29).

Arithmetic as read in the wheel's machine code for sm_90, which `-use_fast_math` made. All sums and products flush.
The norm is of the float32 stream. A scale is the amax times fl(1 / 448); codes are the norm times rcp(scale) of a
token, or times 448 * rcp(amax) of a group. The other build, for other chips, was not read.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusecheck.backends.custom_all_reduce import CustomAllReduce, call_support, load, ordered
from fusecheck.backends.custom_all_reduce import library as library_of
from fusecheck.backends.flashinfer import refused_gpu
from fusecheck.backends.flashinfer_norm import MOST_HIDDEN
from fusecheck.backends.operands import check_gpu_process
from fusecheck.dataflow import Dataflow, dataflow
from fusecheck.interface import Kernel, Limits, Operation, Rank, RankInputs, RankOutputs, Strategy, Support
from fusecheck.quantflow import without_group
from fusecheck.quantisers.known import quantiser

if TYPE_CHECKING:
    from fusecheck.problem import Problem

LIBRARY = "sm90/common_ops.abi3.so"
CAPABILITIES = (9,)
"""Major compute capabilities for which Python loads this library."""
DYNAMIC, GROUP, PACKED = "dynamic-fp8", "group-fp8", "group-fp8-packed"
GROUPS = (16, 32, 64, 128)
"""Sizes of groups that the kernel is built for."""
LEAST, TOP = 1e-10, 448.0
"""What the group quantiser is given, and checks: the least amax, the largest code."""
ROWS_OF_ONE_KERNEL = 16
"""Rows of a multiprocessor from which on `sgl_per_token_quant_fp8` takes another kernel."""

OPERATIONS = tuple(
    Operation.named(name)
    for name in (
        *("RESIDUAL_RMS_NORM", "ALL_REDUCE"),
        *(f"RESIDUAL_RMS_NORM_{out}QUANT_DYNAMIC_FP8" for out in ("", "OUT_")),
        *(f"RESIDUAL_RMS_NORM_{out}QUANT_GROUP_FP8{packed}" for packed in ("", "_PACKED") for out in ("", "OUT_")),
    )
)
"""What the kernels are asked for unless told otherwise."""


def library() -> Path | None:
    """Where the wheel's library for sm_90 lies; None where sglang-kernel is not installed, or has none."""
    return library_of("sgl_kernel", LIBRARY)


class SglangBackend:
    """Backend `sglang`: one process per GPU of one host."""

    name = "sglang"
    device = "cuda"
    operations = OPERATIONS
    binaries = (LIBRARY,)

    def supports(self, problem: Problem) -> Support:
        """Refuse without the library or a GPU that it is built for, and what its kernels lack."""
        if library() is None:
            return Support(ok=False, reason=f"no sglang-kernel with {LIBRARY} is installed")
        if (reason := refused_gpu(torch.cuda.device_count(), CAPABILITIES)) is not None:
            return Support(ok=False, reason=reason)
        rows = rows_of_one_kernel()
        return next((able for _, call in problem.calls() if not (able := op_support(call, rows)).ok), Support(ok=True))

    def dataflow(self, problem: Problem) -> Dataflow:
        """`sglang`, in the order of the all-reduce."""
        return ordered(dataflow("sglang"), problem.world_size)

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        """Load the library and exchange the buffers; a collective call.

        Raises:
            ValueError: the rank is not on a GPU, or has no process group.
        """
        check_gpu_process(self.name, rank)
        load(library())
        return SglangKernel(rank, limits)


def rows_of_one_kernel() -> int | None:
    """From how many rows on the first GPU quantises tokens by the other kernel; None without a GPU."""
    if not torch.cuda.device_count():
        return None
    return ROWS_OF_ONE_KERNEL * torch.cuda.get_device_properties(0).multi_processor_count


def op_support(call: Problem, rows: int | None = None) -> Support:
    """Whether the wheel has kernels for a call, and why not; `rows` as of `rows_of_one_kernel`."""
    op = call.op
    kind = without_group(op.quantiser)
    if not (able := call_support(call, "sglang-kernel")).ok:
        return able
    if op.norm and (not op.residual or kind not in ("none", DYNAMIC, GROUP, PACKED)):
        return Support(ok=False, reason=f"sglang-kernel has no kernels for {op}")
    if call.weight_bias not in (0.0, 1.0):
        return Support(ok=False, reason=f"weight bias {call.weight_bias}: the kernels know 0 and 1")
    if call.hidden > MOST_HIDDEN:
        return Support(ok=False, reason=f"hidden {call.hidden}: a row of more than {MOST_HIDDEN} fits no block")
    if kind == DYNAMIC and rows is not None and call.tokens >= rows:
        return Support(ok=False, reason=f"{call.tokens} rows: from {rows} on another kernel, with other codes of zeros")
    if kind in (GROUP, PACKED) and ((size := group_of(op)) not in GROUPS or call.hidden % size):
        return Support(ok=False, reason=f"groups of {size} in rows of {call.hidden}, expected a divisor among {GROUPS}")
    return Support(ok=True)


def group_of(op: Operation) -> int | None:
    """How many elements of a row have one scale; None: all."""
    return quantiser(op.quantiser).group


class SglangKernel:
    """The all-reduce and the kernels behind it on one rank."""

    def __init__(self, rank: Rank, limits: Limits) -> None:
        self._ops = torch.ops.sgl_kernel
        self._reducer = CustomAllReduce(self._ops, rank, limits)

    def run(self, inputs: RankInputs, *, op: Operation, strategy: Strategy) -> RankOutputs:
        """Run the kernels on the current stream; a collective call. The all-reduce chooses the exchange itself.

        Raises:
            ValueError: an operand of a wrong shape, dtype or layout, or larger than the workspace.
        """
        del strategy
        norm, outputs = self._reducer.begin(inputs, op)
        if not op.norm:
            return outputs
        add_and_norm = self._ops.gemma_fused_add_rmsnorm if inputs.weight_bias else self._ops.fused_add_rmsnorm
        pdl = True  # as SGLang launches it from sm_90 on
        add_and_norm(norm, outputs.residual, inputs.gamma, inputs.eps, pdl)
        self._quantise(norm, outputs, op)
        return replace(outputs, norm=norm if op.returns_norm else None)

    def _quantise(self, norm: Tensor, outputs: RankOutputs, op: Operation) -> None:
        """Quantise the norm in a kernel of its own, where the operation asks for codes."""
        kind = without_group(op.quantiser)
        if kind == DYNAMIC:
            self._ops.sgl_per_token_quant_fp8(norm, outputs.quant, outputs.scale)
        elif kind in (GROUP, PACKED):
            told = group_of(op), LEAST, -TOP, TOP, kind == PACKED, False, None  # neither SiLU nor a mask
            self._ops.sgl_per_token_group_quant_8bit_v2(norm, outputs.quant, outputs.scale, *told)

    def close(self) -> None:
        """Give the buffers back, once no peer uses them; a collective call."""
        self._reducer.close()
