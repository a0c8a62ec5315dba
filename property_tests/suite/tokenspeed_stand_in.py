"""What stands in for tokenspeed-kernel in tests without a GPU: its functions, by the signatures of 0.1.4."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fusecheck.property_tests.suite.flashinfer_stand_in import FlashInfer, codes, normed

MODULE = "tokenspeed_kernel.thirdparty.cuda.trtllm"


class TokenSpeed(FlashInfer):
    """Its functions for rank 0; what the other rank holds is in `other`. Workspaces are as FlashInfer's."""

    def modules(self) -> dict[str, ModuleType]:
        """What `import tokenspeed_kernel.thirdparty.cuda.trtllm` finds."""
        parts = MODULE.split(".")
        made = {name: ModuleType(name) for name in (".".join(parts[:count]) for count in range(1, len(parts) + 1))}
        vars(made[MODULE]).update(
            trtllm_create_ipc_workspace_for_all_reduce_fusion=self.create,
            trtllm_destroy_ipc_workspace_for_all_reduce_fusion=self.release,
            trtllm_allreduce_fusion=self.fuse_fork,
        )
        return made

    def fuse_fork(
        self, allreduce_in: Tensor, world_size: int, world_rank: int, token_num: int, hidden_dim: int,
        workspace_ptrs: Tensor, trigger_completion_at_end: bool, fp32_acc: bool, pattern_code: int,
        launch_with_pdl: bool | None = None, use_oneshot: bool | None = None, allreduce_out: Tensor | None = None,
        residual_in: Tensor | None = None, residual_out: Tensor | None = None, norm_out: Tensor | None = None,
        partial_norm_out: Tensor | None = None, quant_out: Tensor | None = None, scale_out: Tensor | None = None,
        rms_gamma: Tensor | None = None, rms_eps: float | None = None, scale_factor: Tensor | float | None = None,
        layout_code: int | None = None, metadata: dict[str, int] | None = None,
        residual_reduce_scattered: bool = False, max_sm_to_use: int | None = None, attnres_m: Tensor | None = None,
        attnres_s: Tensor | None = None, attnres_acc: Tensor | None = None, attnres_res_w: Tensor | None = None,
        attnres_out_norm_w: Tensor | None = None, latent_width: int | None = None,
    ) -> None:  # fmt: skip
        assert (world_size, world_rank) == (2, 0)
        told = {"pdl": launch_with_pdl, "end": trigger_completion_at_end, "fp32": fp32_acc, "oneshot": use_oneshot}
        self.calls.append({"pattern": pattern_code} | told)
        total = allreduce_in + self.other
        if pattern_code == 0:
            assert allreduce_out is not None
            allreduce_out.copy_(total)
            return
        assert residual_in is not None
        assert residual_out is not None
        assert rms_gamma is not None
        assert rms_eps is not None
        residual_out.copy_(total + residual_in)
        norm = normed(residual_out, rms_gamma, rms_eps, 0.0).to(total.dtype)
        if norm_out is not None:
            norm_out.copy_(norm)
        if pattern_code in (2, 4):
            assert quant_out is not None
            assert isinstance(scale_factor, Tensor)
            quant_out.copy_(codes(norm.float(), scale_factor).view(torch.uint8))
        if pattern_code == 6:
            self._by_groups(norm, quant_out, scale_out)

    def _by_groups(self, norm: Tensor, quant_out: Tensor | None, scale_out: Tensor | None) -> None:
        """By the conditions of the operator on the strides of the scales."""
        assert quant_out is not None
        assert scale_out is not None
        assert scale_out.stride(1) > scale_out.stride(0)
        assert scale_out.stride(1) % 4 == 0
        groups = norm.float().view(len(norm), -1, 128)
        scale_out.copy_(groups.abs().amax(-1).clamp(min=1e-10) / 448)
        quant_out.copy_((groups * (1.0 / scale_out).unsqueeze(-1)).clamp(-448, 448).flatten(1))
