"""What stands in for sglang-kernel in tests: its ops on CPU tensors, by the schemas of 0.4.6.

The schemas are those that torch 2.11.0 reports of the wheel's library for sm_90 (read 2026-11-29). The arithmetic is
that of its machine code, in torch ops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fusecheck.dataflow import DATAFLOWS
from fusecheck.property_tests.suite.flashinfer_stand_in import normed
from fusecheck.property_tests.suite.vllm_stand_in import Vllm
from fusecheck.quantisers.known import quantiser

NORM = "(Tensor! input, Tensor! residual, Tensor weight, float eps, bool enable_pdl) -> ()"
SCHEMAS = {
    "sgl_kernel": (
        "meta_size() -> int",
        "init_custom_ar(int[] ipc_tensors, Tensor rank_data, int rank, bool full_nvlink) -> int",
        "register_buffer(int fa, int[] ipc_tensors) -> ()",
        "all_reduce(int fa, Tensor inp, Tensor! out, int reg_buffer, int reg_buffer_sz_bytes) -> ()",
        "dispose(int fa) -> ()",
        f"fused_add_rmsnorm{NORM}",
        f"gemma_fused_add_rmsnorm{NORM}",
        "sgl_per_token_quant_fp8(Tensor input, Tensor! output_q, Tensor! output_s) -> ()",
        "sgl_per_token_group_quant_8bit_v2(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, "
        "float eps, float fp8_min, float fp8_max, bool scale_ue8m0, bool fuse_silu_and_mul, Tensor? masked_m) -> ()",
    )
}
PACKED = "group-fp8-packed"
PER_448 = 1 / torch.tensor(448.0)


class Sglang(Vllm):
    """The ops of rank 0 of two."""

    schemas: ClassVar[Mapping[str, tuple[str, ...]]] = SCHEMAS

    def fused_add_rmsnorm(
        self, given: Tensor, residual: Tensor, weight: Tensor, eps: float, enable_pdl: bool, bias: float = 0.0
    ) -> None:
        assert enable_pdl
        stream = given.float() + residual.float()
        residual.copy_(stream)
        given.copy_(normed(stream, weight, eps, bias))

    def gemma_fused_add_rmsnorm(
        self, given: Tensor, residual: Tensor, weight: Tensor, eps: float, enable_pdl: bool
    ) -> None:
        self.fused_add_rmsnorm(given, residual, weight, eps, enable_pdl, 1.0)

    def sgl_per_token_quant_fp8(self, given: Tensor, output_q: Tensor, output_s: Tensor) -> None:
        assert output_s.is_contiguous()
        output_s.copy_(given.float().abs().amax(-1, keepdim=True) * PER_448)
        output_q.copy_((given.float() * (1 / output_s)).clamp(-448, 448))

    def sgl_per_token_group_quant_8bit_v2(
        self, given: Tensor, output_q: Tensor, output_s: Tensor, group_size: int, eps: float, fp8_min: float,
        fp8_max: float, scale_ue8m0: bool, fuse_silu_and_mul: bool, masked_m: Tensor | None,
    ) -> None:  # fmt: skip
        """By the conditions of the operator: the scales' strides say the layout, exponents are by columns only."""
        assert (eps, fp8_min, fp8_max, fuse_silu_and_mul, masked_m) == (1e-10, -448.0, 448.0, False, None)
        assert output_s.dim() == 2
        assert output_s.stride(0) < output_s.stride(1) or not scale_ue8m0
        groups = given.float().view(len(given), -1, group_size)
        amax = groups.abs().amax(-1).clamp(min=eps)
        scales, factors = amax * PER_448, 448 * (1 / amax)
        if scale_ue8m0:
            bits = scales.view(torch.int32)
            exponents = (bits >> 23) + (bits % 2**23 != 0)
            factors = torch.ldexp(torch.ones_like(scales), 127 - exponents)
            tokens, hidden = given.shape
            layout = quantiser(PACKED).layout(tokens, hidden, DATAFLOWS["sglang"].quant(PACKED), None)
            layout.write(exponents.to(torch.uint8), output_s)
        else:
            output_s.copy_(scales)
        output_q.copy_((groups * factors.unsqueeze(-1)).clamp(fp8_min, fp8_max).flatten(1))
