"""Kernels that keep what they declare, in words that few need; and faulty ones whose finding must name the fault.

All are the example's kernel but for one thing.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusecheck import Dataflow, FusionOp, Limits, Problem, Rank, RankInputs, RankOutputs, Strategy
from fusecheck.property_tests.suite.example_backend import ExampleBackend, ExampleKernel


class Kernel(ExampleKernel):
    """The example's kernel, with what its backend makes of each call."""

    def __init__(self, rank: Rank, backend: Backend) -> None:
        super().__init__(rank)
        self.backend, self.calls = backend, 0

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        self.calls += 1
        made: RankOutputs = self.backend.made(super().run(inputs, op=op, strategy=strategy), inputs, self)
        return made


class Backend(ExampleBackend):
    """The example's backend but for what it makes of a call, or for its kernel."""

    kernel: type[Kernel] = Kernel

    def __init__(self) -> None:
        self.name = f"honest-{type(self).__name__}"

    def open(self, rank: Rank, limits: Limits) -> ExampleKernel:
        return self.kernel(rank, self)

    def made(self, outputs: RankOutputs, inputs: RankInputs, kernel: Kernel) -> Any:
        """What a call returns instead of the right outputs."""
        return outputs


class InPlaceUnsaid(Backend):
    """Writes the residual stream over the residual and the norm over the partial sum, as `fused_add_rms_norm` does."""

    def made(self, outputs: RankOutputs, inputs: RankInputs, kernel: Kernel) -> RankOutputs:
        inputs.residual.copy_(outputs.residual)
        if outputs.norm is not None:
            inputs.partial.copy_(outputs.norm)
            return replace(outputs, residual=inputs.residual, norm=inputs.partial)
        return replace(outputs, residual=inputs.residual)


class InPlace(InPlaceUnsaid):
    """Says so."""

    overwrites = ("residual", "partial")


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


class Unsaturated(Backend):
    """Casts without clamping: what is beyond the largest code becomes 0xFF, which is also the poison."""

    def made(self, outputs: RankOutputs, inputs: RankInputs, kernel: Kernel) -> RankOutputs:
        if outputs.norm is not None and outputs.quant is not None:
            beyond = (outputs.norm.float() * inputs.scale.reciprocal()).abs() > 464
            outputs.quant.view(torch.uint8)[beyond] = 0xFF
        return outputs


class HalfWritten(Backend):
    """Leaves the second half of each row of the norm as it was allocated."""

    def made(self, outputs: RankOutputs, inputs: RankInputs, kernel: Kernel) -> RankOutputs:
        if outputs.norm is None:
            return outputs
        norm, half = torch.empty_like(outputs.norm), outputs.norm.shape[1] // 2
        norm[:, :half] = outputs.norm[:, :half]
        return replace(outputs, norm=norm)


class Forgetful(Backend):
    """Copies a view before the exchange and returns the residual as it was: Megatron-LM issue 5337."""

    def made(self, outputs: RankOutputs, inputs: RankInputs, kernel: Kernel) -> RankOutputs:
        return outputs if inputs.partial.is_contiguous() else replace(outputs, residual=inputs.residual.clone())


class OtherExchangeKernel(Kernel):
    """Two-shot adds the residual of row 0 to every row."""

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        if strategy is Strategy.TWOSHOT:
            inputs = replace(inputs, residual=inputs.residual[:1].expand_as(inputs.residual).contiguous())
        return super().run(inputs, op=op, strategy=strategy)


class OtherExchange(Backend):
    kernel = OtherExchangeKernel


class EverySecond(Backend):
    """Every second call is off by one bit in one element."""

    def made(self, outputs: RankOutputs, inputs: RankInputs, kernel: Kernel) -> RankOutputs:
        bits: Tensor = outputs.residual.view(torch.int16)
        bits[0, 0] ^= kernel.calls % 2
        return outputs


class NativeSumsKernel(AnyOrderKernel):
    """Adds up in bf16, in rank order."""

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        self.calls = -1
        return super().run(inputs, op=op, strategy=strategy)


class NativeSums(Backend):
    """Promises float32 sums."""

    kernel = NativeSumsKernel
