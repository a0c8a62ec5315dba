"""FlashInfer's port of TensorRT-LLM's fused kernel, `trtllm_allreduce_fusion`, on CUDA ranks.

Variants, after a colon and separated by commas: `fp32` (accumulate in float32), `pdl` (programmatic dependent
launch), `early` (trigger dependents before the end), as in `flashinfer:fp32,pdl`.
"""

from __future__ import annotations

import importlib.util
import warnings
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from verify.backends.unfused import check
from verify.dataflow import Dataflow, dataflow
from verify.errors import UsageError
from verify.interface import FusionOp, Kernel, Limits, Rank, RankInputs, RankOutputs, Strategy, Support

if TYPE_CHECKING:
    from verify.problem import Problem

WORLD_SIZES = (2, 4, 8, 16)
VARIANTS = ("fp32", "pdl", "early")
FLAGS = 256
"""Barrier slots of each rank's flag buffer."""
ONESHOT_BYTES = {2: 512 << 20, 4: 64 << 20, 8: 42 << 20}
"""FlashInfer's own limits for one-shot when it may choose; at world size 16 it has none and raises KeyError."""
LAMPORT_BYTES = 2**31 - 2**21
"""Beyond this a one-shot call silently becomes two-shot."""

_PATTERNS = {
    FusionOp.RESIDUAL_RMS_NORM: 1,
    FusionOp.RESIDUAL_RMS_NORM_QUANT_FP8: 2,
    FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8: 4,
}


def installed() -> str | None:
    """FlashInfer's version, or None."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    try:
        return metadata.version("flashinfer-python")
    except metadata.PackageNotFoundError:
        return "unknown"


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
    size = problem.tokens * problem.hidden * 2 * problem.world_size
    if problem.strategy is Strategy.ONESHOT and size > LAMPORT_BYTES:
        return Support(ok=False, reason=f"one-shot of {size} bytes, at most {LAMPORT_BYTES}")
    return Support(ok=True)


class FlashInferBackend:
    """Backend `flashinfer`: one process per GPU, peers' memory mapped through torch's symmetric memory.

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
        self.name = f"flashinfer:{','.join(given)}" if given else "flashinfer"

    def supports(self, problem: Problem) -> Support:
        """Refuse without FlashInfer, and the shapes that its kernel refuses."""
        if installed() is None:
            return Support(ok=False, reason="flashinfer-python is not installed")
        return shape_support(problem)

    def dataflow(self, problem: Problem) -> Dataflow:
        """The dataflow `flashinfer`, or `flashinfer-fp32` with that variant."""
        del problem
        return dataflow("flashinfer-fp32" if self.fp32 else "flashinfer")

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        """Make the IPC workspace; a collective call.

        Raises:
            ValueError: the rank is not on a GPU.
        """
        if rank.device.type != "cuda":
            raise ValueError(f"flashinfer on {rank.device}, expected a CUDA device: give --device cuda")
        shared = getattr(rank, "board", None)
        if shared is not None:
            return VirtualKernel(self, rank, shared, limits)
        return FlashInferKernel(self, rank, limits)


class FlashInferKernel:
    """An open workspace on one rank."""

    def __init__(self, backend: FlashInferBackend, rank: Rank, limits: Limits) -> None:
        self._backend, self._rank = backend, rank
        self._library = library()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the legacy API says that it is
            made = self._library.trtllm_create_ipc_workspace_for_all_reduce_fusion(
                rank.index,
                rank.world_size,
                limits.max_tokens,
                limits.hidden,
                group=rank.group,
                create_metadata=True,
            )
        self._handles, self._table, self._metadata = made

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        """Run the kernel on the current stream.

        Raises:
            ValueError: an operand of a wrong shape, dtype or layout.
        """
        check_layout(inputs)
        outputs = allocate(inputs, op)
        launch(self._library, self._backend, self._rank, self._table, inputs, outputs, op, strategy, self._metadata)
        return outputs

    def close(self) -> None:
        """Give the symmetric memory back."""
        torch.cuda.synchronize(self._rank.device)
        self._library.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(self._handles, group=self._rank.group)


