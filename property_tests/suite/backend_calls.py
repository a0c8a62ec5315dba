"""Calls of a backend in rank processes, and a second opinion on what they should return.

The opinion is numpy in float64, rounded by `frexp` and a table: it shares nothing with
the backends or the oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusecheck.backends import backend
from fusecheck.backends.emulated import EmulatedBackend, EmulatedKernel
from fusecheck.backends.emulated_protocol import Lamport
from fusecheck.interface import FusionOp, Limits, Rank, RankInputs, RankOutputs, Strategy
from fusecheck.property_tests.suite.lone_rank import LoneRank

Floats = NDArray[np.float64]
Outputs = dict[str, NDArray[np.uint8]]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISION = {"bf16": 8, "fp16": 11}
LEAST_EXPONENT = {"bf16": -126, "fp16": -14}


@dataclass(frozen=True)
class Call:
    """One call: shapes, seed, and `bits`, which replaces all partial sums by one bit pattern."""

    tokens: int
    hidden: int = 64
    op: FusionOp = FusionOp.RESIDUAL_RMS_NORM_OUT_QUANT_FP8
    strategy: Strategy = Strategy.AUTO
    dtype: str = "bf16"
    seed: int = 0
    scale: float = 0.0123
    weight_bias: float = 0.0
    bits: int | None = None

    def partials(self, world_size: int) -> list[Tensor]:
        """Every rank's partial sums, [tokens, hidden] each."""
        dtype, shape = DTYPES[self.dtype], (self.tokens, self.hidden)
        if self.bits is not None:
            signed = self.bits - (1 << 16) * (self.bits >> 15)
            return [torch.full(shape, signed, dtype=torch.int16).view(dtype) for _ in range(world_size)]
        generator = torch.Generator().manual_seed(self.seed)
        return [torch.randn(shape, generator=generator).to(dtype) for _ in range(world_size)]

    def inputs(self, index: int, world_size: int, device: str | torch.device = "cpu") -> RankInputs:
        """One rank's operands."""
        dtype = DTYPES[self.dtype]
        generator = torch.Generator().manual_seed(self.seed + 1)
        residual = torch.randn((self.tokens, self.hidden), generator=generator).to(dtype)
        gamma = (torch.rand(self.hidden, generator=generator) + 0.5).to(dtype)
        if self.bits is not None:
            residual.zero_()
        scale = torch.tensor([self.scale])
        partial = self.partials(world_size)[index].to(device)
        residual, gamma, scale = residual.to(device), gamma.to(device), scale.to(device)
        return RankInputs(partial, residual, gamma, scale, 1e-5, self.weight_bias)


