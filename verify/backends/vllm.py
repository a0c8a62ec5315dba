"""vLLM's kernels from its wheel: the custom all-reduce, then one kernel that adds, normalises and quantises, or two.

What an operation calls: `fused_add_rms_norm_static_fp8_quant` (scale given), `rms_norm_dynamic_per_token_quant` and
`rms_norm_per_block_quant` (scales made) where the norm is not returned, else `fused_add_rms_norm` and the quantiser.
Only the library `_C_stable_libtorch.abi3.so` is loaded, which is built against torch's stable ABI: vLLM itself, and
what it needs, is not imported. The calls are those of `vllm/distributed/device_communicators/custom_all_reduce.py`;
0.25.1 and 0.33.0 have the same schemas. Arithmetic as read in csrc/libtorch_stable of github.com/vllm-project/vllm:
layernorm_kernels.cu at 0b9c5412, layernorm_utils.cuh at 1051220e; with a given scale in the wheels' machine code.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusecheck.backends.custom_all_reduce import CustomAllReduce, call_support, load, ordered
from fusecheck.backends.custom_all_reduce import library as library_of
from fusecheck.backends.operands import check_gpu_process
from fusecheck.dataflow import Dataflow, dataflow
from fusecheck.interface import Kernel, Limits, Operation, Rank, RankInputs, RankOutputs, Strategy, Support
from fusecheck.operations import GIVEN_SCALE
from fusecheck.quantflow import QUANT_FLOWS

if TYPE_CHECKING:
    from fusecheck.problem import Problem

LIBRARY = "_C_stable_libtorch.abi3.so"
GROUP, PACKED = "group-fp8", "group-fp8-packed"
BLOCKS = 256
"""Groups of a row that `rms_norm_per_block_quant` has threads for."""
LEAST, TOP = 1e-10, 448.0
"""What vLLM gives its group quantisers: the least amax, the largest code."""

OPERATIONS = tuple(
    Operation.named(name)
    for name in (
        *("RESIDUAL_RMS_NORM", "RESIDUAL_RMS_NORM_QUANT_FP8", "RESIDUAL_RMS_NORM_OUT_QUANT_FP8", "ALL_REDUCE"),
        *(f"RESIDUAL_RMS_NORM_{out}QUANT_DYNAMIC_FP8" for out in ("", "OUT_")),
        *(f"RESIDUAL_RMS_NORM_{out}QUANT_GROUP_FP8{packed}" for packed in ("", "_PACKED") for out in ("", "OUT_")),
    )
)
"""What the kernels are asked for unless told otherwise."""


def library() -> Path | None:
    """Where the wheel's library lies; None where vLLM is not installed, or has none of this kind."""
    return library_of("vllm", LIBRARY)


def in_one(op: Operation) -> bool:
    """Whether one kernel adds, normalises and quantises."""
    return op.norm and not op.returns_norm and op.quantiser in (GIVEN_SCALE, "dynamic-fp8", GROUP)


class VllmBackend:
    """Backend `vllm`: one process per GPU of one host."""

    name = "vllm"
    device = "cuda"
    operations = OPERATIONS
    binaries = (LIBRARY,)

    def supports(self, problem: Problem) -> Support:
        """Refuse without the library, and what its kernels lack."""
        if library() is None:
            return Support(ok=False, reason=f"no vLLM with {LIBRARY} is installed")
        return next((able for _, call in problem.calls() if not (able := op_support(call)).ok), Support(ok=True))

    def dataflow(self, problem: Problem) -> Dataflow:
        """`vllm-c`; with codes and their scales from one kernel `vllm-fused-quant`.

        Of `fused_add_rms_norm_static_fp8_quant` an older source rounds before the product with gamma, too. The machine
        code of 0.25.1 and of 0.33.0 for sm_90 rounds behind it alone, as `fused_add_rms_norm` does.
        """
        op = problem.op
        flow = dataflow("vllm-fused-quant" if in_one(op) and op.quantiser != GIVEN_SCALE else "vllm-c")
        if in_one(op) and op.quantiser == GROUP:
            flow = replace(flow, quants=tuple((dict(flow.quants) | {GROUP: QUANT_FLOWS[GROUP]["vllm-block"]}).items()))
        return ordered(flow, problem.world_size)

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        """Load the library and exchange the buffers; a collective call.

        Raises:
            ValueError: the rank is not on a GPU, or has no process group.
        """
        check_gpu_process(self.name, rank)
        load(library())
        return VllmKernel(rank, limits)


