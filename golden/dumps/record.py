"""Make dumps with FlashInfer's own logger around stand-ins of its functions; no GPU is needed to log.

    FLASHINFER_LOGLEVEL=10 FLASHINFER_DUMP_DIR=golden/dumps/flashinfer-0.7.4 python golden/dumps/record.py RANK

Run it once for each of two ranks, where the `flashinfer` of the release is importable. The stand-ins have the names and
the parameters of the functions (as of 0.7.4), and compute what the kernel computes with float32 sums.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from flashinfer.api_logging import flashinfer_api
from torch import Tensor

TOKENS, HIDDEN, RANKS = 2, 64, 2


@flashinfer_api  # type: ignore[untyped-decorator]
def create_allreduce_fusion_workspace(backend: str = "auto", world_size: int = 0, rank: int = 0, **more: Any) -> str:
    """Say which rank this is."""
    return f"a workspace for rank {rank} of {world_size} {backend} {sorted(more)}"


@flashinfer_api  # type: ignore[untyped-decorator]
def allreduce_fusion(
    input: Tensor,  # noqa: A002 - FlashInfer's own name
    workspace: Any,
    pattern: int,
    *,
    everyones: Any,
    residual_out: Tensor | None = None,
    norm_out: Tensor | None = None,
    quant_out: Tensor | None = None,
    residual_in: Tensor | None = None,
    rms_gamma: Tensor | None = None,
    rms_eps: float = 1e-6,
    scale_factor: Tensor | None = None,
    fp32_acc: bool = False,
) -> Tensor | None:
    """Compute pattern 1 or 2 of what all ranks hold."""
    del input, workspace, pattern, fp32_acc
    assert residual_in is not None
    assert rms_gamma is not None
    stream = everyones(None) + residual_in
    wide = stream.float()
    root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + rms_eps)
    norm = (wide * root * rms_gamma.float()).to(stream.dtype)
    if residual_out is not None:
        residual_out.copy_(stream)
    if quant_out is not None and scale_factor is not None:
        codes = (norm.float() * scale_factor.reciprocal()).clamp(-448, 448)
        return quant_out.copy_(codes.to(torch.float8_e4m3fn))
    return norm_out.copy_(norm) if norm_out is not None else None


def main(rank: int) -> None:
    """Log a workspace and two calls of one rank."""
    workspace = create_allreduce_fusion_workspace(backend="trtllm", world_size=RANKS, rank=rank, max_token_num=TOKENS)
    for call, pattern in enumerate((1, 2)):
        shared = torch.Generator().manual_seed(call)
        partials = [torch.randn(TOKENS, HIDDEN, generator=shared).bfloat16() for _ in range(RANKS)]
        residual = torch.randn(TOKENS, HIDDEN, generator=shared).bfloat16()
        total = (partials[0].float() + partials[1].float()).bfloat16()
        outputs = {"norm_out": torch.empty_like(residual)}
        if pattern == 2:
            outputs = {"quant_out": torch.empty(TOKENS, HIDDEN, dtype=torch.float8_e4m3fn)}
        allreduce_fusion(
            partials[rank],
            workspace,
            pattern,
            everyones=lambda _, total=total: total,
            residual_out=torch.empty_like(residual),
            residual_in=residual,
            rms_gamma=torch.rand(HIDDEN, generator=shared).bfloat16(),
            scale_factor=torch.tensor([0.02]) if pattern == 2 else None,
            fp32_acc=True,
            **outputs,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]))
