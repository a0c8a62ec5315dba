"""How a kernel quantises: the part of a declaration that says where scales come from, and codes from them.

Symbols: a = the largest magnitude of a group, L = the largest value of the element (448, 6), s = the scale, g = the
given scale of a tensor, fl = one rounding to float32. Slack is relative, with u = 2^-24.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

CodeOfNan = Literal["nan", "+max", "-max"]
Ties = Literal["even", "away", "toward_zero"]
Reads = Literal["rounded", "unrounded"]
ScaleRule = Literal["given", "divide", "approx", "multiply", "rcp", "log2"]
PowerOfTwo = Literal["no", "rceil", "ceil", "floor", "even"]
LeastAt = Literal["amax", "scale", "after"]
CodesFrom = Literal["scale", "amax"]
CodeRule = Literal["divide", "approx", "reciprocal", "rcp", "either"]
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
        scale_top: the largest exponent byte that is stored, 253 to 255: that of an infinite a.
        codes_from: the scale as stored, or a: y * fl(L / a). An approximate L / a is 0 where a is above 2^126: so PTX
            says of `div.approx`, and a subnormal reciprocal is flushed.
        code_rule: `divide` fl(y / s); `approx` y / s within 5u; `reciprocal` fl(y * fl(1 / s)); `rcp` the same with a
            reciprocal within one unit in the last place; `either` any of these. For NVFP4 by a factor that multiplies:
            g / s in place of 1 / s, and `rcp` is rcp(s * rcp(g)).
        exact_pow2: what is not correctly rounded is exact nevertheless where the divisor is a power of two
            (`fusecheck exhaust` checks it on a chip).
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
    exact_pow2: bool = False
    ties: Ties = "even"
    amax_nan: AmaxNan = "drop"
    code_of_nan: CodeOfNan = "nan"
    zero_group: ZeroGroup = "least"
    flush: bool = False
    saturate: bool = True
    row_padding: Padding = "untouched"
    column_padding: Padding = "untouched"


LEAST_OF_TOKEN = float.fromhex("0x1.24924ap-18")
"""fl(1 / (448 * 512)): no dynamic scale of a token is less, in vLLM and FlashInfer."""
LEAST_OF_GROUP = float.fromhex("0x1.b7cdfep-34")
"""fl(1e-10): the same for groups in vLLM, SGLang and FlashInfer's fused kernel."""
LEAST_AMAX = float.fromhex("0x1.a36e2ep-14")
"""fl(1e-4): the least amax of DeepGEMM's reference and of FlashInfer's fp8_block_quant."""


def _static() -> tuple[QuantFlow, ...]:
    given = partial(QuantFlow, given="scale", scale_rule="given")
    return (
        given("flashinfer", "FlashInfer patterns 2, 4", code_rule="rcp", exact_pow2=True, flush=True),
        given("trtllm", "TensorRT-LLM allReduceFusionKernels", code_rule="reciprocal"),
        given("trtllm-nccl", "TensorRT-LLM NCCL, then one of several kernels", code_rule="either", exact_pow2=True),
        given("vllm", "vLLM static_scaled_fp8_quant", code_rule="reciprocal", code_of_nan="+max"),
        given("torch", "torch ops", code_rule="divide"),
    )


def _dynamic() -> tuple[QuantFlow, ...]:
    floored = partial(QuantFlow, least=LEAST_OF_TOKEN)
    fast = partial(floored, scale_rule="approx", code_rule="approx", code_of_nan="-max", flush=True)
    return (
        fast("flashinfer", "FlashInfer patterns 10, 11; mnnvl one-shot"),
        fast("flashinfer-mnnvl-twoshot", "FlashInfer mnnvl, two-shot", reads="unrounded"),
        floored(
            "flashinfer-cutedsl",
            "FlashInfer mnnvl-cutedsl",
            reads="unrounded",
            code_rule="reciprocal",
            amax_nan="propagate",
        ),
        floored("vllm", "vLLM dynamic_per_token_scaled_fp8_quant", code_of_nan="+max"),
        QuantFlow("sglang", "SGLang per_token_quant_fp8, small batches", code_rule="reciprocal", code_of_nan="+max"),
        QuantFlow(
            "sglang-fast",
            "the same in the build of sglang-kernel 0.4.6 for sm_90 (machine code)",
            scale_rule="multiply",
            code_rule="rcp",
            exact_pow2=True,
            code_of_nan="+max",
            flush=True,
        ),
        QuantFlow("aiter", "AITER 1-stage", reads="unrounded", zero_group="one", amax_nan="order"),
        floored("torch", "torch ops", amax_nan="propagate"),
    )


