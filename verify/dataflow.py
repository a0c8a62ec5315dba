"""The known kernels' declarations, by name: what each implementation computes, with its source."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from fusecheck.declaration import ALONE, Dataflow, ExpertFlow
from fusecheck.errors import UsageError
from fusecheck.operations import GIVEN_SCALE
from fusecheck.quantflow import QUANT_FLOWS

__all__ = ["ALONE", "DATAFLOWS", "Dataflow", "ExpertFlow", "dataflow"]

NORM_DEPTH = 65
"""In FlashInfer's norm kernels, a block a row: 8 squares a thread in each of 7 rounds at most, 5 + 5 warp shuffles."""


FAST = partial(
    Dataflow,
    mean_rule="approx",
    exact_reciprocal=False,
    exact_pow2=True,
    flush_subnormals=True,
    experts=ExpertFlow(flush=True),
)
"""What `-use_fast_math` makes of FlashInfer's kernels."""
SEPARATE = partial(Dataflow, depth=None, scaling="divide")
"""Torch ops behind an all-reduce of their own, each result rounded."""


def _trtllm() -> tuple[Dataflow, ...]:
    return (
        Dataflow(
            "trtllm",
            "TensorRT-LLM allReduceFusionKernels, sums in the native dtype: the default until July 2026 (PR 16753), "
            "since then with ALL_REDUCE_FUSION_KERNEL_ACC_FP32=0",
        ),
        Dataflow(
            "trtllm-fp32",
            "the same, sums in float32: the default since July 2026 (PR 16753), "
            "before that with ALL_REDUCE_FUSION_KERNEL_ACC_FP32 set",
            accumulate="fp32",
        ),
        Dataflow(
            "trtllm-nccl",
            "TensorRT-LLM NCCL, in the switch or not, + fallbackRunSubsequentOps",
            sum_rounding="either",
            order="any",
            scaling="either",
            exact_pow2=True,
        ),
        Dataflow(
            "trtllm-ub",
            "TensorRT-LLM user buffers: in-switch sums (multimem) as of `multimem-bf16`, their last rounding unread",
            sum_rounding="either",
            order="any",
            round_norm=False,
        ),
        Dataflow(
            "trtllm-mnnvl",
            "TensorRT-LLM mnnvl_fusion_allreduce as read at 13c61bf6, before its FP8 (PR 14476): native squares",
            accumulate="fp32",
            round_squares=True,
        ),
    )


def _flashinfer() -> tuple[Dataflow, ...]:
    norms = partial(FAST, order="any", norm_reads_rounded=False, depth=NORM_DEPTH, sum_flushes=False)
    cute = partial(Dataflow, accumulate="fp32", order="any", depth=None)
    return (
        FAST("flashinfer", "FlashInfer trtllm_allreduce_fusion, fp32_acc=False"),
        FAST("flashinfer-fp32", "the same with fp32_acc=True (vLLM, SGLang)", accumulate="fp32"),
        FAST(
            "flashinfer-mnnvl-oneshot",
            "FlashInfer mnnvl, one-shot, before 0.7.4: squares in the native dtype",
            accumulate="fp32",
            round_squares=True,
        ),
        FAST(
            "flashinfer-mnnvl-twoshot",
            "FlashInfer mnnvl, two-shot up to 16 ranks, and one-shot from 0.7.4 on up to 8",
            accumulate="fp32",
        ),
        FAST(
            "flashinfer-mnnvl-chunked",
            "the same with more ranks, in chunks: one-shot from 0.7.4 on above 8, two-shot above 16",
            accumulate="fp32",
            order="any",
        ),
        cute("flashinfer-cutedsl", "FlashInfer mnnvl-cutedsl (0.7.4), Blackwell"),
        cute(
            "flashinfer-cake-fp4",
            "FlashInfer cake_fp4_allreduce (0.7.4), Blackwell: statistics of the float32 stream, which the norm reads "
            "rounded; how it forms scales was not read",
            round_sum=False,
            statistics="unrounded",
        ),
        norms(
            "flashinfer-norm-quant",
            "all-reduce, then FlashInfer fused_add_rmsnorm_quant (its CUDA kernels)",
            round_norm=False,
            code_of_nan="+max",
        ),
        norms("flashinfer-norm-block", "all-reduce, then FlashInfer's norm with fp8_block_quant (0.7.4)"),
    )