def op_support(call: Problem) -> Support:
    """Whether vLLM has kernels for a call, and why not."""
    op = call.op
    if not (able := call_support(call, "vLLM")).ok:
        return able
    if op not in OPERATIONS:
        return Support(ok=False, reason=f"{op} is not adapted")
    if call.weight_bias:
        return Support(ok=False, reason="vLLM's kernels in C++ add no weight bias")
    if op.quantiser in (GROUP, PACKED) and (call.hidden % 128 or call.hidden > 128 * BLOCKS):
        return Support(ok=False, reason=f"hidden {call.hidden}, expected a multiple of 128 up to {128 * BLOCKS}")
    return Support(ok=True)


class VllmKernel:
    """The all-reduce and the kernels behind it on one rank."""

    def __init__(self, rank: Rank, limits: Limits) -> None:
        self._ops = torch.ops._C
        self._reducer = CustomAllReduce(torch.ops._C_custom_ar, rank, limits)

    def run(self, inputs: RankInputs, *, op: Operation, strategy: Strategy) -> RankOutputs:
        """Run the kernels on the current stream; a collective call. vLLM chooses the exchange itself.

        Raises:
            ValueError: an operand of a wrong shape, dtype or layout, or larger than the workspace.
        """
        del strategy
        summed, outputs = self._reducer.begin(inputs, op)
        if not op.norm:
            return outputs
        if in_one(op):
            self._quantise_at_once(summed, inputs, outputs, op)
            return outputs
        self._ops.fused_add_rms_norm(summed, outputs.residual, inputs.gamma, inputs.eps)
        self._quantise(summed, inputs, outputs, op)
        return replace(outputs, norm=summed if op.returns_norm else None)

    def _quantise_at_once(self, summed: Tensor, inputs: RankInputs, outputs: RankOutputs, op: Operation) -> None:
        """Add, normalise and quantise in one kernel."""
        stream, gamma, eps = outputs.residual, inputs.gamma, inputs.eps
        if op.quantiser == GIVEN_SCALE:
            self._ops.fused_add_rms_norm_static_fp8_quant(outputs.quant, summed, stream, gamma, inputs.scale, eps)
            return
        assert outputs.scale is not None
        made = outputs.quant, summed, gamma, outputs.scale, eps, None, stream
        if op.quantiser == GROUP:
            self._ops.rms_norm_per_block_quant(*made, 128, inputs.layout.startswith("column"))
        else:
            self._ops.rms_norm_dynamic_per_token_quant(*made)

    def _quantise(self, norm: Tensor, inputs: RankInputs, outputs: RankOutputs, op: Operation) -> None:
        """Quantise the norm in a kernel of its own, where the operation asks for codes."""
        if op.quantiser == GIVEN_SCALE:
            self._ops.static_scaled_fp8_quant(outputs.quant, norm, inputs.scale, None)
        elif op.quantiser == "dynamic-fp8":
            self._ops.dynamic_per_token_scaled_fp8_quant(outputs.quant, norm, outputs.scale, None)
        elif op.quantiser == GROUP:
            told = 128, LEAST, -TOP, TOP, False, inputs.layout.startswith("column"), inputs.layout.endswith("aligned")
            self._ops.per_token_group_fp8_quant(norm, outputs.quant, outputs.scale, *told)
        elif op.quantiser == PACKED:
            self._ops.per_token_group_fp8_quant_packed(norm, outputs.quant, outputs.scale, 128, LEAST, -TOP, TOP)

    def close(self) -> None:
        """Give the buffers back, once no peer uses them; a collective call."""
        self._reducer.close()