def _group() -> tuple[QuantFlow, ...]:
    from_amax = partial(QuantFlow, least_at="amax", codes_from="amax")
    tiny = LEAST_OF_GROUP
    return (
        QuantFlow("vllm", "vLLM per_token_group_quant_8bit (CUDA)", least=tiny, least_at="amax", code_of_nan="-max"),
        QuantFlow("vllm-pow2", "the same with use_ue8m0", pow2="rceil", least=tiny, code_of_nan="-max"),
        QuantFlow("vllm-pow2-log2", "its Triton form", scale_rule="log2", pow2="rceil", least=tiny, code_of_nan="+max"),
        QuantFlow("vllm-block", "vLLM rms_norm_per_block_quant", least=LEAST_OF_TOKEN, code_of_nan="+max"),
        QuantFlow(
            "vllm-native",
            "vLLM QuantFP8.forward_native with use_ue8m0",
            pow2="rceil",
            least=LEAST_OF_TOKEN,
            least_at="after",
            amax_nan="propagate",
        ),
        from_amax("sglang", "SGLang per_token_group_quant v2", scale_rule="multiply", least=tiny, code_of_nan="-max"),
        from_amax(
            "sglang-fast",
            "the same in the build of sglang-kernel 0.4.6 for sm_90 (machine code): 448 * rcp(amax)",
            scale_rule="multiply",
            least=tiny,
            code_rule="approx",
            exact_pow2=True,
            code_of_nan="-max",
            flush=True,
        ),
        QuantFlow(
            "deepgemm",
            "DeepGEMM per_token_cast_to_fp8",
            least=LEAST_AMAX,
            least_at="amax",
            code_rule="reciprocal",
            amax_nan="propagate",
        ),
        from_amax(
            "flashinfer-block",
            "FlashInfer rmsnorm with fp8_block_quant",
            scale_rule="approx",
            least=LEAST_AMAX,
            code_rule="approx",
            code_of_nan="-max",
            flush=True,
        ),
        QuantFlow(
            "tokenspeed",
            "tokenspeed-kernel pattern 6 (27a74a33): div.full.f32, then 1.0 / scale in double and rounded once",
            scale_rule="approx",
            least=tiny,
            least_at="amax",
            code_rule="reciprocal",
            code_of_nan="+max",
            flush=True,
        ),
        QuantFlow("aiter", "AITER group quant", reads="unrounded", zero_group="one", amax_nan="order"),
    )


def _packed() -> tuple[QuantFlow, ...]:
    packed = partial(QuantFlow, pow2="rceil", least=LEAST_OF_GROUP, row_padding="zero", column_padding="zero")
    fast = partial(  # an H200's div.approx.ftz.f32 by a power of two is exact for every bf16
        packed, scale_rule="approx", code_rule="approx", exact_pow2=True, code_of_nan="-max", flush=True
    )
    return (
        fast("flashinfer", "FlashInfer patterns 8, 9, groups within a warp"),
        fast("flashinfer-shared", "the same, groups that meet in shared memory", amax_nan="bits"),
        packed("vllm", "vLLM per_token_group_quant_8bit_packed", code_of_nan="-max"),
        packed(
            "sglang",
            "SGLang per_token_group_quant v2 with scale_ue8m0",
            scale_rule="multiply",
            least_at="amax",
            code_rule="reciprocal",
            code_of_nan="-max",
            row_padding="untouched",
        ),
        packed(
            "deepgemm",
            "DeepGEMM per_token_cast_to_fp8 with use_ue8m0",
            least=LEAST_AMAX,
            least_at="amax",
            code_rule="reciprocal",
            amax_nan="propagate",
        ),
    )


