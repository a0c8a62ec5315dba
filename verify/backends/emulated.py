"""The fused kernel on the CPU: the real protocol between real processes, any declared arithmetic.

`emulated` stands in for TensorRT-LLM's fused kernel, `emulated:flashinfer-fp32` and
the like for the kernel whose dataflow has that name. Exchange and arithmetic are two
objects (`emulated_protocol`, `emulated_arithmetic`) that can be replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusecheck.backends.emulated_arithmetic import Arithmetic, Row
from fusecheck.backends.emulated_protocol import ONESHOT_BYTES, Exchange, Lamport, TwoShot, row_blocks
from fusecheck.backends.emulated_quantise import Quantising
from fusecheck.dataflow import Dataflow, dataflow
from fusecheck.interface import Kernel, Limits, Operation, Rank, RankInputs, RankOutputs, Strategy, Support
from fusecheck.operations import COMPOSITIONS, GIVEN_SCALE, WORLD_SIZES, Collective
from fusecheck.quantisers.known import quantiser

if TYPE_CHECKING:
    from fusecheck.problem import Problem

ONESHOT_TOKENS = 128
"""AUTO goes one-shot up to this many tokens (TensorRT-LLM's `kOneShotMaxToken`)."""

LANES = 8
MAX_HIDDEN = 65536
MAX_HIDDEN_ODD = 8192
"""With an odd hidden / 8 no cluster of blocks divides a row, and one block takes 1024 accesses."""

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
ITEM_BYTES = 2

ArithmeticFactory = Callable[[Dataflow, int, int], Arithmetic]
ExchangeFactory = Callable[[Rank, Limits], Exchange]


def oneshot_fits(tokens: int, hidden: int, world_size: int) -> bool:
    """Whether all ranks' rows fit one rotating third of the Lamport buffer."""
    return tokens * hidden * world_size * ITEM_BYTES <= ONESHOT_BYTES


def choose(strategy: Strategy, tokens: int, hidden: int, world_size: int, flow: Dataflow) -> Strategy:
    """Resolve AUTO: one-shot up to 128 tokens where it fits and may lose the sign of zero, else two-shot."""
    if strategy is not Strategy.AUTO:
        return strategy
    small = tokens <= ONESHOT_TOKENS and oneshot_fits(tokens, hidden, world_size)
    return Strategy.ONESHOT if small and flow.zero_sign == "any" else Strategy.TWOSHOT


def refusal(tokens: int, hidden: int, world_size: int, eps: float, strategy: Strategy, flow: Dataflow) -> str:
    """Say in one clause why a call is refused; empty where it is taken."""
    oneshot = strategy is Strategy.ONESHOT
    reasons = {
        f"world_size={world_size} is not one of {WORLD_SIZES}": world_size not in WORLD_SIZES,
        f"tokens={tokens} is less than 1": tokens < 1,
        f"hidden={hidden} is not a positive multiple of {LANES}": hidden < LANES or hidden % LANES != 0,
        f"hidden={hidden} is above {MAX_HIDDEN}": hidden > MAX_HIDDEN,
        f"hidden/8={hidden // LANES} is odd and hidden={hidden} above {MAX_HIDDEN_ODD}": hidden > MAX_HIDDEN_ODD
        and hidden // LANES % 2 == 1,
        f"eps={eps} is not a finite number of at least 0": not (math.isfinite(eps) and eps >= 0),
        f"one-shot takes {ONESHOT_BYTES >> 20} MiB a rotating buffer, and tokens x hidden x world_size = "
        f"{tokens} x {hidden} x {world_size} needs more": oneshot and not oneshot_fits(tokens, hidden, world_size),
        "the one-shot sentinel loses the sign of zero, which the dataflow keeps": oneshot and flow.zero_sign == "kept",
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


class EmulatedBackend:
    """Backend `emulated` (TensorRT-LLM's default arithmetic) or `emulated:<dataflow>`."""

    operations = COMPOSITIONS
    mixes_dtypes = True
    """Calls in bf16 and fp16 may share a workspace; where a backend does not say so, tests keep to one dtype."""

    def __init__(
        self,
        dataflow_name: str = "trtllm",
        *,
        arithmetic: ArithmeticFactory = Arithmetic,
        oneshot: ExchangeFactory = Lamport,
        twoshot: ExchangeFactory = TwoShot,
        quantising: type[Quantising] = Quantising,
        flow: Dataflow | None = None,
    ) -> None:
        """Choose the arithmetic by a dataflow's name, or by `flow` itself; the rest is for faults.

        Raises:
            UsageError: no dataflow has this name.
        """
        self.flow = flow or replace(dataflow(dataflow_name), invariant_below=0)
        self.name = "emulated" if self.flow.name == "trtllm" else f"emulated:{self.flow.name}"
        self.arithmetic, self.oneshot, self.twoshot, self.quantising = arithmetic, oneshot, twoshot, quantising

    def supports(self, problem: Problem) -> Support:
        """Take what the fused kernels take; see `refusal`."""
        if problem.dtype not in DTYPES.values():
            return Support(ok=False, reason=f"dtype={problem.dtype} is neither bf16 nor fp16")
        strategy = problem.strategy
        reason = refusal(problem.tokens, problem.hidden, problem.world_size, problem.eps, strategy, self.flow)
        if not reason and not self.flow.declares(problem.op.quantiser):
            reason = f"dataflow {self.flow.name} declares no quantiser {problem.op.quantiser}"
        return Support(ok=not reason, reason=reason)

    def dataflow(self, problem: Problem) -> Dataflow:
        """The dataflow that it was made for, whatever the Problem."""
        del problem
        return self.flow

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        """Make a workspace; shared memory is mapped by the first call of each strategy.

        Raises:
            ValueError: a device other than the CPU, or limits that no call could meet.
        """
        if rank.device.type != "cpu":
            raise ValueError(f"device {rank.device}, expected the CPU: the emulated kernel exchanges in host memory")
        if limits.dtype not in DTYPES:
            raise ValueError(f"dtype {limits.dtype}, expected torch.bfloat16 or torch.float16")
        if reason := refusal(limits.max_tokens, limits.hidden, rank.world_size, 0.0, Strategy.AUTO, self.flow):
            raise ValueError(reason)
        return EmulatedKernel(self, rank, limits)


class EmulatedKernel:
    """An open workspace of the emulated kernel on one rank."""

    def __init__(self, backend: EmulatedBackend, rank: Rank, limits: Limits) -> None:
        self.rank, self.limits, self.flow = rank, limits, backend.flow
        self.arithmetic = backend.arithmetic(backend.flow, rank.index, rank.world_size)
        self._factories = {Strategy.ONESHOT: backend.oneshot, Strategy.TWOSHOT: backend.twoshot}
        self._make_quantising = backend.quantising
        self._exchanges: dict[Strategy, Exchange] = {}
        self._make_quantising = backend.quantising

    def run(self, inputs: RankInputs, *, op: Operation, strategy: Strategy) -> RankOutputs:
        """Exchange, then the epilogue block by block; a collective call.

        Raises:
            ValueError: an operand of a wrong shape, dtype or device, or a call that `supports` refuses.
        """
        self.check(inputs, strategy)
        if op.has_experts:
            assert inputs.experts is not None
            inputs = replace(inputs, partial=self.arithmetic.sum_experts(inputs.experts))
        partial, residual = self.dense(inputs.partial), self.dense(inputs.residual)
        outputs = self.allocate(partial, op)
        row = replace(self.arithmetic.prepare(inputs), op=op)
        if op.quantiser not in ("none", GIVEN_SCALE):
            return self._quantising(inputs, strategy, row)
        for rows, total in self.totals(partial, op, strategy):
            self.arithmetic.epilogue(total, residual[rows], row, self.block(outputs, rows))
        return outputs

    def _quantising(self, inputs: RankInputs, strategy: Strategy, row: Row) -> RankOutputs:
        """The same with scales: made [rows, groups] and with one code a byte, and laid out when all are there."""
        op, partial, residual = row.op, self.dense(inputs.partial), self.dense(inputs.residual)
        quantising = self._make_quantising(
            quantiser(op.quantiser), self.flow.quant(op.quantiser), inputs.scale, partial.dtype, inputs.layout
        )
        scales, codes = quantising.allocate(*partial.shape)
        flat = replace(self.allocate(partial, op), quant=codes, scale=scales)
        for rows, total in self.totals(partial, op, strategy):
            self.arithmetic.epilogue(total, residual[rows], replace(row, quantising=quantising), self.block(flat, rows))
        return replace(flat, quant=quantising.pack(codes), scale=quantising.lay_out(scales, partial.shape[1]))

    def totals(self, partial: Tensor, op: Operation, strategy: Strategy) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows with their sums over ranks: of this rank alone where there is no collective."""
        if op.collective is not Collective.NONE:
            return self.exchange(partial, strategy)
        return ((rows, partial[rows]) for rows in row_blocks(0, *partial.shape))

    def exchange(self, partial: Tensor, strategy: Strategy) -> Iterator[tuple[slice, Tensor]]:
        """Run the protocol that the strategy asks for, and yield blocks of rows with their sums."""
        tokens, hidden = partial.shape
        chosen = choose(strategy, tokens, hidden, self.rank.world_size, self.flow)
        if chosen not in self._exchanges:
            self._exchanges[chosen] = self._factories[chosen](self.rank, self.limits)
        sum_dtype = self.arithmetic.sum_dtype(partial.dtype)
        return self._exchanges[chosen].sums(partial, self.arithmetic.total, sum_dtype)

    def dense(self, tensor: Tensor) -> Tensor:
        """The same values in row-major order without gaps; views with strides or offsets are copied."""
        return tensor.contiguous()

    def allocate(self, partial: Tensor, op: Operation) -> RankOutputs:
        """Make the outputs that the op returns, uninitialised; codes in E4M3."""
        return RankOutputs(
            residual=torch.empty_like(partial) if "residual" in op.returns else None,
            norm=torch.empty_like(partial) if op.returns_norm else None,
            quant=torch.empty_like(partial, dtype=torch.float8_e4m3fn) if op.quantiser == GIVEN_SCALE else None,
            total=torch.empty_like(partial) if "total" in op.returns else None,
        )

    def block(self, outputs: RankOutputs, rows: slice) -> RankOutputs:
        """The part of the outputs that these rows fill."""
        there = {field.name: getattr(outputs, field.name) for field in fields(outputs)}
        return RankOutputs(**{name: None if tensor is None else tensor[rows] for name, tensor in there.items()})

    def check(self, inputs: RankInputs, strategy: Strategy) -> None:
        """Refuse operands that would be misread.

        Raises:
            ValueError: what was got and what was expected, in one line.
        """
        partial = inputs.partial
        if partial.dim() != 2:
            raise ValueError(f"partial has {partial.dim()} dimensions, expected [tokens, hidden]")
        if partial.dtype not in DTYPES:
            raise ValueError(f"partial is {partial.dtype}, expected torch.bfloat16 or torch.float16")
        tokens, hidden = partial.shape
        _expect("residual", inputs.residual, (tokens, hidden), partial.dtype)
        _expect("gamma", inputs.gamma, (hidden,), partial.dtype)
        _expect("scale", inputs.scale, (1,), torch.float32)
        for name in ("partial", "residual", "gamma", "scale"):
            device = getattr(inputs, name).device
            if device.type != "cpu":
                raise ValueError(f"{name} is on {device}, expected the CPU")
        if not math.isfinite(inputs.weight_bias):
            raise ValueError(f"weight_bias={inputs.weight_bias} is not a finite number")
        reason = refusal(tokens, hidden, self.rank.world_size, inputs.eps, strategy, self.flow)
        if not reason and (tokens > self.limits.max_tokens or hidden > self.limits.hidden):
            limits = f"{self.limits.max_tokens} x {self.limits.hidden}"
            reason = f"tokens x hidden = {tokens} x {hidden} exceeds the workspace's {limits}"
        if reason:
            raise ValueError(reason)

    def close(self) -> None:
        """Give the shared memory back for the next workspace."""
        for exchange in self._exchanges.values():
            exchange.close()
        self._exchanges.clear()


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}, expected {dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
