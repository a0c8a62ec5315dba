"""Where a kernel rounds: one frozen declaration, and the known kernels' by name.

A dataflow is a property of the kernel, constant over a run. Each field is a
licence (assumption A5 of the criterion): a value computed under the declaration
conforms, whatever the evaluation order inside a stage.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Literal

from fusecheck.errors import UsageError
from fusecheck.operations import GIVEN_SCALE
from fusecheck.quantflow import QUANT_FLOWS, CodeOfNan, CodeRule, QuantFlow, Reads

Accumulate = Literal["fp32", "native"]
Order = Literal["rank", "any"]
Scaling = Literal["multiply", "divide", "either"]
MeanRule = Literal["exact", "approx"]
ZeroSign = Literal["kept", "any"]
NanPayload = Literal["kept", "any"]

GPU_DEPTH = 24
"""Additions above any square in the fused kernels: 7 serial per thread, 5 + 5 warp shuffles, 7 over a cluster."""
ALONE = 2
"""For `invariant_below`: launches depend on the rows of the batch, so that only a row alone is a row alone."""
NORM_DEPTH = 65
"""In FlashInfer's norm kernels, a block a row: 8 squares a thread in each of 7 rounds at most, 5 + 5 warp shuffles."""


@dataclass(frozen=True)
class ExpertFlow:
    """How an MoE collective sums experts on a rank, terms ascending, each operation rounded once.

    Attributes:
        accumulate: dtype of the sum after each addition.
        product_rounded: a weighted token is rounded to the activations' dtype before it is added.
        scaling: the routed factor multiplies the experts' sum, or is never applied.
        shared: the shared expert's output is added, on each rank that has one.
    """

    accumulate: Accumulate = "native"
    product_rounded: bool = True
    scaling: Literal["after_experts", "never"] = "after_experts"
    shared: bool = True


@dataclass(frozen=True)
class Dataflow:
    """The declared arithmetic of AllReduce + residual add + RMSNorm + E4M3 quantise.

    "Native" is the activations' dtype (bf16 or fp16); "rounded" means rounded to it.

    Attributes:
        name: how reports and the command line call it.
        source: the implementation that computes like this.
        accumulate: dtype of every addition over ranks.
        order: `rank` adds rank 0, 1, ... N-1 on every rank; `any` is any tree.
        round_sum: the sum is rounded before the residual is added.
        norm_reads_rounded: the norm reads the rounded residual_out, not the float32 sum.
        round_squares: each square is rounded before it is added up.
        scaled_squares: a row is scaled by a power of two before it is squared, so that no square overflows.
        depth: additions above any square, at most; None: any order.
        mean_rule: how the sum of squares is divided by hidden: `exact` divides correctly rounded or multiplies by the
            rounded 1 / hidden; `approx` is within 2 ulp (`div.approx`, the division of `-use_fast_math`).
        round_normed: t * r is rounded before the product with gamma.
        round_norm: the quantiser reads the rounded norm.
        scaling: by the reciprocal of scale, by division, or undeclared.
        exact_reciprocal: the reciprocal is correctly rounded, else within 1 ulp.
        exact_pow2: a reciprocal or division that is not correctly rounded is exact where the divisor is a power of two
            (`fusecheck exhaust` checks it on a chip).
        flush_subnormals: float32 subnormal operands and results of the additions become zero, as does the scale's
            reciprocal (FlashInfer's `-use_fast_math`).
        sum_flushes: with `flush_subnormals`, the additions over ranks flush too; not where a library adds up that keeps
            subnormals.
        zero_sign: whether the sign of a zero survives the exchange.
        nan_payload: whether outputs that are compared with each other, between ranks or calls, hold the same bits of a
            NaN, or any NaN.
        reproducible: whether the same inputs give the same bits at every call. Where not, further calls are judged by
            their enclosures alone, and what only bits could show is left out: graphs, streams, neighbours.
        invariant_below: in every batch of fewer rows than this a row has the same bits, wherever it stands and whatever
            stands beside it; 0: in every batch; `ALONE`: nothing is promised of any batch; None: not declared, which
            the property tests take for 0. `fusecheck invariance` checks it.
        saturate: the cast clamps to +-448; else values beyond 464 become NaN.
        code_of_nan: what a NaN becomes in the cast.
        statistics: whether the mean square is that of the rounded residual stream; None: of what the norm reads.
        experts: how experts are summed on a rank before the exchange.
        quants: how every other quantiser than the one with a given scale computes, by its name.
    """

    name: str
    source: str = field(compare=False, default="")
    accumulate: Accumulate = "native"
    order: Order = "rank"
    round_sum: bool = True
    norm_reads_rounded: bool = True
    round_squares: bool = False
    scaled_squares: bool = False
    depth: int | None = GPU_DEPTH
    mean_rule: MeanRule = "exact"
    round_normed: bool = False
    round_norm: bool = True
    scaling: Scaling = "multiply"
    exact_reciprocal: bool = True
    exact_pow2: bool = False
    flush_subnormals: bool = False
    sum_flushes: bool = True
    zero_sign: ZeroSign = "any"
    nan_payload: NanPayload = "any"
    reproducible: bool = True
    invariant_below: int | None = None
    saturate: bool = True
    code_of_nan: CodeOfNan = "nan"
    statistics: Reads | None = None
    experts: ExpertFlow = ExpertFlow()
    quants: tuple[tuple[str, QuantFlow], ...] = ()

    def declares(self, quantiser: str) -> bool:
        """Whether it says how a quantiser computes; of none and of one with a given scale every dataflow does."""
        names = ("none", GIVEN_SCALE, *dict(self.quants))
        return quantiser in names or quantiser.rstrip("0123456789").removesuffix("-") in names

    def quant(self, quantiser: str) -> QuantFlow:
        """How a quantiser computes, by its name, with or without the size of its groups.

        Raises:
            UsageError: the dataflow does not declare it.
        """
        if quantiser == GIVEN_SCALE:
            return self._static
        declared = dict(self.quants)
        found = declared.get(quantiser) or declared.get(quantiser.rstrip("0123456789").removesuffix("-"))
        if found is None:
            known = ", ".join(declared) or "none"
            raise UsageError(f"dataflow {self.name} declares no quantiser {quantiser!r}, only: {known}; see `quants`")
        return found

    @cached_property
    def _static(self) -> QuantFlow:
        rule: CodeRule = "divide" if self.scaling == "divide" else "either"
        if self.scaling == "multiply":
            rule = "reciprocal" if self.exact_reciprocal else "rcp"
        return QuantFlow(
            self.name,
            reads="rounded" if self.round_norm else "unrounded",
            given="scale",
            scale_rule="given",
            code_rule=rule,
            exact_pow2=self.exact_pow2,
            code_of_nan=self.code_of_nan,
            flush=self.flush_subnormals,
            saturate=self.saturate,
        )


