"""Kernels that keep what they declare, in words that few need; and faulty ones whose finding must name the fault.

All are the example's kernel but for one thing.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from fusecheck import Dataflow, FusionOp, Limits, Problem, Rank, RankInputs, RankOutputs, Strategy
from fusecheck.property_tests.suite.example_backend import ExampleBackend, ExampleKernel


class Kernel(ExampleKernel):
    """The example's kernel, call by call."""

    def __init__(self, rank: Rank) -> None:
        super().__init__(rank)
        self.calls = 0

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        self.calls += 1
        return super().run(inputs, op=op, strategy=strategy)


class Backend(ExampleBackend):
    """The example's backend with another kernel."""

    kernel: type[ExampleKernel] = Kernel

    def __init__(self) -> None:
        self.name = f"honest-{type(self).__name__}"

    def open(self, rank: Rank, limits: Limits) -> ExampleKernel:
        return self.kernel(rank)


class InPlaceKernel(Kernel):
    """Writes the residual stream over the residual and the norm over the partial sum, as `fused_add_rms_norm` does."""

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        made = super().run(inputs, op=op, strategy=strategy)
        inputs.residual.copy_(made.residual)
        if made.norm is not None:
            inputs.partial.copy_(made.norm)
            return replace(made, residual=inputs.residual, norm=inputs.partial)
        return replace(made, residual=inputs.residual)


class InPlace(Backend):
    """Says so."""

    kernel = InPlaceKernel
    overwrites = ("residual", "partial")


class InPlaceUnsaid(Backend):
    """Does not say so."""

    kernel = InPlaceKernel


class AnyOrderKernel(Kernel):
    """Adds the ranks up in another order at each call, as atomics do."""

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        self.calls += 1
        partials = [torch.empty_like(inputs.partial) for _ in range(self.rank.world_size)]
        dist.all_gather(partials, inputs.partial, group=self.rank.group)
        turned = partials[self.calls % len(partials) :] + partials[: self.calls % len(partials)]
        stream = functools.reduce(torch.add, turned) + inputs.residual
        wide = stream.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + inputs.eps)
        norm = (wide * inverse * (inputs.gamma.float() + inputs.weight_bias)).to(stream.dtype)
        quant = (norm.float() * inputs.scale.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn)
        return RankOutputs(stream, norm if op.returns_norm else None, quant if op.returns_quant else None)


class AnyOrder(Backend):
    """Says that no call's bits are promised."""

    kernel = AnyOrderKernel
    reproducible = False

    def dataflow(self, problem: Problem) -> Dataflow:
        declared = super().dataflow(problem)
        return replace(declared, accumulate="native", order="any", reproducible=self.reproducible)


class AnyOrderUnsaid(AnyOrder):
    """Promises the same bits at every call."""

    reproducible = True


class UnsaturatedKernel(Kernel):
    """Casts without clamping: what is beyond the largest code becomes 0xFF, which is also the poison."""

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        made = super().run(inputs, op=op, strategy=strategy)
        if made.norm is None or made.quant is None:
            return made
        beyond = (made.norm.float() * inputs.scale.reciprocal()).abs() > 464
        made.quant.view(torch.uint8)[beyond] = 0xFF
        return made


class Unsaturated(Backend):
    kernel = UnsaturatedKernel


class HalfWrittenKernel(Kernel):
    """Leaves the second half of each row of the norm as it was allocated."""

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        made = super().run(inputs, op=op, strategy=strategy)
        norm = torch.empty_like(made.residual)
        if made.norm is not None:
            half = norm.shape[1] // 2
            norm[:, :half] = made.norm[:, :half]
        return replace(made, norm=norm if op.returns_norm else None)


class HalfWritten(Backend):
    kernel = HalfWrittenKernel


class ForgetfulKernel(Kernel):
    """Copies a view before the exchange and returns the residual as it was: Megatron-LM issue 5337."""

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        made = super().run(inputs, op=op, strategy=strategy)
        return made if inputs.partial.is_contiguous() else replace(made, residual=inputs.residual.clone())


class Forgetful(Backend):
    kernel = ForgetfulKernel


class OtherExchangeKernel(Kernel):
    """Two-shot adds the residual of row 0 to every row."""

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        if strategy is Strategy.TWOSHOT:
            inputs = replace(inputs, residual=inputs.residual[:1].expand_as(inputs.residual).contiguous())
        return super().run(inputs, op=op, strategy=strategy)


class OtherExchange(Backend):
    kernel = OtherExchangeKernel


class EverySecondKernel(Kernel):
    """Every second call is off by one bit in one element."""

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        made = super().run(inputs, op=op, strategy=strategy)
        bits: Tensor = made.residual.view(torch.int16)
        bits[0, 0] ^= self.calls % 2
        return made


class EverySecond(Backend):
    kernel = EverySecondKernel


class NativeSumsKernel(AnyOrderKernel):
    """Adds up in bf16, in rank order."""

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        self.calls = -1
        return super().run(inputs, op=op, strategy=strategy)


class NativeSums(Backend):
    """Promises float32 sums."""

    kernel = NativeSumsKernel
