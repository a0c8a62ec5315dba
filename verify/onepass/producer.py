"""A producer that lets its dependents start early and writes late: what PDL allows an ordinary kernel to do."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def late_copy(source, target, count, nanoseconds, BLOCK: tl.constexpr):
    """Trigger the dependents at once, wait, then copy int16 or int32 words."""
    tl.extra.cuda.gdc_launch_dependents()
    began = tl.extra.cuda.globaltimer()
    now = began
    while now - began < nanoseconds:
        now = tl.extra.cuda.globaltimer()
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)
