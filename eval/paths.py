"""The two ways through the model: with FP8 and a Backend between the layers, or wide, as the oracle goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusecheck.backends.unfused import rms_norm
from fusecheck.eval.collective import sum_over_ranks
from fusecheck.eval.linear import Codes, Linear
from fusecheck.eval.recipe import Form
from fusecheck.eval.trace_rank import WatchedKernel
from fusecheck.interface import Kernel, Rank, RankInputs, Strategy
from fusecheck.operations import Collective, Operation, compose


@dataclass(frozen=True)
class Norm:
    """A norm of the model: its weight [hidden], in the activations' dtype, and its eps."""

    gamma: Tensor
    eps: float


@dataclass(frozen=True)
class Feed:
    """What a norm hands to its readers: the normed activations, their codes, or both.

    Attributes:
        norm: [tokens, hidden], or None where every reader takes the codes.
        codes: of the normed activations, or None.
    """

    norm: Tensor | None
    codes: Codes | None = None


Tap = Callable[[RankInputs], None]
"""Sees the inputs of every call of the kernel, in order."""


class KernelPath:
    """FP8 linears, and a Backend's kernel for AllReduce + residual + RMSNorm + quantise.

    Attributes:
        calls: calls of the kernel on this rank.
        rows: rows that they took.
        tap: sees every call's inputs; None for none.
    """

    def __init__(self, kernel: Kernel, dtype: torch.dtype) -> None:
        self.kernel, self.dtype = kernel, dtype
        self.calls = 0
        self.rows = 0
        self.tap: Tap | None = None

    def start(self, x: Tensor, norm: Norm, readers: Sequence[Linear]) -> Feed:
        """Norm the embeddings [tokens, hidden]: no partial sums yet, so no kernel."""
        normed = rms_norm(x, norm.gamma, norm.eps, 0.0)
        quantised = bool(readers) and readers[0].quantised
        return Feed(normed, readers[0].quantise(normed) if quantised else None)

    def join(self, partial: Tensor, residual: Tensor, norm: Norm, readers: Sequence[Linear]) -> tuple[Feed, Tensor]:
        """Sum the ranks' partials, add the residual, norm, and quantise for the readers that share the first's codes.

        Returns:
            What the readers read, and the new residual [tokens, hidden].
        """
        scale, op = readers[0].input_scale if readers else None, self.choose_op(readers)
        if scale is None:
            scale = torch.ones(1, dtype=torch.float32, device=partial.device)
        inputs = RankInputs(partial.contiguous(), residual, norm.gamma, scale, norm.eps, 0.0)
        if self.tap is not None:
            self.tap(inputs)
        if isinstance(self.kernel, WatchedKernel):
            self.kernel.due = choose_op(readers)
        out = self.kernel.run(inputs, op=op, strategy=Strategy.AUTO)
        self.calls += 1
        self.rows += partial.shape[0]
        return Feed(out.norm, readers[0].received(out, op) if op.returns_quant else None), out.residual

    def choose_op(self, readers: Sequence[Linear]) -> Operation:
        """Say what the kernel must return for these readers."""
        return choose_op(readers)

    def read(self, feed: Feed, linear: Linear) -> Tensor:
        """Apply a reader to what its norm handed on."""
        if not linear.quantised:
            assert feed.norm is not None
            return linear.from_native(feed.norm)
        if feed.codes is not None and feed.codes.key == linear.key:
            return linear.from_codes(feed.codes)
        assert feed.norm is not None
        return self.apply(feed.norm, linear)

    def apply(self, x: Tensor, linear: Linear) -> Tensor:
        """Quantise [tokens, in] where the linear wants codes, and apply it."""
        return linear.from_codes(linear.quantise(x)) if linear.quantised else linear.from_native(x)


class OraclePath:
    """The same weights in float32 with FP8 off: what both arms are measured against."""

    dtype = torch.float32

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.calls = 0
        self.rows = 0

    def start(self, x: Tensor, norm: Norm, readers: Sequence[Linear]) -> Feed:
        """Norm the embeddings."""
        del readers
        return Feed(rms_norm(x, norm.gamma, norm.eps, 0.0))

    def join(self, partial: Tensor, residual: Tensor, norm: Norm, readers: Sequence[Linear]) -> tuple[Feed, Tensor]:
        """Sum the ranks' partials, add the residual and norm, all in float32."""
        total = sum_over_ranks(partial, self.rank) + residual
        return self.start(total, norm, readers), total

    def read(self, feed: Feed, linear: Linear) -> Tensor:
        """Apply a reader to the normed activations."""
        assert feed.norm is not None
        return linear.from_wide(feed.norm)

    def apply(self, x: Tensor, linear: Linear) -> Tensor:
        """Apply a linear to [tokens, in]."""
        return linear.from_wide(x)


def choose_op(readers: Sequence[Linear]) -> Operation:
    """Ask the kernel for codes where the first reader takes them, and for the norm where any reader needs it."""
    if not readers or readers[0].form is None:
        return Operation.RESIDUAL_RMS_NORM
    differ = any(reader.key != readers[0].key for reader in readers)
    return operation(readers[0].form, norm_out=differ)


def operation(form: Form, *, norm_out: bool) -> Operation:
    """What a kernel is asked for where activations of this form follow; with the norm beside the codes or without."""
    name = compose(Collective.ALL_REDUCE, residual=True, quantiser=form.activations, norm_out=norm_out).name
    return Operation.named(name)
