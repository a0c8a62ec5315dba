"""Open workspaces of FlashInfer's fused kernel: through its legacy functions, its unified API, or for virtual ranks."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_void_p
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusecheck.backends.flashinfer_experts import launch_legacy_experts, launch_unified_experts
from fusecheck.backends.flashinfer_limits import cleared_wrongly, picks_oneshot
from fusecheck.backends.flashinfer_patterns import LAYOUTS, family_of, pattern_of
from fusecheck.backends.operands import allocate, check_layout
from fusecheck.interface import Limits, Rank, RankInputs, RankOutputs, Strategy
from fusecheck.operations import GIVEN_SCALE, Operation

LEGACY = "flashinfer.comm.trtllm_ar"
"""FlashInfer's module with the legacy API."""
FLAGS = 256
"""Barrier slots of each rank's flag buffer."""

ONESHOT = {Strategy.ONESHOT: True, Strategy.TWOSHOT: False, Strategy.AUTO: None}


@dataclass(frozen=True)
class Options:
    """How the kernel is launched.

    Attributes:
        fp32: accumulate in float32.
        pdl: programmatic dependent launch.
        early: trigger dependents before the end.
        module: the library's module that has the legacy functions; a fork of the kernel has its own.
    """

    fp32: bool = False
    pdl: bool = False
    early: bool = False
    module: ClassVar[str] = LEGACY

    def pattern(self, op: Operation) -> int:
        """The library's number of the operation."""
        return pattern_of(op)

    def arguments(self, inputs: RankInputs, outputs: RankOutputs, op: Operation, strategy: Strategy) -> dict[str, Any]:
        """The arguments that both APIs have by the same names."""
        given = op.quantiser in (GIVEN_SCALE, "nvfp4")
        quantised = op.quantiser != "none"
        return {
            "launch_with_pdl": self.pdl,
            "trigger_completion_at_end": not self.early,
            "fp32_acc": self.fp32,
            "use_oneshot": ONESHOT[strategy],
            "residual_in": inputs.residual if op.residual else None,
            "residual_out": outputs.residual,
            "norm_out": outputs.norm,
            # As upstream's tests give it: bytes for a given scale, codes for made ones.
            "quant_out": outputs.quant.view(torch.uint8) if given and outputs.quant is not None else outputs.quant,
            "scale_out": outputs.scale,
            "rms_gamma": inputs.gamma if op.norm else None,
            "rms_eps": inputs.eps,
            "scale_factor": inputs.scale if given else None,
            "layout_code": LAYOUTS.get(inputs.layout) if quantised else None,
            "block_quant_group_size": family_of(op.quantiser)[1],
            "weight_bias": inputs.weight_bias,
        }


class LegacyKernel:
    """An open workspace on one rank: a table of pointers to every rank's buffers."""

    def __init__(self, options: Options, rank: Rank, limits: Limits) -> None:
        self._options, self._rank, self._limits = options, rank, limits
        self._library = importlib.import_module(options.module)
        with quiet():
            made = self._library.trtllm_create_ipc_workspace_for_all_reduce_fusion(
                rank.index,
                rank.world_size,
                limits.max_tokens,
                limits.hidden,
                group=rank.group,
                create_metadata=True,
            )
        self._handles, self._table, self._metadata = made

    def run(self, inputs: RankInputs, *, op: Operation, strategy: Strategy) -> RankOutputs:
        """Run the kernel on the current stream.

        Raises:
            ValueError: an operand of a wrong shape, dtype or layout.
        """
        outputs = prepared(self._rank, self._limits, inputs, op, strategy)
        arguments = self._options.arguments(inputs, outputs, op, strategy)
        arguments |= {"pattern_code": self._options.pattern(op), "metadata": self._metadata}
        launch_legacy(self._library, self._rank, self._table, inputs, (op, outputs), arguments)
        return outputs

    def close(self) -> None:
        """Give the symmetric memory back."""
        torch.cuda.synchronize(self._rank.device)
        self._library.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(self._handles, group=self._rank.group)


class RenewableKernel(LegacyKernel):
    """The same, where the library can set its protocol back: releases from 0.6.18 on do, to restore a checkpoint."""

    def renew(self, limits: Limits) -> None:
        """Be as a workspace that was opened with these limits, which are no larger, is on the memory that there is."""
        size = 2 * self._rank.world_size * limits.max_tokens * limits.hidden
        self._metadata |= {
            "max_token_num": limits.max_tokens,
            "hidden_dim": limits.hidden,
            "buffer_size": size,
            "lamport_comm_size": size,
            "lamport_buffer_size": 3 * size,
        }
        self._limits = limits
        self._wait()  # what a peer called before may still write here
        self._library.cudart.cudaMemset(c_void_p(self._handles[0][self._rank.index]), 0, size)
        self._library._initialize_allreduce_fusion_protocol(
            ipc_handles=self._handles,
            tp_rank=self._rank.index,
            flag_size=self._metadata["flag_size"],
            lamport_buffer_size=3 * size,
            lamport_comm_size=size,
            use_fp32_lamport=False,
            control_flag_ptr=int(self._table[-1]),
        )
        self._wait()

    def _wait(self) -> None:
        """Until every rank's device has finished."""
        torch.cuda.synchronize(self._rank.device)
        torch.distributed.barrier(group=self._rank.group)
        torch.cuda.synchronize(self._rank.device)


