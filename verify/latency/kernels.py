"""Triton kernels of the unfused path: residual add with RMSNorm, and the quantisers, one kernel each."""

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
def quantise_given(normed, scale, codes, count, BLOCK: tl.constexpr):
    """Codes = E4M3(normed / scale), saturating."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    store_codes(codes + at, tl.load(normed + at, mask=inside, other=0.0), 1.0 / tl.load(scale), inside)


@triton.jit
def quantise_rows(normed, scales, codes, hidden, BLOCK: tl.constexpr):
    """One row: its scale = max(amax, 1/512) / 448, and its codes."""
    row = tl.program_id(0).to(tl.int64)
    inside = tl.arange(0, BLOCK) < hidden
    at = row * hidden + tl.arange(0, BLOCK)
    values = tl.load(normed + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), axis=0), 1.0 / 512.0) / 448.0
    tl.store(scales + row, scale)
    store_codes(codes + at, values, 1.0 / scale, inside)


@triton.jit
def quantise_groups(
    normed, scales, codes, hidden, padded, GROUP: tl.constexpr, GROUPS: tl.constexpr, TILED: tl.constexpr
):
    """`GROUPS` groups of a row: each one's UE8M0 scale, the power of two at or above amax / 448, and the codes.

    The byte of a scale lies where `128x4` tiles have it (`TILED`; `padded`: columns), else packed (`padded`: rows).
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = column < hidden
    values = tl.load(normed + row * hidden + column, mask=inside, other=0.0).to(tl.float32)
    bits = (tl.max(tl.abs(values), axis=1) / 448.0).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    if TILED:
        place = (row // 128 * (padded // 4) + group // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4
    else:
        place = 4 * (group // 4 * padded + row) + group % 4
    tl.store(scales + place, exponent.to(tl.uint8), mask=group * GROUP < hidden)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    store_codes(codes + row * hidden + column, values, inverse[:, None], inside)


@triton.jit
def store_codes(to, values, inverse, inside):
    """E4M3 of values * inverse, saturating."""
    clamped = tl.minimum(tl.maximum(values.to(tl.float32) * inverse, -448.0), 448.0)
    tl.store(to, clamped.to(tl.float8e4nv), mask=inside)
