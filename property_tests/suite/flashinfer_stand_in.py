"""What stands in for FlashInfer in tests without a GPU: its functions, by the signatures of 0.6.13 and 0.7.2.post1.

What experts take is by 0.6.13; later releases, up to 0.7.4, add a keyword `backend` with a default, and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import Self

from fusecheck.backends import flashinfer_norm
from fusecheck.dataflow import DATAFLOWS
from fusecheck.quantisers.known import quantiser


def codes(y: Tensor, scale: Tensor) -> Tensor:
    return (y * (1.0 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn)


def memory(given: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """The first elements at a pointer, as a kernel reads them that is told neither dtype nor shape nor strides."""
    nbytes = count * dtype.itemsize
    held = torch.empty(0, dtype=torch.uint8).set_(given.untyped_storage())
    start = given.storage_offset() * given.itemsize
    return held[start : start + nbytes].view(dtype)


def normed(stream: Tensor, gamma: Tensor, eps: float, bias: float) -> Tensor:
    wide = stream.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (gamma.float() + bias)


class FlashInfer:
    """FlashInfer's functions by their published signatures, for rank 0; what the other rank holds is in `other`."""

    def __init__(self) -> None:
        self.other = torch.empty(0)
        self.calls: list[dict[str, Any]] = []
        self.held: dict[int, Tensor] = {}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Be what the adapters import, without a GPU."""
        for name, module in self.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setenv(flashinfer_norm.USE_CUDA, "0")

    def lent(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Self]:
        """Stand in for one test, which must give every workspace back."""
        self.install(monkeypatch)
        yield self
        assert self.held == {}

    def modules(self) -> dict[str, ModuleType]:
        """What `import flashinfer.comm`, `.comm.trtllm_ar` and `.norm` find."""
        made = {name: ModuleType(name) for name in ("flashinfer", "flashinfer.comm", "flashinfer.norm")}
        made["flashinfer.comm.trtllm_ar"] = legacy = ModuleType("flashinfer.comm.trtllm_ar")
        vars(legacy).update(
            trtllm_create_ipc_workspace_for_all_reduce_fusion=self.create,
            trtllm_destroy_ipc_workspace_for_all_reduce_fusion=self.release,
            trtllm_allreduce_fusion=self.fuse,
            trtllm_moe_allreduce_fusion=self.reduce_experts,
            trtllm_moe_finalize_allreduce_fusion=self.finalize_experts,
        )
        vars(made["flashinfer.comm"]).update(
            create_allreduce_fusion_workspace=self.create_unified, allreduce_fusion=self.fuse_unified
        )
        vars(made["flashinfer.norm"]).update(
            _USE_CUDA_NORM=True,
            fused_add_rmsnorm=self.add_norm,
            gemma_fused_add_rmsnorm=self.add_norm_gemma,
            fused_add_rmsnorm_quant=self.add_norm_quant,
        )
        return made

    def create(
        self, tp_rank: int, tp_size: int, max_token_num: int, hidden_dim: int, use_fp32_lamport: bool = False,
        group: object = None, create_metadata: bool = False, comm_backend: object = None,
        use_symm_dev_mem: bool = False,
    ) -> tuple[list[list[int]], Tensor, dict[str, int]]:  # fmt: skip
        assert create_metadata
        assert (tp_rank, tp_size, use_fp32_lamport, comm_backend, use_symm_dev_mem) == (0, 2, False, None, False)
        handles: list[list[int]] = [[]]
        self.held[id(handles)] = torch.zeros(1)
        return handles, torch.zeros(7, dtype=torch.int64), {"room": max_token_num * hidden_dim}

    def release(self, workspace: list[list[int]], group: object = None) -> None:
        del self.held[id(workspace)]

    def fuse(
        self, allreduce_in: Tensor, world_size: int, world_rank: int, token_num: int, hidden_dim: int,
        workspace_ptrs: Tensor, launch_with_pdl: bool, trigger_completion_at_end: bool, fp32_acc: bool,
        pattern_code: int, use_oneshot: bool | None, allreduce_out: Tensor | None, residual_in: Tensor,
        residual_out: Tensor, norm_out: Tensor | None, quant_out: Tensor | None, scale_out: Tensor | None,
        rms_gamma: Tensor, rms_eps: float, scale_factor: Tensor | None, layout_code: int | None,
        metadata: dict[str, int] | None = None, block_quant_group_size: int | None = None, weight_bias: float = 0.0,
    ) -> None:  # fmt: skip
        assert (world_size, world_rank) == (2, 0)
        assert metadata is not None
        assert token_num * hidden_dim <= metadata["room"]
        told = {"pdl": launch_with_pdl, "end": trigger_completion_at_end, "fp32": fp32_acc, "oneshot": use_oneshot}
        self.calls.append({"pattern": pattern_code} | told)
        shape = (token_num, hidden_dim)
        stream = (allreduce_in.view(shape) + self.other) + residual_in.view(shape)
        norm = normed(stream, rms_gamma, rms_eps, weight_bias).to(stream.dtype)
        residual_out.view(shape).copy_(stream)
        if pattern_code in (1, 4, 9, 11, 14):
            assert norm_out is not None
            norm_out.view(shape).copy_(norm)
        if pattern_code in (8, 9, 10, 11, 13, 14):
            self._quantise(pattern_code, norm, quant_out, scale_out, layout_code, block_quant_group_size)
        if pattern_code in (2, 4):
            assert quant_out is not None
            assert scale_factor is not None
            quant_out.view(shape).copy_(codes(norm.float(), scale_factor).view(torch.uint8))

    def reduce_experts(
        self, world_size: int, world_rank: int, token_num: int, hidden_dim: int, workspace_ptrs: Tensor,
        launch_with_pdl: bool, residual_in: Tensor, rms_gamma: Tensor, rms_eps: float, scale_factor: float,
        moe_reduction_device_num_experts: int, moe_reduction_scale_input: Tensor,
        moe_reduction_active_experts_token_input: Tensor, moe_reduction_token_input: Tensor, layout_code: int | None,
        moe_allreduce_out: Tensor | None, residual_out: Tensor | None, norm_out: Tensor | None,
        quant_out: Tensor | None, scale_out: Tensor | None, weight_bias: float | None = None,
    ) -> None:  # fmt: skip
        count, shape = int(moe_reduction_device_num_experts), (token_num, hidden_dim)
        assert isinstance(scale_factor, float)
        given = moe_reduction_active_experts_token_input
        weights = memory(moe_reduction_scale_input, torch.float32, count * token_num).view(count, token_num, 1)
        tokens = memory(given, given.dtype, count * token_num * hidden_dim).view(count, *shape)
        total = torch.zeros(shape, dtype=given.dtype)
        for weight, each in zip(weights, tokens, strict=True):
            total = total + (each.float() * weight).to(given.dtype)
        total = total + memory(moe_reduction_token_input, given.dtype, total.numel()).view(shape)
        self.calls.append({"pattern": 6, "pdl": launch_with_pdl})
        self._finish_experts(total, residual_in, rms_gamma, rms_eps, weight_bias, residual_out, norm_out)

    def finalize_experts(
        self, allreduce_in: Tensor, residual_in: Tensor, norm_weight: Tensor, expanded_idx_to_permuted_idx: Tensor,
        norm_out: Tensor | None, residual_out: Tensor | None, quant_out: Tensor | None, scale_out: Tensor | None,
        workspace_ptrs: Tensor, launch_with_pdl: bool, world_rank: int, world_size: int, eps: float,
        shared_expert_output: Tensor | None, expert_scale_factor: Tensor | None, routed_scaling_factor: float | None,
        weight_bias: float | None = None,
    ) -> None:  # fmt: skip
        native, (count, routes) = residual_in.dtype, expanded_idx_to_permuted_idx.shape
        if expanded_idx_to_permuted_idx.dtype is not torch.int32:
            raise RuntimeError("expanded_idx_to_permuted_idx must be int32")
        assert expert_scale_factor is not None
        weights = memory(expert_scale_factor, native, count * routes).view(count, routes, 1)
        total = torch.zeros_like(residual_in)
        for token, route in torch.cartesian_prod(torch.arange(count), torch.arange(routes)).tolist():
            row = int(expanded_idx_to_permuted_idx[token, route])
            if row != -1:
                total[token] += (allreduce_in[row].float() * weights[token, route].float()).to(native)
        total = (total.float() * (1.0 if routed_scaling_factor is None else routed_scaling_factor)).to(native)
        total = total if shared_expert_output is None else total + shared_expert_output
        self.calls.append({"pattern": 7, "pdl": launch_with_pdl, "routed": routed_scaling_factor})
        self._finish_experts(total, residual_in, norm_weight, eps, weight_bias, residual_out, norm_out)

    def _finish_experts(
        self, total: Tensor, residual: Tensor, gamma: Tensor, eps: float, bias: float | None,
        residual_out: Tensor | None, norm_out: Tensor | None,
    ) -> None:  # fmt: skip
        assert residual_out is not None
        assert norm_out is not None, "a norm that is not asked for is written to address 0"
        stream = (total + self.other) + residual
        residual_out.copy_(stream)
        norm_out.copy_(normed(stream, gamma, eps, bias or 0.0))

    def _quantise(
        self, pattern: int, norm: Tensor, quant_out: Tensor | None, scale_out: Tensor | None, layout: int | None,
        group: int | None,
    ) -> None:  # fmt: skip
        """Codes and scales by the unified API's own conditions on dtypes, shapes and strides."""
        assert quant_out is not None
        assert scale_out is not None
        assert quant_out.dtype is torch.float8_e4m3fn
        tokens, hidden = norm.shape
        form = (tuple(scale_out.shape), scale_out.stride(), scale_out.dtype)
        if pattern in (8, 9):
            assert group is not None
            assert form == ((tokens, -(-hidden // group // 4)), (1, -(-tokens // 4) * 4), torch.int32)
            name = f"group-fp8-packed-{group}" if group != 128 else "group-fp8-packed"
        elif pattern in (10, 11):
            assert form == ((tokens, 1), (1, 1), torch.float32)
            name = "dynamic-fp8"
        else:
            name = "mxfp8"
            assert scale_out.dtype is torch.uint8
            assert scale_out.is_contiguous()
            assert layout in (None, 0, 2)
        made, rules = quantiser(name), DATAFLOWS["flashinfer"].quant(name)
        scales = made.scales(norm, rules)
        made.layout(tokens, hidden, rules, "linear" if layout == 2 else None).write(scales, scale_out)
        quant_out.view(torch.uint8).copy_(made.codes(norm, scales, rules))

    def create_unified(
        self, backend: str = "auto", world_size: int | None = None, rank: int | None = None,
        max_token_num: int = 0, hidden_dim: int = 0, dtype: torch.dtype | None = None, gpus_per_node: int | None = None,
        comm_backend: object = None, force_oneshot_support: bool = False, group: object = None,
    ) -> SimpleNamespace:  # fmt: skip
        assert (backend, dtype) == ("trtllm", torch.bfloat16)
        handles, table, metadata = self.create(
            rank or 0, world_size or 0, max_token_num, hidden_dim, create_metadata=True
        )
        return SimpleNamespace(ipc_handles=handles, table=table, metadata=metadata, destroy=lambda: None)

    def fuse_unified(
        self, input: Tensor, workspace: SimpleNamespace, pattern: int, launch_with_pdl: bool = False,  # noqa: A002
        trigger_completion_at_end: bool = True, output: Tensor | None = None, residual_out: Tensor | None = None,
        norm_out: Tensor | None = None, quant_out: Tensor | None = None, scale_out: Tensor | None = None,
        residual_in: Tensor | None = None, rms_gamma: Tensor | None = None, rms_eps: float = 1e-6,
        scale_factor: Tensor | None = None, layout_code: int | None = None, use_oneshot: bool | None = None,
        fp32_acc: bool = False, moe_reduction_device_num_experts: int | None = None,
        moe_reduction_scale_input: Tensor | None = None,
        moe_reduction_active_experts_token_input: Tensor | None = None,
        moe_reduction_token_input: Tensor | None = None, expanded_idx_to_permuted_idx: Tensor | None = None,
        expert_scale_factor: Tensor | None = None, shared_expert_output: Tensor | None = None,
        block_quant_group_size: int | None = None, weight_bias: float = 0.0,
    ) -> Tensor | None:  # fmt: skip
        assert residual_in is not None
        assert residual_out is not None
        assert rms_gamma is not None
        if pattern == 7:
            assert expanded_idx_to_permuted_idx is not None
            self.finalize_experts(
                input, residual_in, rms_gamma, expanded_idx_to_permuted_idx, norm_out, residual_out, quant_out,
                scale_out, workspace.table, launch_with_pdl, 0, 2, rms_eps, shared_expert_output, expert_scale_factor,
                None, weight_bias,
            )  # fmt: skip
            return norm_out
        if pattern == 6:
            assert moe_reduction_device_num_experts is not None
            assert moe_reduction_scale_input is not None
            assert moe_reduction_active_experts_token_input is not None
            assert moe_reduction_token_input is not None
            self.reduce_experts(
                2, 0, len(residual_in), residual_in.shape[1], workspace.table, launch_with_pdl, residual_in, rms_gamma,
                rms_eps, 1.0,
                moe_reduction_device_num_experts, moe_reduction_scale_input, moe_reduction_active_experts_token_input,
                moe_reduction_token_input, layout_code, output, residual_out, norm_out, quant_out, scale_out,
                weight_bias,
            )  # fmt: skip
            return norm_out
        tokens, hidden = input.shape
        self.fuse(
            input, 2, 0, tokens, hidden, workspace.table, launch_with_pdl, trigger_completion_at_end, fp32_acc, pattern,
            use_oneshot, output, residual_in, residual_out, norm_out, quant_out, scale_out, rms_gamma, rms_eps,
            scale_factor, layout_code, workspace.metadata, block_quant_group_size, weight_bias,
        )  # fmt: skip
        return norm_out if norm_out is not None else quant_out

    def add_norm(
        self, input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, enable_pdl: bool | None = None,  # noqa: A002
    ) -> None:  # fmt: skip
        self._in_place(input, residual, weight, eps, 0.0)

    def add_norm_gemma(
        self, input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, enable_pdl: bool | None = None,  # noqa: A002
    ) -> None:  # fmt: skip
        self._in_place(input, residual, weight, eps, 1.0)

    def _in_place(self, given: Tensor, residual: Tensor, weight: Tensor, eps: float, bias: float) -> None:
        stream = given.float() + residual.float()
        residual.copy_(stream)
        given.copy_(normed(stream, weight, eps, bias))

    def add_norm_quant(
        self, out: Tensor, input: Tensor, residual: Tensor, weight: Tensor, scale: Tensor, eps: float = 1e-6,  # noqa: A002
        enable_pdl: bool | None = None,
    ) -> None:  # fmt: skip
        stream = input.float() + residual.float()
        residual.copy_(stream)
        out.copy_(codes(normed(stream, weight, eps, 0.0), scale))
