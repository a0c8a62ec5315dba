"""The nominal outputs: one conforming evaluation of a dataflow, in native and float32 torch ops.

It rounds where the declaration says and nowhere else, sums squares in float64 and rounds once, and takes the
reciprocal root in float64. So it is itself a legal kernel, and by the theorem of `enclosure` its values lie
inside their enclosures: whatever equals the nominal needs no further look.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fusecheck.dataflow import Dataflow

LEAST_NORMAL = 2.0**-126
_SAFE_EXPONENT = 17 << 7
"""bf16 bits of 2^-110: sums of larger magnitudes are never float32-subnormal."""


def may_flush(tensors: list[Tensor]) -> bool:
    """Whether a float32 sum of these bf16 tensors could meet a subnormal; zeros count as a yes."""
    if tensors[0].dtype is not torch.bfloat16:
        return False  # every fp16 value, and every sum of two, is normal in float32
    return any(int((x.view(torch.int16) & 0x7FFF).amin()) < _SAFE_EXPONENT for x in tensors)


def flush(x: Tensor) -> Tensor:
    """Float32 subnormals become zero of the same sign."""
    return torch.where(x.abs() < LEAST_NORMAL, x * 0.0, x)


def add_residual(total: Tensor, residual: Tensor, flow: Dataflow, *, flushing: bool) -> Tensor:
    """What the norm reads, [rows, hidden]: native when it reads the rounded stream, else float32."""
    if flow.norm_reads_rounded and total.dtype == residual.dtype and not flushing:
        return total + residual
    wide, addend = total.to(torch.float32), residual.to(torch.float32)
    stream = flush(flush(wide) + flush(addend)) if flushing else wide + addend
    return stream.to(residual.dtype) if flow.norm_reads_rounded else stream


def inverse_root(stream: Tensor, eps: float, flow: Dataflow, native: torch.dtype) -> Tensor:
    """rsqrt(mean(stream^2) + eps) per row, [rows, 1], float32."""
    if flow.scaled_squares:  # in float64 no square of a float32 overflows or underflows
        mean = stream.to(torch.float64).square().mean(-1, keepdim=True) + float(np.float32(eps))
        return mean.rsqrt().to(torch.float32)
    wide = stream.to(torch.float32)
    squares = (wide * wide).to(native) if flow.round_squares else wide * wide
    total = squares.sum(-1, keepdim=True, dtype=torch.float64).to(torch.float32)
    mean = total / stream.shape[-1] + torch.tensor(eps, dtype=torch.float32)
    return mean.to(torch.float64).rsqrt().to(torch.float32)


def weight(gamma: Tensor, bias: float) -> Tensor:
    """Gamma + weight_bias in float32, [hidden]."""
    return gamma.to(torch.float32) + bias if bias else gamma.to(torch.float32)


def normalise(stream: Tensor, root: Tensor, factor: Tensor, flow: Dataflow, native: torch.dtype) -> Tensor:
    """The normalised activations before the last rounding, [rows, hidden], float32."""
    normed = stream.to(torch.float32) * root
    if flow.round_normed:
        normed = normed.to(native).to(torch.float32)
    return normed.mul_(factor)


def reciprocal(scale: float, flow: Dataflow) -> float:
    """The float32 reciprocal of a float32 scale, flushed where the dataflow flushes."""
    with np.errstate(divide="ignore", over="ignore"):
        operand = np.float32(scale)
        if flow.flush_subnormals and 0 < abs(operand) < LEAST_NORMAL:
            operand = operand * np.float32(0)
        inverse = np.float32(1) / operand
    if flow.flush_subnormals and abs(inverse) < LEAST_NORMAL:
        inverse = inverse * np.float32(0)
    return float(inverse)


def look_up(table: Tensor, native: Tensor) -> Tensor:
    """table[bits of native], any shape."""
    bits = native.view(torch.int16)
    if bits.device.type == "cpu":  # numpy gathers from a small table several times faster than torch
        return torch.from_numpy(table.numpy().take(bits.numpy().view(np.uint16)))
    return table[bits.to(torch.int32) & 0xFFFF]