def legacy_kernel(options: Options, rank: Rank, limits: Limits) -> LegacyKernel:
    """A workspace of the legacy functions, which can begin anew where the library has what that takes."""
    library = importlib.import_module(options.module)
    able = hasattr(library, "_initialize_allreduce_fusion_protocol") and hasattr(library, "cudart")
    return (RenewableKernel if able else LegacyKernel)(options, rank, limits)


class UnifiedKernel:
    """An open workspace object of the unified API, on one rank."""

    def __init__(self, options: Options, rank: Rank, limits: Limits) -> None:
        self._options, self._rank, self._limits = options, rank, limits
        self._library = importlib.import_module("flashinfer.comm")
        with quiet():
            self._workspace: Any = self._library.create_allreduce_fusion_workspace(
                backend="trtllm",
                world_size=rank.world_size,
                rank=rank.index,
                max_token_num=limits.max_tokens,
                hidden_dim=limits.hidden,
                dtype=limits.dtype,
                group=rank.group,
            )

    def run(self, inputs: RankInputs, *, op: Operation, strategy: Strategy) -> RankOutputs:
        """Run the kernel on the current stream.

        Raises:
            ValueError: an operand of a wrong shape, dtype or layout.
        """
        outputs = prepared(self._rank, self._limits, inputs, op, strategy)
        arguments = self._options.arguments(inputs, outputs, op, strategy)
        with quiet():
            if op.has_experts:
                launch_unified_experts(self._library, self._workspace, inputs, op, arguments)
                return outputs
            self._library.allreduce_fusion(
                input=inputs.partial,
                workspace=self._workspace,
                pattern=pattern_of(op),
                output=outputs.total,
                **arguments,
            )
        return outputs

    def close(self) -> None:
        """Give the symmetric memory back.

        `destroy` alone does not, in 0.6.13 and 0.7.2.post1: a table in the library still holds the buffers, and only
        the legacy function takes them out.
        """
        torch.cuda.synchronize(self._rank.device)
        handles = self._workspace.ipc_handles
        self._workspace.destroy()
        self._workspace = None
        importlib.import_module(LEGACY).trtllm_destroy_ipc_workspace_for_all_reduce_fusion(
            handles, group=self._rank.group
        )


class VirtualKernel:
    """The same kernel for one of several ranks that share a GPU and a process, a thread and a stream each.

    Every rank's buffers lie on one device and every rank has a pointer table of its own, which is all that the
    kernel knows of its peers. All ranks' blocks must be resident at once, or they wait for each other for ever.
    """

    def __init__(self, options: Options, rank: Rank, board: Any, limits: Limits) -> None:
        self._options, self._rank, self._limits, self._board = options, rank, limits, board
        self._library = importlib.import_module(options.module)
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

    def run(self, inputs: RankInputs, *, op: Operation, strategy: Strategy) -> RankOutputs:
        """Launch when all ranks are ready, so that nothing but the kernels themselves waits on the device."""
        outputs = prepared(self._rank, self._limits, inputs, op, strategy)
        arguments = self._options.arguments(inputs, outputs, op, strategy)
        stream = torch.cuda.current_stream(self._rank.device)
        stream.synchronize()
        self._board.wait()
        arguments |= {"pattern_code": self._options.pattern(op), "metadata": None}
        launch_legacy(self._library, self._rank, self._table, inputs, (op, outputs), arguments)
        stream.synchronize()
        self._board.wait()
        return outputs

    def close(self) -> None:
        """Drop the buffers once no rank uses them."""
        self._board.wait()
        self._buffers = ()  # type: ignore[assignment]


def prepared(rank: Rank, limits: Limits, inputs: RankInputs, op: Operation, strategy: Strategy) -> RankOutputs:
    """Outputs for a call whose operands the kernel reads rightly.

    Raises:
        ValueError: a wrong shape, dtype or layout, or a call that the kernel takes and computes wrongly.
    """
    check_layout(inputs)
    tokens, hidden = inputs.partial.shape
    if op.has_experts and strategy is Strategy.TWOSHOT:
        raise ValueError(f"{op.name} is one-shot alone, got TWOSHOT: give ONESHOT or AUTO")
    if op.has_experts or picks_oneshot(rank.world_size, tokens, hidden, strategy):
        reason = cleared_wrongly(rank.world_size, limits.max_tokens, limits.hidden)
        if reason is not None:
            raise ValueError(reason)
    return allocate(inputs, op)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the legacy functions' warning that they are deprecated; the unified API calls them, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def launch_legacy(
    library: Any,
    rank: Rank,
    table: Tensor,
    inputs: RankInputs,
    asked: tuple[Operation, RankOutputs],
    arguments: dict[str, Any],
) -> None:
    """Start the kernel on the current stream."""
    tokens, hidden = inputs.partial.shape
    op, outputs = asked
    with quiet():
        if op.has_experts:
            launch_legacy_experts(library, rank, table, inputs, op, arguments)
            return
        library.trtllm_allreduce_fusion(
            allreduce_in=inputs.partial,
            world_size=rank.world_size,
            world_rank=rank.index,
            token_num=tokens,
            hidden_dim=hidden,
            workspace_ptrs=table,
            allreduce_out=outputs.total,
            **arguments,
        )
