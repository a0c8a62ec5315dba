"""What the separate operators of a graph compute, each stage on its own.

Linear layers on E4M3 codes add up in float64: the products of codes are multiples of 2^-18 below 2^18, so that
any sum of fewer than 2^17 of them is exact, in any order. Equal inputs give equal bits on every machine.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
LANES = 8
"""Elements of one 16-byte access, which one thread adds up serially."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, bias: float = 0.0) -> Tensor:
    """RMSNorm over the last dimension in float32 with one rounding, to the dtype of x."""
    return (_normalised(x, eps) * (weight.float() + bias)).to(x.dtype)


def rms_norm_two_roundings(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm that rounds the normalised row before the weight, as Hugging Face's Llama does."""
    return (weight * _normalised(x, eps).to(x.dtype)).to(x.dtype)


def _normalised(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(_mean_square(wide) + eps)


def _mean_square(wide: Tensor) -> Tensor:
    """Mean of squares over the last dimension, [..., 1], in a fused kernel's order: 8 lanes serially, then halving.

    A declared order makes the separate graph bit for bit the one that the emulated kernel fuses.
    """
    squares = wide.square()
    hidden = wide.shape[-1]
    if hidden % LANES == 0 and hidden > 0:
        lanes = squares.reshape(*squares.shape[:-1], hidden // LANES, LANES)
        squares = sum((lanes[..., lane] for lane in range(1, LANES)), start=lanes[..., 0])
    while (width := squares.shape[-1]) > 1:
        half = width // 2
        folded = squares[..., :half] + squares[..., width - half :]
        squares = torch.cat([folded, squares[..., half : width - half]], dim=-1)
    return squares / hidden


def quantize(x: Tensor, scale: Tensor, *, divide: bool = False) -> Tensor:
    """E4M3 codes of x / scale in float32, saturating at +-448.

    Args:
        x: any shape, bf16, fp16 or float32.
        scale: dequantisation scale, one element, or one per element of the last dimension.
        divide: divide by the scale instead of multiplying by its reciprocal.
    """
    wide, step = x.float(), scale.float()
    scaled = wide / step if divide else wide * (1.0 / step)
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def linear_fp8(
    codes: Tensor, weight: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Linear layer on E4M3 codes: exact product, both scales, bias, one rounding to `dtype`.

    Args:
        codes: [..., in], float8_e4m3fn.
        weight: [out, in], float8_e4m3fn.
        bias: [out] or None, added after the scales.
        input_scale: one element, or one per input, float32.
        weight_scale: one element, float32.
        dtype: of the result, [..., out].
    """
    if input_scale.numel() == 1 and _has_scaled_mm(codes, weight):
        return _linear_scaled_mm(codes, weight, bias, input_scale, weight_scale, dtype)
    wide, step = codes.to(torch.float64), input_scale.to(torch.float64)
    if step.numel() > 1:
        wide, step = wide * step, torch.ones_like(step[0])
    scaled = (wide @ weight.to(torch.float64).T) * (step.reshape(()) * weight_scale.to(torch.float64).reshape(()))
    return (scaled if bias is None else scaled + bias.to(torch.float64)).to(dtype)


def _has_scaled_mm(codes: Tensor, weight: Tensor) -> bool:
    """Whether the device has an FP8 matrix product that takes these sizes."""
    if not codes.is_cuda or torch.cuda.get_device_capability(codes.device) < (8, 9):
        return False
    return weight.is_contiguous() and weight.dtype is codes.dtype and all(size % 16 == 0 for size in weight.shape)


def _linear_scaled_mm(
    codes: Tensor, weight: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same by the device's own FP8 matrix product, which wants 2-D operands."""
    flat = codes.reshape(-1, codes.shape[-1])
    scales = (input_scale.float().reshape(()), weight_scale.float().reshape(()))
    out = torch._scaled_mm(flat, weight.T, scale_a=scales[0], scale_b=scales[1], out_dtype=dtype)
    out = out.reshape(*codes.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias
