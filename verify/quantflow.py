"""How a kernel quantises: the part of a declaration that says where scales come from, and codes from them.

Symbols: a = the largest magnitude of a group, L = the largest value of the element (448, 6), s = the scale, g = the
given scale of a tensor, fl = one rounding to float32. Slack is relative, with u = 2^-24.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

CodeOfNan = Literal["nan", "+max", "-max"]
Ties = Literal["even", "away", "toward_zero"]
Reads = Literal["rounded", "unrounded"]
ScaleRule = Literal["given", "divide", "approx", "multiply", "rcp", "log2"]
PowerOfTwo = Literal["no", "rceil", "ceil", "floor", "even"]
LeastAt = Literal["amax", "scale", "after"]
CodesFrom = Literal["scale", "amax"]
CodeRule = Literal["divide", "approx", "reciprocal", "rcp", "either", "exact_pow2"]
AmaxNan = Literal["drop", "propagate", "bits", "order"]
ZeroGroup = Literal["least", "one", "byte0"]
Given = Literal["scale", "multiplies", "divides", "none"]
Padding = Literal["zero", "untouched"]


@dataclass(frozen=True)
class QuantFlow:
    """The declared arithmetic of a quantiser; constant over a run.

    Attributes:
        name: how reports call it.
        source: the implementation that computes like this.
        reads: the norm rounded to the activations' dtype, or before that rounding.
        given: what the caller's scale is: the scale itself; NVFP4's factor of a tensor that multiplies (FlashInfer,
            TensorRT-LLM) or divides (torchao); or nothing.
        scale_rule: `given`; `divide` fl(a / L); `multiply` fl(a * fl(1 / L)); `approx` a / L within 5u; `rcp` a times
            a reciprocal of L within one unit in the last place; `log2` as `divide`, its power of two by a logarithm.
        pow2: how the scale becomes a power of two, by torchao's names: `rceil` the least one not below the quotient
            (FlashInfer, vLLM, DeepGEMM); `ceil`, `floor`, `even` from the exponent of a alone, less that of L; `even`
            first rounds a to the element's significand.
        least: the least scale (or least a); 0: none.
        least_at: it bounds a before the quotient, the scale before its power of two, or the scale after that.
        scale_top: the largest exponent byte that is stored, 254 or 255.
        codes_from: the scale as stored, or a: y * fl(L / a).
        code_rule: `divide` fl(y / s); `approx` y / s within 5u; `reciprocal` fl(y * fl(1 / s)); `rcp` the same with a
            reciprocal within one unit in the last place; `either` any of these; `exact_pow2` y * 2^-e. For NVFP4 by a
            factor that multiplies: g / s in place of 1 / s, and `rcp` is rcp(s * rcp(g)).
        ties: of the cast.
        amax_nan: a NaN is dropped from a; it is propagated; its bits win, so that the least scale remains; or what
            happens depends on the order of comparisons.
        code_of_nan: what a NaN becomes in the cast.
        zero_group: a group of zeros has the least scale, or 1; or its exponent byte is 0 and, like the topmost
            byte, makes every code of the group zero.
        flush: float32 subnormal operands and results become zero (`-use_fast_math`).
        saturate: the cast clamps to the largest value; else what rounds beyond it becomes NaN.
        row_padding: rows of scales beyond the last token.
        column_padding: scales beyond the last group of a token.
    """

    name: str = ""
    source: str = field(compare=False, default="")
    reads: Reads = "rounded"
    given: Given = "none"
    scale_rule: ScaleRule = "divide"
    pow2: PowerOfTwo = "no"
    least: float = 0.0
    least_at: LeastAt = "scale"
    scale_top: int = 255
    codes_from: CodesFrom = "scale"
    code_rule: CodeRule = "divide"
    ties: Ties = "even"
    amax_nan: AmaxNan = "drop"
    code_of_nan: CodeOfNan = "nan"
    zero_group: ZeroGroup = "least"
    flush: bool = False
    saturate: bool = True
    row_padding: Padding = "untouched"
    column_padding: Padding = "untouched"
