"""Faults of the launcher and of the call as a whole. Each overrides one hook of `EmulatedKernel` or `Arithmetic`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fusecheck.backends.emulated import EmulatedKernel
from fusecheck.backends.emulated_arithmetic import Arithmetic, Row
from fusecheck.backends.unfused import UnfusedKernel
from fusecheck.interface import FusionOp, RankInputs, RankOutputs, Strategy

WRAP = 2**16
"""KA-23: elements after which an offset wraps; 2^31 in the original."""

LAUNCH_HIDDEN = 8192
"""LW-10: hidden sizes from which the launch fails; 16384 in the original."""


class SignalsBeforeStore(EmulatedKernel):
    """KP-04: completion is signalled before the outputs are stored, and the consumer does not wait for more."""

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        """Return on the signal; the stores follow."""
        self.check(inputs, strategy)
        partial, residual = self.dense(inputs.partial), self.dense(inputs.residual)
        outputs = self.allocate(partial, op)
        row = self.arithmetic.prepare(inputs)
        summed = [(rows, total.clone()) for rows, total in self.exchange(partial, strategy)]
        blocks = [(total, residual[rows], self.block(outputs, rows)) for rows, total in summed]

        def store() -> None:
            time.sleep(0.003)
            for total, addend, block in blocks:
                self.arithmetic.epilogue(total, addend, row, block)

        threading.Thread(target=store, daemon=True).start()
        return outputs


class SharesSlots(EmulatedKernel):
    """KP-18: the same operation on two streams, with one set of signal slots."""

    def exchange(self, partial: Tensor, strategy: Strategy) -> Iterator[tuple[slice, Tensor]]:
        """Run the two halves of the rows at the same time."""
        half = partial.shape[0] // 2
        if not half:
            yield from super().exchange(partial, strategy)
            return
        list(super().exchange(partial[:1], strategy))  # makes the slots, before there are two threads

        def stream(part: slice) -> list[tuple[slice, Tensor]]:
            offset = part.start
            blocks = EmulatedKernel.exchange(self, partial[part], strategy)
            return [(slice(rows.start + offset, rows.stop + offset), total.clone()) for rows, total in blocks]

        with ThreadPoolExecutor(2) as streams:
            for blocks in streams.map(stream, (slice(0, half), slice(half, partial.shape[0]))):
                yield from blocks


class WrapsOffsets(EmulatedKernel):
    """KA-23: offsets into the inputs are computed in too few bits."""

    def dense(self, tensor: Tensor) -> Tensor:
        """Read element i at i mod 2^16."""
        flat = super().dense(tensor).view(-1)
        if flat.numel() <= WRAP:
            return flat.view(tensor.shape)
        return flat[torch.arange(flat.numel()) % WRAP].view(tensor.shape)


class IgnoresStrides(EmulatedKernel):
    """KA-24: a view with strides is read as if its rows were dense."""

    def dense(self, tensor: Tensor) -> Tensor:
        """Read from the right start, without the strides."""
        return torch.as_strided(tensor, tensor.shape, (tensor.shape[1], 1)).clone()


class IgnoresOffset(EmulatedKernel):
    """KA-24: a view that starts inside its storage is read from the storage's start."""

    def dense(self, tensor: Tensor) -> Tensor:
        """Read from offset 0."""
        return torch.as_strided(tensor, tensor.shape, (tensor.shape[1], 1), 0).clone()


class EmptyEpilogue(Arithmetic):
    """LW-01: the kernel's body was compiled empty for this architecture; it launches and does nothing."""

    def epilogue(self, total: Tensor, residual: Tensor, row: Row, outputs: RankOutputs) -> None:
        """Write nothing."""
        del total, residual, row, outputs


class FailsToLaunch(Arithmetic):
    """LW-10: a launch beyond the limit of registers or shared memory fails, and nobody asks."""

    def epilogue(self, total: Tensor, residual: Tensor, row: Row, outputs: RankOutputs) -> None:
        """Write nothing where hidden is large."""
        if total.shape[1] < LAUNCH_HIDDEN:
            super().epilogue(total, residual, row, outputs)


class FusionOff(EmulatedKernel):
    """LW-08: a threshold uses the wrong extent, the fused path is never taken, and the separate ops run instead."""

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        """Call the separate ops."""
        return UnfusedKernel(self.rank).run(inputs, op=op, strategy=strategy)


class OneRowTooMany(EmulatedKernel):
    """LW-11: the quantised output is written for one row more than it has."""

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        """Write on behind the end, as far as there is memory."""
        outputs = super().run(inputs, op=op, strategy=strategy)
        if outputs.quant is not None:
            codes = outputs.quant.view(torch.uint8)
            end = codes.storage_offset() + codes.numel()
            room = min(codes.shape[1], codes.untyped_storage().nbytes() - end)
            torch.as_strided(codes, (room,), (1,), end).zero_()
        return outputs


class WarmUpReturnsEmpty(EmulatedKernel):
    """LW-13: the first call, taken for a warm-up, returns empty outputs and does not reduce."""

    warm = False

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        """Allocate only, once."""
        if not self.warm:
            self.warm = True
            return self.allocate(self.dense(inputs.partial), op)
        return super().run(inputs, op=op, strategy=strategy)