class VirtualKernel:
    """The same kernel for one of several ranks that share a GPU and a process, a thread and a stream each.

    Every rank's buffers lie on one device and every rank has a pointer table of its own, which is all that the
    kernel knows of its peers. All ranks' blocks must be resident at once, or they wait for each other for ever.
    """

    def __init__(self, backend: FlashInferBackend, rank: Rank, board: Any, limits: Limits) -> None:
        self._backend, self._rank, self._board = backend, rank, board
        self._library = library()
        size = rank.world_size * limits.max_tokens * limits.hidden * 2
        self._buffers = (
            torch.zeros(size, dtype=torch.uint8, device=rank.device),
            torch.zeros(rank.world_size * FLAGS, dtype=torch.int32, device=rank.device),
            torch.full((3 * size // 2,), -0.0, dtype=torch.float16, device=rank.device),
        )
        self._control = torch.tensor([0, 0, 0, size, 0], dtype=torch.int32, device=rank.device)
        everyone = board.exchange(rank.index, tuple(buffer.data_ptr() for buffer in self._buffers))
        pointers = [pointers[kind] for kind in range(3) for pointers in everyone]
        self._table = torch.tensor([*pointers, self._control.data_ptr()], dtype=torch.int64, device=rank.device)
        torch.cuda.current_stream(rank.device).synchronize()
        board.wait()

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        """Launch when all ranks are ready, so that nothing but the kernels themselves waits on the device."""
        check_layout(inputs)
        outputs = allocate(inputs, op)
        stream = torch.cuda.current_stream(self._rank.device)
        stream.synchronize()
        self._board.wait()
        launch(self._library, self._backend, self._rank, self._table, inputs, outputs, op, strategy, None)
        stream.synchronize()
        self._board.wait()
        return outputs

    def close(self) -> None:
        """Drop the buffers once no rank uses them."""
        self._board.wait()
        self._buffers = ()  # type: ignore[assignment]


def library() -> Any:
    """FlashInfer's module with the legacy API."""
    from flashinfer.comm import trtllm_ar

    return trtllm_ar


def check_layout(inputs: RankInputs) -> None:
    """The kernel reads dense rows in 16-byte vectors and checks neither layout nor the dtype of gamma.

    Raises:
        ValueError: a shape, dtype, layout or alignment that it would misread.
    """
    check(inputs)
    for name in ("partial", "residual", "gamma"):
        tensor = getattr(inputs, name)
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous, expected dense rows: call .contiguous()")
        if tensor.data_ptr() % 16:
            raise ValueError(f"{name} is not 16-byte aligned: give a tensor of its own storage")


def allocate(inputs: RankInputs, op: FusionOp) -> RankOutputs:
    """Outputs of the op, uninitialised."""
    quant = torch.empty(inputs.partial.shape, dtype=torch.float8_e4m3fn, device=inputs.partial.device)
    return RankOutputs(
        residual=torch.empty_like(inputs.partial),
        norm=torch.empty_like(inputs.partial) if op.returns_norm else None,
        quant=quant if op.returns_quant else None,
    )


def launch(
    trtllm: Any,
    backend: FlashInferBackend,
    rank: Rank,
    table: Tensor,
    inputs: RankInputs,
    outputs: RankOutputs,
    op: FusionOp,
    strategy: Strategy,
    metadata_: dict[str, Any] | None,
) -> None:
    """Start the kernel on the current stream."""
    tokens, hidden = inputs.partial.shape
    oneshot = {Strategy.ONESHOT: True, Strategy.TWOSHOT: False, Strategy.AUTO: None}[strategy]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the legacy API says that it is
        trtllm.trtllm_allreduce_fusion(
            allreduce_in=inputs.partial,
            world_size=rank.world_size,
            world_rank=rank.index,
            token_num=tokens,
            hidden_dim=hidden,
            workspace_ptrs=table,
            launch_with_pdl=backend.pdl,
            trigger_completion_at_end=not backend.early,
            fp32_acc=backend.fp32,
            pattern_code=_PATTERNS[op],
            use_oneshot=oneshot,
            allreduce_out=None,
            residual_in=inputs.residual,
            residual_out=outputs.residual,
            norm_out=outputs.norm,
            quant_out=None if outputs.quant is None else outputs.quant.view(torch.uint8),
            scale_out=None,
            rms_gamma=inputs.gamma,
            rms_eps=inputs.eps,
            scale_factor=inputs.scale,
            layout_code=None,
            metadata=metadata_,
            weight_bias=inputs.weight_bias,
        )
