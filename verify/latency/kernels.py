"""Triton kernels of the unfused path: residual add with RMSNorm, and the quantiser, one kernel each."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_rms_norm(summed, residual, gamma, normed, stream, hidden, eps, BLOCK: tl.constexpr):
    """One row: stream = summed + residual, normed = its RMSNorm; all in the activations' dtype."""
    at = tl.program_id(0).to(tl.int64) * hidden + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < hidden
    total = tl.load(summed + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(stream + at, total.to(stream.dtype.element_ty), mask=inside)
    total = total.to(stream.dtype.element_ty).to(tl.float32)
    root = tl.rsqrt(tl.sum(total * total, axis=0) / hidden + eps)
    weight = tl.load(gamma + tl.arange(0, BLOCK), mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, (total * root * weight).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def quantise(normed, scale, codes, count, BLOCK: tl.constexpr):
    """Codes = E4M3(normed / scale), saturating."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    quotient = tl.load(normed + at, mask=inside, other=0.0).to(tl.float32) * (1.0 / tl.load(scale))
    clamped = tl.minimum(tl.maximum(quotient, -448.0), 448.0)
    tl.store(codes + at, clamped.to(tl.float8e4nv), mask=inside)
