"""The unfused path from partial sums to codes: NCCL, add and norm in one kernel, the quantiser in another."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fusecheck.interface import Operation, Rank, RankInputs
from fusecheck.onepass.operands import power_of_two
from fusecheck.operations import GIVEN_SCALE
from fusecheck.quantflow import QuantFlow
from fusecheck.quantisers.known import quantiser

SPAN = 2048
"""Elements of one program of the quantisers that do not need a whole row."""


class Unfused:
    """The path of one measurement; outputs are reused.

    Args:
        rank: whose process group sums.
        inputs: the operands.
        op: what is fused otherwise; its quantiser is one of `takes`.
    """

    def __init__(self, rank: Rank, inputs: RankInputs, op: Operation) -> None:
        self._rank, self._inputs = rank, inputs
        self._summed = inputs.partial.clone()
        self._stream, self._normed = torch.empty_like(self._summed), torch.empty_like(self._summed)
        self.quantise = Quantise(op.quantiser, inputs)

    def all(self) -> None:
        """The whole path; the all-reduce is in place, as engines run it, so its values grow to infinity."""
        from fusecheck.latency import kernels

        inputs, (tokens, hidden) = self._inputs, self._summed.shape
        dist.all_reduce(self._summed, group=self._rank.group)
        block = power_of_two(hidden)
        kernels.add_rms_norm[(tokens,)](
            self._summed, inputs.residual, inputs.gamma, self._normed, self._stream, hidden, inputs.eps,
            BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
        self.quantise(self._normed)


class Quantise:
    """The quantiser alone, a kernel of its own.

    Args:
        name: of the quantiser, one of `takes`.
        inputs: whose shape, scale and layout are taken.

    Attributes:
        codes: float8_e4m3fn, [tokens, hidden].
        scale: as the quantiser's first layout stores it; the given one, where it is given.
    """

    def __init__(self, name: str, inputs: RankInputs) -> None:
        (self._tokens, self._hidden), device = inputs.partial.shape, inputs.partial.device
        self.codes = torch.empty(inputs.partial.shape, dtype=torch.float8_e4m3fn, device=device)
        self._run, self.scale = self._given, inputs.scale
        if name != GIVEN_SCALE:
            made = quantiser(name)
            self._layout = made.layout(self._tokens, self._hidden, QuantFlow())
            self._group = made.group or self._hidden
            self._run, self.scale = self._rows if made.group is None else self._groups, self._layout.allocate(0, device)

    @staticmethod
    def takes(name: str) -> bool:
        """Whether there is a kernel for the quantiser of this name: E4M3, a scale given, a row's, or UE8M0 of 2^n."""
        if name in (GIVEN_SCALE, "dynamic-fp8", "mxfp8"):
            return True
        group = quantiser(name).group if name.startswith("group-fp8-packed") else None
        return group is not None and group & (group - 1) == 0

    def __call__(self, normed: Tensor) -> None:
        """Quantise [tokens, hidden] of the activations' dtype."""
        self._run(normed)

    def _given(self, normed: Tensor) -> None:
        from fusecheck.latency import kernels

        count = normed.numel()
        kernels.quantise_given[(-(-count // SPAN),)](normed, self.scale, self.codes, count, BLOCK=SPAN)

    def _rows(self, normed: Tensor) -> None:
        from fusecheck.latency import kernels

        block = power_of_two(self._hidden)
        grid = (self._tokens,)
        kernels.quantise_rows[grid](normed, self.scale, self.codes, self._hidden, BLOCK=block, num_warps=_warps(block))

    def _groups(self, normed: Tensor) -> None:
        from fusecheck.latency import kernels

        groups, tiled = max(1, SPAN // self._group), self._layout.name == "128x4"
        padded = -(-(self._layout.columns if tiled else self._tokens) // 4) * 4
        grid = (self._tokens, -(-self._layout.columns // groups))
        kernels.quantise_groups[grid](
            normed, self._layout.slots(self.scale), self.codes, self._hidden, padded,
            GROUP=self._group, GROUPS=power_of_two(groups), TILED=tiled,
        )  # fmt: skip


def _warps(block: int) -> int:
    """Of a program that has a whole row of so many elements."""
    return max(4, min(16, block // 512))