def _engines() -> tuple[Dataflow, ...]:
    vllm = partial(Dataflow, accumulate="fp32", depth=None)
    return (
        vllm(
            "vllm-native",
            "vLLM custom all-reduce, native RMSNorm, static quantise",
            norm_reads_rounded=False,
            round_normed=True,
        ),
        vllm(
            "vllm-c",
            "vLLM custom all-reduce, fused_add_rms_norm, static_scaled_fp8_quant",
            code_of_nan="+max",
        ),
        vllm(
            "vllm-fused-quant",
            "vLLM custom all-reduce, rms_norm_dynamic_per_token_quant or rms_norm_per_block_quant",
            norm_reads_rounded=False,
            round_normed=True,
            code_of_nan="+max",
        ),
        FAST(
            "sglang",
            "SGLang custom all-reduce, sgl-kernel's fused_add_rmsnorm (FlashInfer's), per_token_group_quant v2; "
            "as sglang-kernel 0.4.6 has them for sm_90, in machine code, where the sum over ranks flushes, too",
            accumulate="fp32",
            order="any",
            norm_reads_rounded=False,
            depth=NORM_DEPTH,
            code_of_nan="+max",
        ),
        Dataflow(
            "aiter",
            "AITER fused all-reduce, 1-stage (issue 2586): the sum rounded, the stream kept in float32 to the codes",
            accumulate="fp32",
            order="any",
            norm_reads_rounded=False,
            depth=None,
            round_norm=False,
            scaling="divide",
        ),
    )


def _separate() -> tuple[Dataflow, ...]:
    return (
        SEPARATE("torch-symm", "torch symmetric memory's one-shot and two-shot all-reduce, then torch ops"),
        SEPARATE("unfused", "torch.distributed all_reduce, then torch ops", order="any"),
        SEPARATE(
            "nccl-nvls",
            "the same where NCCL may add up in the switch (NVLS): truncated then, in an order that differs between "
            "drivers and processes (NCCL issues 1497 and 2360, August 2026)",
            sum_rounding="either",
            order="any",
            reproducible=False,
        ),
        SEPARATE(
            "multimem-bf16",
            "in-switch sums of bf16 (NVLS, multimem), then torch ops; they truncate (Megatron-LM pull requests 6634 "
            "and 6806, August 2026), in which width is not said: this declaration contains all",
            sum_rounding="truncate",
            order="any",
        ),
        SEPARATE(
            "multimem-fp32",
            "in-switch sums of float32 (NVLS, multimem), then torch ops: the exact sum rounded once on 16.7 million "
            "channels (the same pull requests)",
            accumulate="exact",
            order="any",
        ),
    )


_LIKE = {
    "flashinfer": ("flashinfer",),
    "flashinfer-cutedsl": ("flashinfer-cutedsl", "flashinfer"),
    "flashinfer-norm-block": ("flashinfer-block", "flashinfer"),
    "flashinfer-mnnvl": ("flashinfer-mnnvl", "flashinfer"),
    "flashinfer-mnnvl-twoshot": ("flashinfer-mnnvl-twoshot", "flashinfer-mnnvl", "flashinfer"),
    "vllm": ("vllm", "deepgemm", "torchao-rceil", "trtllm"),
    "trtllm": ("trtllm",),
    "sglang": ("sglang-fast", "sglang", "vllm", "deepgemm", "trtllm"),
    "aiter": ("aiter", "torchao-even", "torchao"),
    "unfused": ("torch", "vllm-native", "deepgemm", "torchao-rceil", "torchao-even", "torchao"),
    "torch": ("torch", "vllm-native", "torchao"),
    "nccl": ("torch", "vllm-native", "deepgemm", "torchao-rceil", "torchao-even", "torchao"),
    "multimem": ("torch", "vllm-native", "torchao"),
}
"""Whose quantisers go with a dataflow, the first that there is, by the longest beginning of its name."""


def _with_quants(flow: Dataflow) -> Dataflow:
    """The dataflow with a declaration of every quantiser: its library's where there is one, else the first known."""
    beginning = max((name for name in _LIKE if flow.name.startswith(name)), key=len)
    chosen = []
    for quantiser, known in QUANT_FLOWS.items():
        if quantiser != GIVEN_SCALE:
            name = next((name for name in _LIKE[beginning] if name in known), next(iter(known)))
            chosen.append((quantiser, known[name]))
    return replace(flow, quants=tuple(chosen))


_KNOWN = (*_trtllm(), *_flashinfer(), *_engines(), *_separate())

DATAFLOWS: dict[str, Dataflow] = {flow.name: _with_quants(flow) for flow in _KNOWN}
"""The known dataflows by name."""


def dataflow(name: str) -> Dataflow:
    """Look a known dataflow up by its name.

    Behind a slash, as in `vllm-c/deepgemm`, comes the implementation whose quantisers it shall have.

    Raises:
        UsageError: no dataflow has this name, or no quantiser is computed by an implementation of that name.
    """
    base, slash, implementation = name.partition("/")
    if base not in DATAFLOWS:
        raise UsageError(f"unknown dataflow {name!r}, expected one of: {', '.join(DATAFLOWS)}")
    if not slash:
        return DATAFLOWS[base]
    chosen = tuple((q, flows[implementation]) for q, flows in QUANT_FLOWS.items() if implementation in flows)
    if not chosen:
        known = sorted({each for flows in QUANT_FLOWS.values() for each in flows})
        raise UsageError(f"unknown implementation in {name!r}, expected one of: {', '.join(known)}")
    return replace(DATAFLOWS[base], name=name, quants=tuple((dict(DATAFLOWS[base].quants) | dict(chosen)).items()))
