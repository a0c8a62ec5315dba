"""The fused operators: one kernel of the active backend, or its steps one by one, as the strategy says."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fusecheck.graph import arithmetic
from fusecheck.graph.context import active
from fusecheck.graph.ops import FP8, NAMESPACE, SEPARATE_STRATEGIES, STRATEGIES, all_reduce, fake, implement, quantize
from fusecheck.interface import FusionOp, RankInputs, Strategy

__all__ = ["NAMESPACE", "resolve"]

_TOKEN_LIMIT = re.compile(r"(?P<name>\w+)<=(?P<tokens>\d+)")


def resolve(strategy: str, tokens: int) -> Strategy | None:
    """The kernel's strategy for this many tokens, or None where the steps run separately.

    `ONESHOT<=128` is resolved at each call: the kernel up to 128 tokens, separate steps above.

    Raises:
        RuntimeError: the strategy is unknown.
    """
    limited = _TOKEN_LIMIT.fullmatch(strategy)
    name = limited["name"] if limited else strategy
    if name not in STRATEGIES:
        raise RuntimeError(f"got strategy {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    if name in SEPARATE_STRATEGIES or (limited and tokens > int(limited["tokens"])):
        return None
    return Strategy(name)


def _run_fused(
    op: FusionOp, x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor, eps: float, strategy: str, bias: float
) -> dict[str, Tensor]:
    """Flatten to [tokens, hidden], run the kernel or the separate steps, and give the outputs x's shape."""
    flat = x.reshape(-1, x.shape[-1])
    chosen = resolve(strategy, flat.shape[0])
    if chosen is None:
        return _run_separately(op, x, residual, weight, scale, eps, strategy, bias)
    inputs = RankInputs(
        partial=flat.contiguous(),
        residual=residual.reshape(flat.shape).contiguous(),
        gamma=weight,
        scale=scale.reshape(1),
        eps=eps,
        weight_bias=bias,
    )
    outputs = active().fused(inputs, op, chosen)
    found = {"norm": outputs.norm, "quant": outputs.quant, "residual": outputs.residual}
    # A kernel may hand out its workspace or its operand; an operator's results are fresh tensors.
    return {name: tensor.reshape(x.shape).clone() for name, tensor in found.items() if tensor is not None}


def _run_separately(
    op: FusionOp, x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor, eps: float, strategy: str, bias: float
) -> dict[str, Tensor]:
    summed = all_reduce(x, strategy.split("<=")[0]) + residual
    norm = arithmetic.rms_norm(summed, weight, eps, bias=bias)
    found = {"norm": norm, "residual": summed}
    return found | {"quant": quantize(norm, scale)} if op.returns_quant else found


@implement("ar_residual_norm")
def _ar_residual_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, strategy: str, weight_bias: float = 0.0
) -> tuple[Tensor, Tensor]:
    unused = torch.ones(1, dtype=torch.float32, device=x.device)
    out = _run_fused(FusionOp.RESIDUAL_RMS_NORM, x, residual, weight, unused, eps, strategy, weight_bias)
    return out["norm"], out["residual"]


@implement("ar_residual_norm_quant_fp8")
def _ar_residual_norm_quant(
    x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor, eps: float, strategy: str, weight_bias: float = 0.0
) -> tuple[Tensor, Tensor]:
    op = FusionOp.RESIDUAL_RMS_NORM_QUANT_FP8
    out = _run_fused(op, x, residual, weight, scale, eps, strategy, weight_bias)
    return out["quant"], out["residual"]


@implement("ar_residual_norm_out_quant_fp8")
def _ar_residual_norm_out_quant(
    x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor, eps: float, strategy: str, weight_bias: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    op = FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8
    out = _run_fused(op, x, residual, weight, scale, eps, strategy, weight_bias)
    return out["norm"], out["quant"], out["residual"]


@fake("ar_residual_norm")
def _fake_ar_norm(x: Tensor, residual: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(residual)


@fake("ar_residual_norm_quant_fp8")
def _fake_ar_norm_quant(x: Tensor, residual: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=FP8), torch.empty_like(residual)


@fake("ar_residual_norm_out_quant_fp8")
def _fake_ar_norm_out_quant(x: Tensor, residual: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=FP8), torch.empty_like(residual)
