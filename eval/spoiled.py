"""Bugs planted around any right backend, on any device: `fusecheck.eval.spoiled:KIND__BACKEND`.

`--backend fusecheck.eval.spoiled:row_in_32__flashinfer__fp32` is FlashInfer's kernel with float32 sums, of which every
32nd row gets another scale; a colon in the backend's name is written `__` here. The kinds of `fusecheck.eval.planted`
change the emulator's arithmetic from within; these change what goes into a kernel and what comes out of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fusecheck.backends import backend
from fusecheck.backends.unfused import quantise, rms_norm
from fusecheck.dataflow import Dataflow, dataflow
from fusecheck.errors import UsageError
from fusecheck.eval.checkpoint import Checkpoint
from fusecheck.eval.collective import sum_over_ranks
from fusecheck.eval.linear import Linear
from fusecheck.eval.paths import Feed, KernelPath, choose_op
from fusecheck.eval.stored_scales import read_scales, store_scales
from fusecheck.interface import Backend, Kernel, Limits, Operation, Rank, RankInputs, RankOutputs, Strategy, Support
from fusecheck.operations import GIVEN_SCALE
from fusecheck.problem import Problem
from fusecheck.quantisers.group_fp8 import group_fp8


class Spoiled:
    """A kernel that hands on to a right one, and is right itself.

    Args:
        kernel: the right one.
        rank: where it runs.
    """

    title = "a wrapper that changes nothing"
    right = True
    quantisers: tuple[str, ...] = ()
    """Where it shows; empty: with every one."""

    @classmethod
    def unseen_in(cls, checkpoint: Checkpoint) -> str:
        """Why the bug would change nothing in this model; empty where it can show."""
        del checkpoint
        return ""

    def __init__(self, kernel: Kernel, rank: Rank) -> None:
        self._kernel, self._rank = kernel, rank

    def before(self, inputs: RankInputs) -> RankInputs:
        """What the right kernel gets."""
        return inputs

    def after(self, outputs: RankOutputs, inputs: RankInputs, op: Operation) -> RankOutputs:
        """What comes of its outputs; `inputs` are the caller's."""
        del inputs, op
        return outputs

    def run(self, inputs: RankInputs, *, op: Operation, strategy: Strategy) -> RankOutputs:
        """Run the right kernel between the two."""
        return self.after(self._kernel.run(self.before(inputs), op=op, strategy=strategy), inputs, op)

    def close(self) -> None:
        """Close the right kernel."""
        self._kernel.close()


class RowIn32(Spoiled):
    """Every 32nd row's codes are those of twice the scale, as if it had taken a neighbour's."""

    title = "1 row in 32 with another scale"
    right = False

    def after(self, outputs: RankOutputs, inputs: RankInputs, op: Operation) -> RankOutputs:
        """Quantise these rows again."""
        if outputs.quant is None:
            return outputs
        codes = outputs.quant.clone()
        codes[31::32] = (codes[31::32].float() / 2).to(codes.dtype)
        return replace(outputs, quant=codes)


class ScaleTimes2(Spoiled):
    """The codes are those of twice the scale, while the reader multiplies by the true one."""

    title = "scale times 2"
    right = False
    quantisers = (GIVEN_SCALE,)

    def before(self, inputs: RankInputs) -> RankInputs:
        """Give twice the scale."""
        return replace(inputs, scale=inputs.scale * 2)


class ScaleToPowerOfTwo(Spoiled):
    """The scale is rounded down to a power of two; codes saturate."""

    title = "scale rounded down to a power of two"
    right = False
    quantisers = (GIVEN_SCALE,)

    def before(self, inputs: RankInputs) -> RankInputs:
        """Round the scale."""
        return replace(inputs, scale=torch.exp2(torch.floor(torch.log2(inputs.scale))))


class _StoredScales(Spoiled):
    """The scales that the kernel made are stored in the wrong place."""

    right = False

    def moved(self, scales: Tensor) -> Tensor:
        """The scales as they are stored, [tokens, groups]."""
        return scales

    def after(self, outputs: RankOutputs, inputs: RankInputs, op: Operation) -> RankOutputs:
        """Store them anew."""
        if outputs.scale is None:
            return outputs
        moved = self.moved(read_scales(op, outputs))
        return replace(outputs, scale=store_scales(op, moved, outputs.residual.shape[1]))


class TokenNeighbour(_StoredScales):
    """Each row stores the scale of the row before it."""

    title = "each token's scale is its neighbour's"
    quantisers = ("dynamic-fp8",)

    def moved(self, scales: Tensor) -> Tensor:
        """Move by a row."""
        return scales.roll(1, 0)


class GroupShifted(_StoredScales):
    """Each group stores the scale of the one before it."""

    title = "scales shifted by one group"
    quantisers = ("group-fp8", "group-fp8-packed")

    def moved(self, scales: Tensor) -> Tensor:
        """Move by a group."""
        return scales.roll(1, 1)


class PowersLate(Spoiled):
    """The codes are made with the scale before it is rounded to a power of two; the rounded one is stored."""

    title = "scale rounded to a power of two after quantising"
    right = False
    quantisers = ("group-fp8-packed",)

    def after(self, outputs: RankOutputs, inputs: RankInputs, op: Operation) -> RankOutputs:
        """Quantise again."""
        if outputs.quant is None:
            return outputs
        norm = rms_norm(outputs.residual, inputs.gamma, inputs.eps, inputs.weight_bias)
        made, rules = group_fp8(), dataflow("unfused/vllm").quant("group-fp8")
        return replace(outputs, quant=made.codes(norm, made.scales(norm, rules), rules).view(outputs.quant.dtype))


