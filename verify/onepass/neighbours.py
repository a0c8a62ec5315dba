"""The kernels before and behind the one under test, with what programmatic dependent launch (PDL) allows them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def late_copy(source, target, count, nanoseconds, BLOCK: tl.constexpr):
    """A producer: lets its dependents start at once, waits, then copies int16 or int32 words."""
    tl.extra.cuda.gdc_launch_dependents()
    began = tl.extra.cuda.globaltimer()
    now = began
    while now - began < nanoseconds:
        now = tl.extra.cuda.globaltimer()
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)


@triton.jit
def waiting_copy(source, target, count, BLOCK: tl.constexpr):
    """A consumer: may start before the kernels before it have ended, waits for them as PDL demands, then copies words.

    Launch it with `launch_pdl=True`.
    """
    tl.extra.cuda.gdc_wait()
    for start in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)
