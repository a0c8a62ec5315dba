"""Where a kernel rounds: one frozen declaration.

A dataflow is a property of the kernel, constant over a run. Each field is a
licence (assumption A5 of the criterion): a value computed under the declaration
conforms, whatever the evaluation order inside a stage.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from fusecheck.errors import UsageError
from fusecheck.operations import GIVEN_SCALE
from fusecheck.quantflow import CodeOfNan, CodeRule, QuantFlow, Reads, without_group

Accumulate = Literal["fp32", "native", "exact"]
SumRounding = Literal["nearest", "truncate", "either"]
Order = Literal["rank", "any"]
Scaling = Literal["multiply", "divide", "either"]
MeanRule = Literal["exact", "approx"]
ZeroSign = Literal["kept", "any"]
NanPayload = Literal["kept", "any"]

GPU_DEPTH = 24
"""Additions above any square in the fused kernels: 7 serial per thread, 5 + 5 warp shuffles, 7 over a cluster."""
ALONE = 2
"""For `invariant_below`: launches depend on the rows of the batch, so that only a row alone is a row alone."""


@dataclass(frozen=True)
class ExpertFlow:
    """How an MoE collective sums experts on a rank, terms ascending, each operation rounded once.

    Attributes:
        accumulate: dtype of the sum after each addition.
        product_rounded: a weighted token is rounded to the activations' dtype before it is added.
        scaling: the routed factor multiplies the experts' sum, or is never applied.
        shared: the shared expert's output is added, on each rank that has one.
        flush: float32 subnormals become zero, as operands and as results: of products, of the routed factor, of the
            shared expert's addition, and of sums in float32. Terms in the activations' dtype are added by its own
            instruction, which keeps them.
    """

    accumulate: Literal["fp32", "native"] = "native"
    product_rounded: bool = True
    scaling: Literal["after_experts", "never"] = "after_experts"
    shared: bool = True
    flush: bool = False


@dataclass(frozen=True)
class Dataflow:
    """The declared arithmetic of AllReduce + residual add + RMSNorm + E4M3 quantise.

    "Native" is the activations' dtype (bf16 or fp16); "rounded" means rounded to it.

    Attributes:
        name: how reports and the command line call it.
        source: the implementation that computes like this.
        accumulate: dtype of every addition over ranks; `exact`: the true sum, rounded once, to float32 (a switch's).
        sum_rounding: how each addition, and the finished sum where `round_sum` says so, is rounded: `truncate`
            is toward zero (a switch's bf16); `either` leaves it open, each time.
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
    sum_rounding: SumRounding = "nearest"
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

    @property
    def order_free(self) -> bool:
        """Whether no order of the ranks is left open: it is named, or the exact sum has none."""
        return self.order == "rank" or self.accumulate == "exact"

    def declares(self, quantiser: str) -> bool:
        """Whether it says how a quantiser computes; of none and of one with a given scale every dataflow does."""
        names = ("none", GIVEN_SCALE, *dict(self.quants))
        return quantiser in names or without_group(quantiser) in names

    def quant(self, quantiser: str) -> QuantFlow:
        """How a quantiser computes, by its name, with or without the size of its groups.

        Raises:
            UsageError: the dataflow does not declare it.
        """
        if quantiser == GIVEN_SCALE:
            return self._static
        declared = dict(self.quants)
        found = declared.get(quantiser) or declared.get(without_group(quantiser))
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
