"""Single instructions of the chip, element by element: what the fused kernels' casts and roots compile to."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cast_e4m3(source, target, count, BLOCK: tl.constexpr):
    """`cvt.rn.satfinite.e4m3x2.f32`: int32 bits of float32 in, int16 out, the code in the low byte."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(source + at, mask=inside, other=0).to(tl.float32, bitcast=True)
    code = tl.inline_asm_elementwise(
        "cvt.rn.satfinite.e4m3x2.f32 $0, 0f00000000, $1;", "=h,f", [x], dtype=tl.int16, is_pure=True, pack=1
    )
    tl.store(target + at, code, mask=inside)


@triton.jit
def one_operand(source, target, count, ASM: tl.constexpr, BLOCK: tl.constexpr):
    """An instruction of one float32 operand."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(source + at, mask=inside, other=0.0)
    y = tl.inline_asm_elementwise(ASM, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(target + at, y, mask=inside)


@triton.jit
def two_operands(left, right, target, count, ASM: tl.constexpr, BLOCK: tl.constexpr):
    """An instruction of two float32 operands."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    a, b = tl.load(left + at, mask=inside, other=1.0), tl.load(right + at, mask=inside, other=1.0)
    y = tl.inline_asm_elementwise(ASM, "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(target + at, y, mask=inside)
