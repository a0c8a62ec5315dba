"""The fused kernel's arithmetic on the CPU, one overridable method a step, for any declared Dataflow.

The steps are those of TensorRT-LLM's and FlashInfer's `allReduceFusionKernels`:
accumulate (A1), round_sum (A2), add_residual (A3), mean_square (A4), inverse_root
(A5), normalise (A6), scale (A7), cast (A8). A fault is a subclass that overrides one
of them, or a patch on one. Nothing here is shared with the oracle, which judges it.

Methods work on blocks of whole rows that fit the cache. "Native" is the activations'
dtype (bf16 or fp16). A step may overwrite the float32 tensor that it is given, never
a native one: those are the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from fusecheck.backends import emulated_sums
from fusecheck.backends.emulated_quantise import Quantising
from fusecheck.dataflow import Dataflow
from fusecheck.interface import Operation, RankInputs, RankOutputs
from fusecheck.stages.experts import Experts

E4M3_MAX = 448.0
"""The largest finite E4M3 value, code 0x7E."""

E4M3_TIE = 464.0
"""The midpoint of 448 and the next step, 480; it rounds to 448, everything beyond overflows."""

LARGEST_SUBNORMAL = float(torch.tensor(0x007FFFFF, dtype=torch.int32).view(torch.float32))
"""The largest float32 subnormal, 2^-126 - 2^-149."""

LANES = 8
"""Elements of one 16-byte access: what one GPU thread adds up serially."""

NAN_CODES = {"nan": 0x7F, "+max": 0x7E, "-max": 0xFE}


@dataclass(frozen=True)
class Row:
    """What is equal for all rows of one call.

    Attributes:
        weight: gamma + weight_bias, [hidden], float32.
        factor: what the normalised value is multiplied by, or divided by, [1], float32.
        divide: whether `factor` divides.
        eps: added to the mean square.
        op: what is computed.
        quantising: how scales and codes are made, where the scale is not given.
    """

    weight: Tensor
    factor: Tensor
    divide: bool
    eps: float
    op: Operation = Operation.RESIDUAL_RMS_NORM_OUT_QUANT_FP8
    quantising: Quantising | None = None


class Arithmetic:
    """AllReduce's additions and the epilogue, as `dataflow` declares them."""

    def __init__(self, dataflow: Dataflow, index: int, world_size: int) -> None:
        """Bind to rank `index` of `world_size`; a right kernel computes alike on every rank."""
        self.dataflow = dataflow
        self.index = index
        self.world_size = world_size

    # Experts of one rank.

    def sum_experts(self, experts: Experts) -> Tensor:
        """A rank's addend of the exchange, [tokens, hidden] native: terms ascending, routed factor, shared expert."""
        rules, native = self.dataflow.experts, experts.tokens.dtype
        kept = native if rules.accumulate == "native" else torch.float32
        count = len(experts.tokens) if experts.rows is None else experts.rows.shape[1]
        total = self.weighed(experts, 0).to(kept)
        for term in range(1, count):
            total = total + self.weighed(experts, term).to(kept)
            total = total if kept is native else self.settled(total)
        if rules.scaling == "after_experts" and experts.routed_scaling != 1.0:
            total = self.settled(self.settled(total) * experts.routed_scaling).to(kept)
        if rules.shared and experts.shared is not None:
            total = self.settled(self.settled(total) + self.settled(experts.shared.to(kept))).to(kept)
        return total.to(native)

    def settled(self, x: Tensor) -> Tensor:
        """An operand or a result of the experts' float32 steps, flushed where they flush; else as it is."""
        return self.flush(x.float()) if self.dataflow.experts.flush else x

    def weighed(self, experts: Experts, term: int) -> Tensor:
        """One term times its weight, [tokens, hidden]; zero where the route is missing."""
        if experts.rows is None:
            token, weight, row = experts.tokens[term], experts.scale[term][:, None], None
        else:
            row = experts.rows[:, term].long()
            token, weight = experts.tokens[row.clamp(min=0)], experts.scale[:, term, None]
        product = self.settled(self.settled(token.float()) * self.settled(weight.float()))
        if row is not None:
            product = product.where((row >= 0)[:, None], torch.zeros(()))
        return product.to(experts.tokens.dtype) if self.dataflow.experts.product_rounded else product

    # Additions over ranks.

    def rank_order(self) -> list[int]:
        """The order in which the ranks' partial sums are added; the same on every rank.

        A dataflow that declares any order gets the ring that starts at rank 1.
        """
        start = 0 if self.dataflow.order == "rank" else 1
        return [(start + step) % self.world_size for step in range(self.world_size)]

    def total(self, partials: Sequence[Tensor]) -> Tensor:
        """Sum every rank's block, [rows, hidden] native, to one block of `sum_dtype`."""
        return self.round_sum(self.accumulate(partials), partials[0].dtype)

    def sum_dtype(self, native: torch.dtype) -> torch.dtype:
        """The dtype in which a finished sum is handed on."""
        return native if self.dataflow.round_sum or self.dataflow.accumulate == "native" else torch.float32

    def accumulate(self, partials: Sequence[Tensor]) -> Tensor:
        """A1: add the ranks' blocks in order; float32, or rounded to native at every step."""
        ordered = [partials[rank] for rank in self.rank_order()]
        if self.dataflow.accumulate == "exact":
            return self.add_exactly(ordered)
        first, *others = ordered
        accumulator = first.float() if self.dataflow.accumulate == "fp32" else first.clone()
        for partial in others:
            accumulator = self.add_partial(accumulator, partial)
        return accumulator

    def add_partial(self, accumulator: Tensor, partial: Tensor) -> Tensor:
        """One addition of A1, into the accumulator's dtype; overwrites `accumulator`."""
        flushes = self.dataflow.flush_subnormals and self.dataflow.sum_flushes
        add = emulated_sums.add_truncated if self.truncates else Tensor.add_
        if not flushes:
            return accumulator.copy_(add(accumulator, partial))
        added = self.flush(add(self.flush(accumulator.float()), self.flush(partial.float())))
        return self.rounded(added, accumulator.dtype)

    def add_exactly(self, partials: Sequence[Tensor]) -> Tensor:
        """A1 where the true sum is rounded once, to float32."""
        if not (self.dataflow.flush_subnormals and self.dataflow.sum_flushes):
            return emulated_sums.sum_exactly(partials, truncates=self.truncates)
        flushed = [self.flush(partial.float()) for partial in partials]
        return self.flush(emulated_sums.sum_exactly(flushed, truncates=self.truncates))

    @property
    def truncates(self) -> bool:
        """Whether sums are rounded toward zero; so they are where that is left open."""
        return self.dataflow.sum_rounding != "nearest"

    def rounded(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        """A sum in another dtype, rounded as sums are."""
        return emulated_sums.cut(total, dtype) if self.truncates else total.to(dtype)

    def round_sum(self, accumulator: Tensor, native: torch.dtype) -> Tensor:
        """A2: round the sum to native before the residual is added, where that is declared."""
        return self.rounded(accumulator, self.sum_dtype(native))

    def flush(self, x: Tensor) -> Tensor:
        """Replace float32 subnormals by zeros, as `-use_fast_math` additions do; of their sign, where it is kept."""
        flushed = hardshrink(x, LARGEST_SUBNORMAL)
        return flushed.copysign_(x) if self.dataflow.zero_sign == "kept" else flushed

    # The epilogue.

    def prepare(self, inputs: RankInputs) -> Row:
        """Read gamma, scale and eps, once a call."""
        divide = self.dataflow.scaling == "divide"
        scale = inputs.scale.reshape(1)
        factor = scale if divide else self.reciprocal(scale)
        return Row(self.weight(inputs.gamma, inputs.weight_bias), factor, divide, self.epsilon(inputs))

    def weight(self, gamma: Tensor, weight_bias: float) -> Tensor:
        """Gamma plus the weight bias, formed in float32, [hidden]."""
        return gamma.float() + weight_bias

    def epsilon(self, inputs: RankInputs) -> float:
        """The eps that A5 adds."""
        return inputs.eps

    def reciprocal(self, scale: Tensor) -> Tensor:
        """1 / scale, [1] float32: correctly rounded, or truncated where it may be off by 1 ulp.

        Where not even powers of two are declared exact, theirs is the float32 below.
        """
        if self.dataflow.flush_subnormals:
            scale = self.flush(scale.clone())
        exact = scale.double().reciprocal()
        factor = exact.float()
        reach = exact.abs() if self.dataflow.exact_pow2 else exact.abs() * (1 - 2.0**-40)
        if not self.dataflow.exact_reciprocal and bool(factor.isfinite()) and bool(factor.double().abs() > reach):
            factor = torch.nextafter(factor, torch.zeros_like(factor))
        return self.flush(factor) if self.dataflow.flush_subnormals else factor

    def epilogue(self, total: Tensor, residual: Tensor, row: Row, outputs: RankOutputs) -> None:
        """A3 to A8 on one block of rows: read `total` and `residual`, fill the block's `outputs`.

        Codes of a quantiser whose scale is not given are one a byte here, its scales [rows, groups].
        """
        if outputs.total is not None:
            self.store(outputs.total, total)
        if not row.op.norm:
            return
        summed = self.add_residual(total, residual) if row.op.residual else total.float()
        rounded = summed.to(residual.dtype) if outputs.residual is None else outputs.residual
        if outputs.residual is not None:
            self.store(outputs.residual, summed)
        measured = None
        if self.dataflow.statistics is not None:
            measured = rounded if self.dataflow.statistics == "rounded" else summed.clone()
        read = summed.copy_(rounded) if self.dataflow.norm_reads_rounded else summed
        mean = self.mean_square(read if measured is None else measured.float(), residual.dtype)
        normed = self.normalise(read, self.inverse_root(mean, row.eps), row.weight, residual.dtype)
        if outputs.norm is not None:
            self.store(outputs.norm, normed)
        if row.quantising is not None:
            self.quantise(normed, row.quantising, outputs)
        elif outputs.quant is not None:
            scaled = self.scale(self.quantiser_input(normed, outputs.norm, residual.dtype), row)
            self.store(outputs.quant, self.cast(scaled))

    def quantise(self, normed: Tensor, quantising: Quantising, outputs: RankOutputs) -> None:
        """A7 and A8 where the scale is not given: one block's scales and codes."""
        if quantising.rules.reads == "rounded":
            normed = normed.copy_(normed.to(quantising.native) if outputs.norm is None else outputs.norm)
        scales, codes = quantising.run(normed)
        if outputs.scale is not None:
            self.store(outputs.scale, scales)
        if outputs.quant is not None:
            self.store(outputs.quant, codes)

    def store(self, output: Tensor, block: Tensor) -> None:
        """Write one block of an output; float32 values are rounded to native here, once."""
        output.copy_(block)

    def add_residual(self, total: Tensor, residual: Tensor) -> Tensor:
        """A3: sum + residual in float32; `epilogue` rounds it once to residual_out.

        Where the sum is native this is the native addition bit by bit: rounding twice is
        innocuous, since 24 >= 2 p + 2 for both formats.
        """
        if not self.dataflow.flush_subnormals:
            return total.float().add_(residual)
        return self.flush(self.flush(total.float()).add_(self.flush(residual.float())))

    def mean_square(self, read: Tensor, native: torch.dtype) -> Tensor:
        """A4: the mean of squares, [rows, 1]; a thread adds 8 lanes serially, then the threads a tree.

        Of a row that was scaled it is a float64: float32 may not hold it.

        The tree halves hidden / 8 values: 7 + ceil(log2(hidden / 8)) additions above any square.
        """
        rows, hidden = read.shape
        power = torch.zeros((), dtype=torch.float64)
        if self.dataflow.scaled_squares:
            power = torch.frexp(read.abs().amax(-1, keepdim=True))[1].clamp(min=0).double()
            read = (read.double() * torch.exp2(-power)).float()
        lanes = self.squares(read, native).view(rows, hidden // LANES, LANES).numpy()
        with np.errstate(over="ignore"):  # a sum beyond float32 is an infinity, as on a chip
            partial = lanes[:, :, 0] + lanes[:, :, 1]
            for lane in range(2, LANES):
                partial += lanes[:, :, lane]
            mean = self.tree_sum(torch.from_numpy(partial)).div_(hidden)
        return mean.double() * torch.exp2(2 * power) if self.dataflow.scaled_squares else mean

    def squares(self, read: Tensor, native: torch.dtype) -> Tensor:
        """Each element squared in float32, rounded to native where that is declared."""
        squared = read * read
        return squared.to(native).float() if self.dataflow.round_squares else squared

    def tree_sum(self, partial: Tensor) -> Tensor:
        """Add the threads' partial sums, [rows, threads], by halving; returns [rows, 1]. Overwrites `partial`."""
        # numpy's float32 additions are the same, and cost less to call.
        sums = partial.numpy()
        threads = sums.shape[1]
        while threads > 1:
            half = threads // 2
            sums[:, :half] += sums[:, threads - half : threads]
            threads -= half
        return partial[:, :1]

    def inverse_root(self, mean_square: Tensor, eps: float) -> Tensor:
        """A5: (mean square + eps)^(-1/2), [rows, 1] float32."""
        return torch.rsqrt(mean_square + eps).float()

    def normalise(self, read: Tensor, inverse: Tensor, weight: Tensor, native: torch.dtype) -> Tensor:
        """A6: (t * r) * gamma in float32, t * r rounded where declared; the rounding to norm_out comes after."""
        normed = read.mul_(inverse)
        if self.dataflow.round_normed:
            normed.copy_(normed.to(native))
        return normed.mul_(weight)

    def quantiser_input(self, normed: Tensor, norm: Tensor | None, native: torch.dtype) -> Tensor:
        """What A7 reads, float32: the rounded norm where that is declared, else the unrounded one."""
        if not self.dataflow.round_norm:
            return normed
        return normed.copy_(normed.to(native) if norm is None else norm)

    def scale(self, normed: Tensor, row: Row) -> Tensor:
        """A7: times the reciprocal of scale, or divided by scale."""
        return normed.div_(row.factor) if row.divide else normed.mul_(row.factor)

    def cast(self, scaled: Tensor) -> Tensor:
        """A8: round to nearest even E4M3, saturating or not, NaN as declared; float8_e4m3fn."""
        overflow = None if self.dataflow.saturate else scaled.abs() > E4M3_TIE
        codes = self.saturate(scaled).to(torch.float8_e4m3fn).view(torch.uint8)
        is_nan = codes.bitwise_and(0x7F)
        if int(is_nan.max()) == 0x7F:
            codes.masked_fill_(is_nan == 0x7F, NAN_CODES[self.dataflow.code_of_nan])
        if overflow is not None:
            codes.masked_fill_(overflow, NAN_CODES["nan"])
        return codes.view(torch.float8_e4m3fn)

    def saturate(self, scaled: Tensor) -> Tensor:
        """Clamp to the finite range; NaN stays NaN. Not left to the cast, which differs between torch releases."""
        return scaled.clamp_(-E4M3_MAX, E4M3_MAX)