def _known() -> tuple[Dataflow, ...]:
    fast = partial(Dataflow, mean_rule="approx", exact_reciprocal=False, exact_pow2=True, flush_subnormals=True)
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
            "TensorRT-LLM NCCL + fallbackRunSubsequentOps",
            order="any",
            scaling="either",
            exact_pow2=True,
        ),
        Dataflow("trtllm-ub", "TensorRT-LLM user buffers (multimem)", accumulate="fp32", order="any", round_norm=False),
        fast("flashinfer", "FlashInfer trtllm_allreduce_fusion, fp32_acc=False"),
        fast("flashinfer-fp32", "the same with fp32_acc=True (vLLM, SGLang)", accumulate="fp32"),
        fast(
            "flashinfer-mnnvl-oneshot",
            "FlashInfer mnnvl, one-shot, before 0.7.4: squares in the native dtype",
            accumulate="fp32",
            round_squares=True,
        ),
        fast("flashinfer-mnnvl-twoshot", "FlashInfer mnnvl, two-shot, and one-shot from 0.7.4 on", accumulate="fp32"),
        fast(
            "flashinfer-norm-quant",
            "all-reduce, then FlashInfer fused_add_rmsnorm_quant (its CUDA kernels)",
            order="any",
            norm_reads_rounded=False,
            depth=NORM_DEPTH,
            round_norm=False,
            sum_flushes=False,
            code_of_nan="+max",
        ),
        Dataflow(
            "vllm-native",
            "vLLM custom all-reduce, native RMSNorm, static quantise",
            accumulate="fp32",
            norm_reads_rounded=False,
            round_normed=True,
            depth=None,
        ),
        Dataflow(
            "vllm-c",
            "vLLM custom all-reduce, fused_add_rms_norm, static_scaled_fp8_quant",
            accumulate="fp32",
            depth=None,
            code_of_nan="+max",
        ),
        Dataflow(
            "torch-symm",
            "torch symmetric memory's one-shot and two-shot all-reduce, then torch ops",
            depth=None,
            scaling="divide",
        ),
        Dataflow(
            "unfused",
            "torch.distributed all_reduce, then torch ops",
            order="any",
            depth=None,
            scaling="divide",
            zero_sign="any",
        ),
    )


_LIKE = {
    "flashinfer": ("flashinfer",),
    "flashinfer-mnnvl-twoshot": ("flashinfer-mnnvl-twoshot", "trtllm"),
    "flashinfer-mnnvl-oneshot": ("flashinfer", "trtllm"),
    "vllm": ("vllm", "deepgemm", "torchao-rceil", "trtllm"),
    "trtllm": ("trtllm",),
    "unfused": ("torch", "vllm-native", "deepgemm", "torchao-rceil", "torchao-even", "torchao"),
    "torch": ("torch", "vllm-native", "torchao"),
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


DATAFLOWS: dict[str, Dataflow] = {flow.name: _with_quants(flow) for flow in _known()}
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