def _mxfp8() -> tuple[QuantFlow, ...]:
    return (
        QuantFlow(
            "flashinfer",
            "FlashInfer patterns 13, 14",
            scale_rule="multiply",
            pow2="rceil",
            scale_top=254,
            code_rule="reciprocal",
            code_of_nan="+max",
            zero_group="byte0",
            flush=True,
            column_padding="zero",
        ),
        QuantFlow(
            "trtllm",
            "TensorRT-LLM's op 11 (10a94126): padded rows zeroed; a code whose scale is 2^-127 is not as declared",
            scale_rule="rcp",
            pow2="rceil",
            scale_top=254,
            code_rule="rcp",
            exact_pow2=True,
            zero_group="byte0",
            flush=True,
            row_padding="zero",
            column_padding="zero",
        ),
        QuantFlow("torchao", "torchao to_mx, FLOOR", pow2="floor", code_rule="reciprocal", amax_nan="propagate"),
        QuantFlow(
            "torchao-rceil",
            "its RCEIL",
            scale_rule="multiply",
            pow2="rceil",
            code_rule="reciprocal",
            amax_nan="propagate",
        ),
    )


def _nvfp4() -> tuple[QuantFlow, ...]:
    multiplies = partial(QuantFlow, given="multiplies", code_of_nan="+max", flush=True)
    return (
        multiplies("flashinfer", "FlashInfer patterns 3, 5", scale_rule="multiply", code_rule="approx"),
        multiplies("flashinfer-mnnvl", "FlashInfer's MoE and mnnvl kernels", scale_rule="rcp", code_rule="rcp"),
        multiplies("trtllm", "TensorRT-LLM, vLLM", scale_rule="rcp", code_rule="rcp"),
        QuantFlow("torchao", "torchao nvfp4_quantize", given="divides", least=2.0**-6, amax_nan="propagate"),
    )


def _mxfp4() -> tuple[QuantFlow, ...]:
    exact = partial(QuantFlow, code_rule="reciprocal", code_of_nan="+max")
    return (
        exact(
            "flashinfer",
            "FlashInfer mxfp4_quantize",
            scale_rule="multiply",
            pow2="rceil",
            scale_top=254,
            zero_group="byte0",
            flush=True,
        ),
        exact("aiter", "AITER fused", reads="unrounded", pow2="even", scale_top=253, ties="away", amax_nan="order"),
        exact("torchao", "torchao to_mx, FLOOR", pow2="floor", amax_nan="propagate"),
        exact("torchao-even", "its EVEN", pow2="even", amax_nan="propagate"),
    )


QUANT_FLOWS: dict[str, dict[str, QuantFlow]] = {
    quantiser: {flow.name: flow for flow in flows}
    for quantiser, flows in {
        "static-fp8": _static(),
        "dynamic-fp8": _dynamic(),
        "group-fp8": _group(),
        "group-fp8-packed": _packed(),
        "mxfp8": _mxfp8(),
        "nvfp4": _nvfp4(),
        "mxfp4": _mxfp4(),
    }.items()
}
"""The known arithmetic of each quantiser, by the implementation's name."""


def without_group(quantiser: str) -> str:
    """A quantiser's name without the size of its groups: `group-fp8` of `group-fp8-64`."""
    return quantiser if quantiser in QUANT_FLOWS else quantiser.rstrip("0123456789").removesuffix("-")


def known_flows(quantiser: str) -> dict[str, QuantFlow]:
    """The known arithmetic of a quantiser, whose name may end in the size of its groups; empty where there is none."""
    return QUANT_FLOWS.get(without_group(quantiser), {})
