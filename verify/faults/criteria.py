"""The field's pass criteria, each as a small function with its source: what its test asserts, and on which outputs.

Re-expressed from the formulas in the tests; the commits are those at which the tests were read. A criterion is given
a perfect reference, the nominal outputs of the declared dataflow, which is more than most of the tests have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from fusecheck.faults import rules
from fusecheck.faults.comparison import Evidence, close
from fusecheck.quantflow import without_group

Seen = TypeVar("Seen")
"""What a criterion sees: `Evidence`, or `FormatEvidence` of a quantiser that makes its scales."""


@dataclass(frozen=True)
class Criterion(Generic[Seen]):
    """One pass criterion.

    Attributes:
        name: a short one, for the columns.
        project: whose.
        source: the test, and the commit at which it was read.
        formula: passes when.
        rule: the same as a function of one rank's outputs.
        profile: the data of its own test, a key of `peer_tests.PROFILES`; empty where it has no test of such a kernel.
        note: where the modelling may be unfair.
        ranks_equal: whether it also asks that all ranks' residuals are equal.
        formats: the quantisers that its test is of, without the size of their groups; empty: a given scale.
    """

    name: str
    project: str
    source: str
    formula: str
    rule: Callable[[Seen], bool]
    profile: str = ""
    note: str = ""
    ranks_equal: bool = False
    formats: tuple[str, ...] = ()

    def takes(self, quantiser: str) -> bool:
        """Whether its test is of this quantiser."""
        return quantiser in self.formats or without_group(quantiser) in self.formats


_FI, _TRT, _VLLM = "flashinfer-ai/flashinfer@fb28d724", "NVIDIA/TensorRT-LLM", "vllm-project/vllm"

CRITERIA: tuple[Criterion[Evidence], ...] = (
    Criterion(
        "FI fusion",
        "FlashInfer",
        f"{_FI} tests/comm/test_trtllm_allreduce_fusion.py",
        "residual, norm: |a-b| <= 0.8 (fp16 0.08) + 0.01 |b|; codes never",
        lambda e: rules.each(e, 0.8 if e.bits == 8 else 0.08, 0.01),
        "flashinfer",
    ),
    Criterion(
        "FI gemma",
        "FlashInfer",
        f"{_FI} tests/comm/test_gemma_ar_fusion.py",
        "residual, norm: 0.02 + 0.01 |b|",
        lambda e: rules.each(e, 2e-2, 1e-2),
        "flashinfer-gemma",
    ),
    Criterion(
        "FI unified",
        "FlashInfer",
        f"{_FI} tests/comm/test_allreduce_unified_api.py",
        "residual, norm: 0.15 + 0.05 |b|",
        lambda e: rules.each(e, 0.15, 0.05),
        "flashinfer",
    ),
    Criterion(
        "FI mnnvl",
        "FlashInfer",
        f"{_FI} tests/comm/test_trtllm_mnnvl_allreduce.py",
        "the same, and at most 0.2 % of y off by max(0.05 |b|, 0.15); NaN is not counted",
        rules.flashinfer_mnnvl,
        "flashinfer-mnnvl",
        "Meant for scale 1: at a calibrated scale it rejects right kernels.",
    ),
    Criterion(
        "FI dynamic",
        "FlashInfer",
        f"{_FI} tests/comm/test_trtllm_allreduce_dynamic_fp8_quant.py",
        "residual: 0.8 + 0.01 |b|; y: 0.05 scale + 0.05 |b|",
        rules.flashinfer_dynamic,
        "flashinfer",
        "Its formula for dynamic scales, applied to a static one.",
    ),
    Criterion(
        "FI bench",
        "FlashInfer",
        f"{_FI} benchmarks/routines/allreduce_comm.py --validate",
        "residual 0.05 + 0.05 |b|, norm 0.15 + 0.05 |b|, y 0.5 + 0.5 |b|",
        rules.flashinfer_bench,
    ),
    Criterion(
        "FI norm",
        "FlashInfer",
        f"{_FI} tests/utils/test_norm.py",
        "code values: 1 + |b|",
        lambda e: rules.code_values(e, 1, 1),
        "flashinfer-norm",
    ),
    Criterion(
        "FI group",
        "FlashInfer",
        f"{_FI} tests/comm/test_trtllm_allreduce_fusion_group_fp8_quant.py",
        "codes equal the quantisation of the kernel's own norm",
        rules.own_codes,
        "flashinfer-group",
        "Its formula for group scales, applied to a static one.",
    ),
    Criterion(
        "FI contract",
        "FlashInfer",
        f"{_FI} tests/comm/test_mnnvl_cutedsl_numerical_contract.py",
        "residual bit-exact; norm within 1 ulp of the reference's norm of the kernel's own residual",
        rules.flashinfer_contract,
        "flashinfer-contract",
        "Runs at 8 and 16 ranks in its project, at 2 and 4 here.",
    ),
    Criterion(
        "TRT",
        "TensorRT-LLM",
        f"{_TRT}@02497657 tests/unittest/utils/util.py check_accuracy",
        "at most 1 % of residual, norm, y off by 0.05 + 0.15 |b|; NaN is not counted",
        lambda e: rules.share(e, 0.05, 0.15, 0.01),
        "tensorrt-llm",
    ),
    Criterion(
        "TRT C++",
        "TensorRT-LLM",
        f"{_TRT}@2341856e cpp/tests/unit_tests/multi_gpu/kernels/allReduce/allReduceFusionTest.cu",
        "residual within 1; norm within 0.01 of the norm of the own residual; codes of the own norm; NaN passes",
        rules.tensorrt_cpp,
        "tensorrt-llm-cpp",
    ),
    Criterion(
        "vLLM fused",
        "vLLM",
        f"{_VLLM}@2981333c tests/kernels/core/test_fused_allreduce_rms_norm.py",
        "residual, norm: 0.02 + 0.02 |b|",
        lambda e: rules.each(e, 2e-2, 2e-2),
        "vllm",
    ),
    Criterion(
        "vLLM CUDA",
        "vLLM",
        f"{_VLLM}@041b9f54 tests/kernels/core/test_layernorm.py",
        "code values: 0.001 + 0.001 |b|",
        lambda e: rules.code_values(e, 1e-3, 1e-3),
        "vllm-layernorm",
    ),
    Criterion(
        "vLLM ROCm",
        "vLLM",
        f"{_VLLM}@041b9f54 tests/kernels/core/test_layernorm.py",
        "at most n / 100000 + 8 codes off by more than one; NaN is next to 448",
        rules.vllm_rocm,
        "vllm-layernorm",
    ),
    Criterion(
        "SGLang cos",
        "SGLang",
        "sgl-project/sglang sgl-kernel/tests/test_fused_add_rmsnorm_quant_fp8.py",
        "cosine of y > 0.999; residual 0.001 + 0.001 |b|",
        rules.cosine,
        "sglang",
    ),
    Criterion(
        "SGLang AMD",
        "SGLang",
        "sgl-project/sglang@060c48f7 test/registered/ops/test_aiter_allreduce_fusion_amd.py",
        "residual: |a-b| <= 0.13",
        lambda e: bool(close(e.got.residual, e.expected.residual, 0.13, 0.0).all()),
        "sglang-amd",
    ),
    Criterion(
        "SGLang fork",
        "SGLang (a fork)",
        "ywgrit/sglang bench_flashinfer_allreduce_rmsnorm_fp8_quant.py",
        "codes within 2, residual 0.01 + 0.01 |b|, norm 0.02 + 0.02 |b|",
        rules.sglang_fork,
        "sglang",
        "Its bound on the baseline's saturation is left out.",
    ),
    Criterion(
        "AITER",
        "ROCm AITER",
        "ROCm/aiter@e4048607 op_tests/multigpu_tests/test_fused_ar_rms.py",
        "less than 5 % of y off by 0.05 + 0.05 |b|; the residual is not looked at",
        rules.aiter_share,
        "aiter",
    ),
    Criterion(
        "Modular",
        "Modular",
        "modular/modular@44fbe3e5 max/kernels/test/gpu/nn/test_allreduce_residual_rmsnorm_fp8.mojo",
        "codes within 1 and at most 5 % off; residual within 1 ulp",
        rules.modular,
        "modular",
    ),
    Criterion(
        "torch symm",
        "PyTorch",
        "pytorch/pytorch test/distributed/test_symmetric_memory.py",
        "sum 0.1 + 0.1 |b|, and all ranks equal",
        lambda e: bool(close(e.got.residual, e.expected.residual, 0.1, 0.1).all()),
        "torch",
        ranks_equal=True,
    ),
    Criterion(
        "torch default",
        "PyTorch",
        "pytorch/pytorch torch/testing/_comparison.py",
        "residual, norm: 1e-5 + 0.016 |b| (fp16 0.001); codes equal",
        rules.torch_default,
    ),
    Criterion(
        "TE compare",
        "TransformerEngine",
        "NVIDIA/TransformerEngine@d0067d0d tests/cpp/test_common.cu",
        "code values: 0.01 or 1 %, or neighbours; NaN passes",
        rules.engine,
    ),
    Criterion(
        "TE overlap",
        "TransformerEngine",
        "NVIDIA/TransformerEngine@d0067d0d tests/pytorch/distributed/run_gemm_with_overlap.py",
        "the element with the largest difference: 12.5 % or 0.0625; NaN passes",
        rules.engine_overlap,
    ),
    Criterion(
        "nccl-tests",
        "NCCL",
        "NVIDIA/nccl-tests@a0b82b22 verifiable/verifiable.cu",
        "the sum's bits are equal; nothing else is looked at",
        rules.bits_of_sum,
        "nccl-tests",
        "Tests the collective alone; here it looks at residual_out.",
    ),
    Criterion(
        "BackendBench",
        "BackendBench",
        "meta-pytorch/BackendBench@66e0dbc0",
        "residual, norm, code values: 0.01 + 0.01 |b|",
        rules.backend_bench,
    ),
    Criterion(
        "KernelBench",
        "KernelBench",
        "ScalingIntelligence/KernelBench@423217d9",
        "one output: 0.01 + 0.01 |b|",
        rules.kernel_bench,
    ),
    Criterion(
        "JAX",
        "JAX",
        "jax-ml/jax@cec06d11 jax/_src/public_test_util.py",
        "residual, norm 0.01 + 0.01 |b|; code values 0.1 + 0.1 |b|",
        rules.jax,
    ),
    Criterion(
        "DeepGEMM",
        "DeepGEMM",
        "deepseek-ai/DeepGEMM deep_gemm/testing/numeric.py calc_diff",
        "1 - 2 <a,b> / (|a|^2 + |b|^2) < 0.001 over y",
        rules.deep_gemm,
    ),
    Criterion(
        "torchao",
        "torchao",
        "pytorch/ao torchao/quantization/utils.py compute_error",
        "SQNR of y >= 18 dB",
        rules.torchao,
    ),
)
"""The criteria, in the order of the columns."""
