"""The field's pass criteria for quantisers that make their own scales, as `criteria` has them for a given scale.

Re-expressed from the formulas in the tests, each at the commit at which it was read. The reference is perfect: the
nominal outputs of the declared dataflow, or, where a test asks for it, the nominal codes and scales of the kernel's own
norm. A criterion is asked about the formats that its test is of.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusecheck.faults.comparison import Codes, Floats, close, far
from fusecheck.faults.criteria import Criterion


@dataclass(frozen=True)
class Quantised:
    """Codes and scales, of one rank or as they should be.

    Attributes:
        codes: one a byte, [tokens, hidden].
        numbers: the codes' values, [tokens, hidden].
        scales: what a value is multiplied by, [tokens, groups].
        storage: the bytes of all scales and promised padding, in the order of their slots.
    """

    codes: Codes
    numbers: Floats
    scales: Floats
    storage: Codes

    @property
    def values(self) -> Floats:
        """The dequantised output, [tokens, hidden]."""
        with np.errstate(invalid="ignore", over="ignore"):
            return self.numbers * self.scales.repeat(self.numbers.shape[1] // self.scales.shape[1], axis=1)


@dataclass(frozen=True)
class FormatEvidence:
    """What a criterion sees: outputs, reference, and what should have been made of the kernel's own norm.

    Attributes:
        streams: pairs of what was returned and what it should be: residual, and norm where it is returned.
        own_norm: the norm that was returned, else the reference's, [tokens, hidden].
        got: codes and scales as returned.
        expected: the reference's.
        own: those of `own_norm`.
        bits: bits of a native significand, 8 for bf16 and 11 for fp16.
        four_bits: whether codes are E2M1.
    """

    streams: tuple[tuple[Floats, Floats], ...]
    own_norm: Floats
    got: Quantised
    expected: Quantised
    own: Quantised
    bits: int
    four_bits: bool


def _all(a: Floats, b: Floats, atol: float, rtol: float) -> bool:
    return bool(close(a, b, atol, rtol).all())


def _streams(e: FormatEvidence, atol: float, rtol: float) -> bool:
    return all(_all(got, wanted, atol, rtol) for got, wanted in e.streams)


def _same(got: Quantised, wanted: Quantised) -> bool:
    """Codes and storage, byte for byte."""
    return bool((got.codes == wanted.codes).all() and (got.storage == wanted.storage).all())


def _flashinfer_dynamic(e: FormatEvidence) -> bool:
    atol = 0.05 * float(e.expected.scales.max())
    near = _streams(e, 0.8, 0.01) and _all(e.got.scales, e.expected.scales, 1e-3, 1e-3)
    return near and _all(e.got.values, e.expected.values, atol, 0.05)


def _flashinfer_mnnvl(e: FormatEvidence) -> bool:
    most = 0.01 if e.four_bits else 0.002
    with np.errstate(invalid="ignore"):
        wrong = np.abs(e.got.values - e.expected.values) > np.maximum(0.05 * np.abs(e.expected.values), 0.15)
    return _streams(e, 0.15, 0.05) and bool(wrong.mean() <= most)


def _round_trip(e: FormatEvidence) -> bool:
    return bool(np.isfinite(e.got.values).all()) and _all(e.got.values, e.own_norm, 0.5, 0.3)


def _vllm_layernorm(e: FormatEvidence) -> bool:
    codes = _all(e.got.numbers, e.expected.numbers, 1e-6, 1e-5) or _all(e.got.values, e.expected.values, 5e-2, 5e-2)
    return _all(e.got.scales, e.expected.scales, 1e-8, 1e-5) and codes and _all(*e.streams[0], 1e-8, 1e-5)


def _sglang_group(e: FormatEvidence) -> bool:
    distance = np.abs(e.got.codes.astype(int) - e.own.codes.astype(int))
    most = 0.04 if distance.size <= 4096 else 0.005
    near = bool((distance < 2).all() and (distance == 1).mean() < most)
    return near and _all(e.got.scales, e.own.scales, 1e-5, 1e-3)


def _tensorrt(e: FormatEvidence) -> bool:
    pairs = (*e.streams, (e.got.values, e.expected.values))
    return all(far(a, b, 0.05, 0.15).mean() <= 0.01 for a, b in pairs)


def _modular(e: FormatEvidence) -> bool:
    distance = np.abs(e.got.codes.astype(int) - e.expected.codes.astype(int))
    return bool((distance <= 1).all() and (distance > 0).mean() <= 0.05)


def _deep_gemm(e: FormatEvidence) -> bool:
    a, b = e.got.values, e.own_norm
    total = float((a * a + b * b).sum())
    return total == 0 or bool(1 - 2 * float((a * b).sum()) / total < 1e-3)


def _torchao(e: FormatEvidence) -> bool:
    noise, signal = float(np.linalg.norm(e.got.values - e.own_norm)), float(np.linalg.norm(e.own_norm))
    least = 14.0 if e.four_bits else 20.0
    return noise == 0 or bool(signal > 0 and 20 * np.log10(signal / noise) >= least)


def _torch_default(e: FormatEvidence) -> bool:
    rtol = 1.6e-2 if e.bits == 8 else 1e-3
    return _streams(e, 1e-5, rtol) and _all(e.got.values, e.expected.values, 1e-5, rtol)


_FI, _VLLM = "flashinfer-ai/flashinfer", "vllm-project/vllm"
_GROUPED, _FP4 = ("group-fp8", "group-fp8-packed"), ("nvfp4", "mxfp4")

FORMAT_CRITERIA: tuple[Criterion[FormatEvidence], ...] = (
    Criterion(
        "FI 8/9",
        "FlashInfer",
        f"{_FI}@10c04500 tests/comm/test_trtllm_allreduce_fusion_group_fp8_quant.py",
        "codes and packed storage, padding included, equal the quantisation of the kernel's own norm",
        lambda e: _same(e.got, e.own),
        note="Residual and norm are not looked at.",
        formats=("group-fp8-packed",),
    ),
    Criterion(
        "FI 10/11",
        "FlashInfer",
        f"{_FI}@09385c43 tests/comm/test_trtllm_allreduce_dynamic_fp8_quant.py",
        "residual or norm 0.8 + 0.01 |b|; scale 0.001 + 0.001 |b|; y 0.05 of the largest scale + 0.05 |b|",
        _flashinfer_dynamic,
        formats=("dynamic-fp8",),
    ),
    Criterion(
        "FI mnnvl quant",
        "FlashInfer",
        f"{_FI}@fb28d724 tests/comm/test_trtllm_mnnvl_allreduce.py",
        "streams 0.15 + 0.05 |b|; at most 0.2 % of y (1 % of FP4) off by max(0.05 |b|, 0.15); NaN is not counted",
        _flashinfer_mnnvl,
        formats=("dynamic-fp8", "nvfp4"),
    ),
    Criterion(
        "FI FP4",
        "FlashInfer",
        f"{_FI}@001b5cff tests/utils/test_fp4_quantize.py test_fp4_quantization",
        "code values 0.1 + |b|; scales 0.1 + 0.1 |b|; of the kernel's own norm",
        lambda e: _all(e.got.numbers, e.own.numbers, 0.1, 1.0) and _all(e.got.scales, e.own.scales, 0.1, 0.1),
        formats=_FP4,
    ),
    Criterion(
        "FI round trip",
        "FlashInfer",
        f"{_FI}@001b5cff tests/utils/test_fp4_quantize.py test_e2m1_dequantization",
        "y is finite and within 0.5 + 0.3 |b| of the kernel's own norm",
        _round_trip,
        formats=_FP4,
    ),
    Criterion(
        "vLLM group",
        "vLLM",
        f"{_VLLM}@06c4e1f5 tests/kernels/quantization/test_per_token_group_quant.py",
        "code values 0.15 + 0.15 |b|; scales 0.01 + 0.01 |b|; of the kernel's own norm",
        lambda e: _all(e.got.numbers, e.own.numbers, 0.15, 0.15) and _all(e.got.scales, e.own.scales, 0.01, 0.01),
        formats=("group-fp8",),
    ),
    Criterion(
        "vLLM packed",
        "vLLM",
        f"{_VLLM}@06c4e1f5 tests/kernels/quantization/test_per_token_group_quant.py, packed",
        "codes and packed storage, padding included, equal those of the kernel's own norm",
        lambda e: _same(e.got, e.own),
        formats=("group-fp8-packed",),
    ),
    Criterion(
        "vLLM norm + quant",
        "vLLM",
        f"{_VLLM}@0a88d969 tests/kernels/core/test_fused_quant_layernorm.py",
        "scales and residual 1e-8 + 1e-5 |b|; code values 1e-6 + 1e-5 |b|, or else y 0.05 + 0.05 |b|",
        _vllm_layernorm,
        formats=("dynamic-fp8", "group-fp8"),
    ),
    Criterion(
        "SGLang group",
        "SGLang",
        "sgl-project/sglang@01da1d07 sgl-kernel/tests/test_per_token_group_quant_8bit.py",
        "codes of the own norm within 1 and 0.5 % of them off (4 % of few); scales 1e-5 + 0.001 |b|",
        _sglang_group,
        formats=_GROUPED,
    ),
    Criterion(
        "TRT quant",
        "TensorRT-LLM",
        "NVIDIA/TensorRT-LLM@02497657 tests/unittest/utils/util.py check_accuracy",
        "at most 1 % of residual, norm, y off by 0.05 + 0.15 |b|; NaN is not counted",
        _tensorrt,
        formats=("nvfp4", "mxfp8"),
    ),
    Criterion(
        "AITER quant",
        "ROCm AITER",
        "ROCm/aiter@e4048607 op_tests/multigpu_tests/test_fused_ar_rms.py",
        "less than 5 % of y off by 0.05 + 0.05 |b|; the residual is not looked at",
        lambda e: bool((~close(e.got.values, e.expected.values, 0.05, 0.05)).mean() < 0.05),
        formats=("dynamic-fp8", "group-fp8", "mxfp4"),
    ),
    Criterion(
        "Modular quant",
        "Modular",
        "modular/modular@44fbe3e5 max/kernels/test/gpu/nn/test_allreduce_residual_rmsnorm_fp8.mojo",
        "codes within 1 and at most 5 % off",
        _modular,
        formats=("dynamic-fp8",),
    ),
    Criterion(
        "DeepGEMM quant",
        "DeepGEMM",
        "deepseek-ai/DeepGEMM deep_gemm/testing/numeric.py calc_diff",
        "1 - 2 <a,b> / (|a|^2 + |b|^2) < 0.001, y against the kernel's own norm",
        _deep_gemm,
        note="Its tests compare matrix products; here it is asked about what goes into them.",
        formats=(*_GROUPED, "mxfp8"),
    ),
    Criterion(
        "torchao MX",
        "torchao",
        "pytorch/ao@000a0fdc test/prototype/mx_formats/test_mx_tensor.py",
        "SQNR of y against the kernel's own norm at least 20 dB (E4M3) or 14 dB (E2M1)",
        _torchao,
        formats=("mxfp8", *_FP4),
    ),
    Criterion(
        "torch default quant",
        "PyTorch",
        "pytorch/pytorch torch/testing/_comparison.py",
        "residual, norm, y: 1e-5 + 0.016 |b| (fp16 0.001)",
        _torch_default,
        note="What is usual where no project has a test: dequantise, and `assert_close`.",
        formats=("dynamic-fp8", *_GROUPED, "mxfp8", *_FP4),
    ),
)
"""The criteria, in the order of the columns."""