class Eps(Spoiled):
    """The norm adds an eps of its own."""

    title = "eps 1e-3"
    right = False

    def before(self, inputs: RankInputs) -> RankInputs:
        """Ignore the caller's."""
        return replace(inputs, eps=1e-3)


class SumInBf16(Spoiled):
    """The ranks' sum is rounded to the activations' dtype after each addition; from three ranks on it shows."""

    title = "sum over ranks in bf16"
    right = False

    def before(self, inputs: RankInputs) -> RankInputs:
        """Add up beforehand, and let rank 0 alone bring the sum."""
        total = sum_over_ranks(inputs.partial.clone(), self._rank)
        return replace(inputs, partial=total if self._rank.index == 0 else torch.zeros_like(total))


class SumInFp8(Spoiled):
    """Each rank's addend passes the exchange as E4M3, unscaled."""

    title = "addends exchanged as E4M3, unscaled"
    right = False

    def before(self, inputs: RankInputs) -> RankInputs:
        """Round the addend."""
        narrow = quantise(inputs.partial, torch.ones(1, device=inputs.partial.device))
        return replace(inputs, partial=narrow.to(inputs.partial.dtype))


SHARING = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Linears that read a norm."""


class FirstScale(Spoiled):
    """A right kernel in a graph that gives every reader of a norm the first one's codes."""

    title = "first consumer's scale for all"
    right = False
    quantisers = (GIVEN_SCALE,)

    @classmethod
    def unseen_in(cls, checkpoint: Checkpoint) -> str:
        """Calibration gives linears that read the same activations the same scale."""
        scales: dict[str, set[float]] = {}
        for module, _, _ in checkpoint.linears():
            scales.setdefault(module.rpartition(".")[0], set())
            if module.rpartition(".")[2] in SHARING:
                scales[module.rpartition(".")[0]].add(checkpoint.input_scale(module))
        differ = any(len(found) > 1 for found in scales.values())
        return "" if differ else "the linears behind each norm have one scale"


class FirstScalePath(KernelPath):
    """The graph gives every reader of a norm the first one's codes, though a reader has another scale."""

    def choose_op(self, readers: Sequence[Linear]) -> Operation:
        """Never ask for the norm beside codes."""
        op = choose_op(readers)
        return op if op is Operation.RESIDUAL_RMS_NORM else Operation.RESIDUAL_RMS_NORM_QUANT_FP8

    def read(self, feed: Feed, linear: Linear) -> Tensor:
        """Take the codes whatever their scale."""
        if feed.codes is None or linear.key is None or linear.input_scale is None:
            return super().read(feed, linear)
        return super().read(replace(feed, codes=replace(feed.codes, scales=linear.input_scale, key=linear.key)), linear)


KINDS: dict[str, type[Spoiled]] = {
    "nothing": Spoiled,
    "first_scale": FirstScale,
    "row_in_32": RowIn32,
    "scale_times_2": ScaleTimes2,
    "scale_power_of_two": ScaleToPowerOfTwo,
    "token_neighbour": TokenNeighbour,
    "group_shifted": GroupShifted,
    "powers_late": PowersLate,
    "eps_1e3": Eps,
    "sums_in_bf16": SumInBf16,
    "sums_in_fp8": SumInFp8,
}


class SpoiledBackend:
    """A backend with a bug around it. It declares what the right one declares.

    Attributes:
        path: how the model uses the kernel; another than the usual where the bug is the graph's.
        device: the right one's, where it has one.
    """

    def __init__(self, kind: str, name: str) -> None:
        if kind not in KINDS:
            raise UsageError(f"spoiled kind {kind!r}, expected one of: {', '.join(KINDS)}")
        self.kind, self._right = KINDS[kind], backend(name)
        self.name = f"{kind} around {self._right.name}"
        self.path = FirstScalePath if self.kind is FirstScale else KernelPath
        self.device: str | None = getattr(self._right, "device", None)

    def supports(self, problem: Problem) -> Support:
        """As the right one, where the bug shows."""
        if self.kind.quantisers and problem.op.quantiser not in self.kind.quantisers:
            wanted = " or ".join(self.kind.quantisers)
            return Support(ok=False, reason=f"the bug needs {wanted}, not {problem.op.quantiser}: nothing would change")
        return self._right.supports(problem)

    def unseen_in(self, checkpoint: Checkpoint) -> str:
        """Why the bug would change nothing in this model; empty where it can show."""
        return self.kind.unseen_in(checkpoint)

    def dataflow(self, problem: Problem) -> Dataflow:
        """As the right one."""
        return self._right.dataflow(problem)

    def open(self, rank: Rank, limits: Limits) -> Kernel:
        """Open the right one, and put the bug around it."""
        return self.kind(self._right.open(rank, limits), rank)


def __getattr__(name: str) -> Backend:
    """The backend `KIND__BACKEND`, with `__` for a colon in the backend's own name."""
    kind, _, right = name.partition("__")
    if name.startswith("_") or not right:
        raise AttributeError(name)
    head, _, variant = right.partition("__")
    return SpoiledBackend(kind, f"{head}:{variant}" if variant else head)