class BackendCalls:
    """Worker: opens a backend and makes calls; returns the outputs' bytes."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank

    def run(self, name: str, calls: Sequence[Call], reopen_every: int = 0) -> list[Outputs]:
        """Make the calls on one workspace, which is closed and opened again every so many calls."""
        chosen = backend(name)
        limits = Limits(max(c.tokens for c in calls), max(c.hidden for c in calls), torch.bfloat16)
        kernel = chosen.open(self.rank, limits)
        returned = []
        for number, call in enumerate(calls):
            if reopen_every and number and number % reopen_every == 0:
                kernel.close()
                kernel = chosen.open(self.rank, limits)
            inputs = call.inputs(self.rank.index, self.rank.world_size, self.rank.device)
            returned.append(as_bytes(kernel.run(inputs, op=call.op, strategy=call.strategy)))
        kernel.close()
        return returned

    def interleave(self, name: str, calls: Sequence[Call]) -> list[Outputs]:
        """Make the calls on two workspaces of one size in turn, both open all the time."""
        limits = Limits(max(c.tokens for c in calls), max(c.hidden for c in calls), torch.bfloat16)
        kernels = [backend(name).open(self.rank, limits) for _ in range(2)]
        returned = []
        for number, call in enumerate(calls):
            inputs = call.inputs(self.rank.index, self.rank.world_size, self.rank.device)
            returned.append(as_bytes(kernels[number % 2].run(inputs, op=call.op, strategy=call.strategy)))
        for kernel in kernels:
            kernel.close()
        return returned


class PublishingRaw(Lamport):
    """One-shot that forgets to make +0.0 of -0.0."""

    def canonicalise(self, bits: Tensor) -> Tensor:
        return bits


def raw_publisher() -> EmulatedBackend:
    """The emulator with that defect."""
    return EmulatedBackend("trtllm", oneshot=PublishingRaw)


def as_bytes(outputs: RankOutputs) -> Outputs:
    """Every output that is there, as the bytes of its rows."""
    named = {"residual": outputs.residual, "norm": outputs.norm, "quant": outputs.quant}
    return {name: t.contiguous().view(torch.uint8).cpu().numpy().copy() for name, t in named.items() if t is not None}


def floats(outputs: Outputs, name: str, dtype: str) -> Floats:
    """A native output as float64, [tokens, hidden]."""
    return torch.from_numpy(outputs[name]).view(DTYPES[dtype]).double().numpy()


def rounded(x: Floats, dtype: str) -> Floats:
    """Float64 to the nearest native value, ties to even; finite results only."""
    _, exponent = np.frexp(x)
    last = np.ldexp(1.0, np.maximum(exponent - 1, LEAST_EXPONENT[dtype]) - PRECISION[dtype] + 1)
    return np.asarray(np.rint(x / last) * last)


def float32(x: Floats) -> Floats:
    """Float64 to the nearest float32 and back."""
    return x.astype(np.float32).astype(np.float64)


def residual_in_rank_order(call: Call, world_size: int, *, accumulate: str) -> Floats:
    """residual_out when rank 0, 1, ... are added in this order or exactly and rounded before the residual."""
    total, *others = (partial.double().numpy() for partial in call.partials(world_size))
    for partial in others:
        kept = {"native": rounded(total + partial, call.dtype), "fp32": float32(total + partial)}
        total = kept.get(accumulate, total + partial)
    return rounded(
        rounded(float32(total), call.dtype) + call.inputs(0, world_size).residual.double().numpy(), call.dtype
    )


def normalised(read: Floats, call: Call) -> Floats:
    """The exact norm of what the norm reads, but for float64."""
    inputs = call.inputs(0, 1)
    root = 1 / np.sqrt(np.square(read).mean(-1, keepdims=True) + inputs.eps)
    return np.asarray(read * root * (inputs.gamma.double().numpy() + call.weight_bias))


def steps_apart(a: Floats, b: Floats, dtype: str) -> Floats:
    """|a - b| in units of the native spacing at b."""
    _, exponent = np.frexp(b)
    return np.asarray(
        np.abs(a - b) / np.ldexp(1.0, np.maximum(exponent - 1, LEAST_EXPONENT[dtype]) - PRECISION[dtype] + 1)
    )


def e4m3_codes(x: Floats) -> NDArray[np.uint8]:
    """The saturating cast of finite values: nearest code of the table, ties to the even one."""
    codes = np.arange(127)
    mantissa, exponent = codes & 7, codes >> 3
    table = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    middles = (table[1:] + table[:-1]) / 2
    below, above = np.searchsorted(middles, np.abs(x), "left"), np.searchsorted(middles, np.abs(x), "right")
    nearest = np.where(below % 2 == 0, below, above)
    return np.asarray(nearest + 128 * np.signbit(x)).astype(np.uint8)


def kernel(dataflow_name: str = "trtllm", tokens: int = 64, hidden: int = 256) -> EmulatedKernel:
    """A workspace for a group of one, in this process."""
    opened = EmulatedBackend(dataflow_name).open(LoneRank(world_size=1), Limits(tokens, hidden, torch.bfloat16))
    assert isinstance(opened, EmulatedKernel)
    return opened
