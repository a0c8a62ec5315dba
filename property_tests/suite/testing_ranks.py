"""Ranks that hold a call as a user's test does, and judge it by `fusecheck.testing`; what they raise comes back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fusecheck.dataflow import DATAFLOWS
from fusecheck.interface import Rank
from fusecheck.quantflow import QuantFlow
from fusecheck.quantisers.known import quantiser
from fusecheck.quantisers.layouts import DATA
from fusecheck.testing import assert_conforms, assert_same_on_ranks
from fusecheck.testing.ranks import Ranks

TOKENS, HIDDEN, SCALE, EPS = 6, 256, 0.02, 1e-6


def fused(partials: list[Tensor], residual: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Residual, norm and codes as a kernel with float32 sums computes them."""
    total = partials[0].float()
    for partial in partials[1:]:
        total = total + partial.float()
    stream = total.to(residual.dtype) + residual
    wide = stream.float()
    norm = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * gamma.float()).to(residual.dtype)
    return stream, norm, (norm.float() * (1 / torch.tensor(SCALE))).clamp(-448, 448).to(torch.float8_e4m3fn)


def operands(rank: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's addend, the residual and the weight; the last two are equal on all ranks."""
    shared = torch.Generator().manual_seed(1)
    own = torch.Generator().manual_seed(2 + rank)
    partial = torch.randn(TOKENS, HIDDEN, generator=own).to(dtype)
    residual = torch.randn(TOKENS, HIDDEN, generator=shared).to(dtype)
    return partial, residual, torch.rand(HIDDEN, generator=shared).to(dtype)


def right_call(ranks: int = 4) -> dict[str, Any]:
    """What `conforms` takes of a right call, all of whose tensors one process holds."""
    partials = [operands(rank)[0] for rank in range(ranks)]
    _, residual_in, gamma = operands(0)
    residual, norm, quant = fused(partials, residual_in, gamma)
    made = {"residual": residual, "norm": norm, "quant": quant, "partials": partials, "residual_in": residual_in}
    return made | {"gamma": gamma, "scale": SCALE, "eps": EPS}


def quantised(name: str, flow: QuantFlow, norm: Tensor) -> tuple[Tensor, Tensor | float]:
    """Codes and scales as a kernel stores them."""
    made, given = quantiser(name), SCALE if name == "static-fp8" else 1.0
    scales = made.scales(norm, flow, given)
    codes = made.element.pack(made.codes(norm, scales, flow, given))
    if name == "static-fp8":
        return codes, given
    layout = made.layout(norm.shape[0], norm.shape[1], flow)
    stored = layout.allocate(0)
    layout.write(scales, stored)
    return codes, stored


class TestingRank:
    """One rank of a user's test."""

    __test__ = False

    def __init__(self, rank: Rank) -> None:
        self.rank = rank

    def judge(self, spoil: str = "", on: int = 1, dataflow: str | None = None) -> str:
        """A right call, or one in which rank `on` spoils something; what `assert_conforms` said or raised."""
        mine = self.rank.index == on
        partials = [operands(rank)[0] for rank in range(self.rank.world_size)]
        partial, residual_in, gamma = operands(self.rank.index)
        residual, norm, quant = fused(partials, residual_in, gamma)
        arguments: dict[str, Any] = {"residual_in": residual_in, "gamma": gamma, "scale": SCALE, "eps": EPS}
        if (spoil == "code" and mine) or spoil == "code everywhere":
            quant.view(torch.uint8)[3, 5] ^= 1
        elif spoil == "gamma" and mine:
            arguments["gamma"] = gamma * 2
        elif spoil == "eps" and mine:
            arguments["eps"] = 1e-5
        elif spoil == "dataflow" and mine:
            dataflow = "trtllm-fp32"
        elif spoil == "shape" and mine:
            partial = partial[:-1]
        elif spoil == "dtype" and mine:
            partial = partial.double()
        elif spoil == "output" and mine:
            return self._said((residual, None, quant), partial, arguments, dataflow)
        return self._said((residual, norm, quant), partial, arguments, dataflow)

    def judge_padded(self, dataflow: str, short: int = -1) -> str:
        """A call whose scales are right, padded with the rank's number; of rank `short` one is missing."""
        partials = [operands(rank)[0] for rank in range(self.rank.world_size)]
        _, residual_in, gamma = operands(self.rank.index)
        residual, norm, _ = fused(partials, residual_in, gamma)
        flow = DATAFLOWS[dataflow].quant("mxfp8")
        codes, stored = quantised("mxfp8", flow, norm)
        assert isinstance(stored, Tensor)
        layout = quantiser("mxfp8").layout(TOKENS, HIDDEN, flow)
        layout.slots(stored)[layout.classes() != DATA] = self.rank.index
        arguments: dict[str, Any] = {"residual_in": residual_in, "gamma": gamma, "eps": EPS, "quantiser": "mxfp8"}
        outputs = residual, norm, codes, stored[1:] if self.rank.index == short else stored
        return self._said(outputs, partials[self.rank.index], arguments, dataflow)

    def collectives(self) -> str:
        """The collective calls of one judgement."""
        called: list[str] = []

        def noting(name: str) -> Callable[..., Any]:
            real = getattr(torch.distributed, name)

            def call(*arguments: Any, **options: Any) -> Any:
                called.append(name)
                return real(*arguments, **options)

            return call

        with ExitStack() as stack:
            for name in ("all_gather", "all_gather_object", "all_gather_into_tensor"):
                stack.enter_context(mock.patch.object(torch.distributed, name, noting(name)))
            self.judge(dataflow="trtllm-fp32")
        return ", ".join(called)

    def lengths(self, sizes: list[int]) -> str:
        """Whether messages arrive as they were sent, each rank's of another of these lengths."""
        for turn in range(len(sizes)):
            sent = ["x" * sizes[(turn + rank) % len(sizes)] for rank in range(self.rank.world_size)]
            if Ranks(self.rank.group).exchange(sent[self.rank.index]) != sent:
                return f"turn {turn} differs"
        return "as sent"

    def same(self, differs: bool, absent: int = -1) -> str:
        """A tensor that is equal on all ranks, or not, and that rank `absent` has not."""
        tensor = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
        if differs and self.rank.index == 1:
            tensor[1, 2] = 9
        try:
            assert_same_on_ranks(self.rank.group, sums=None if self.rank.index == absent else tensor)  # type: ignore[arg-type]
        except (AssertionError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "same"

    def _said(
        self, outputs: tuple[Tensor | None, ...], partial: Tensor, arguments: dict[str, Any], dataflow: str | None
    ) -> str:
        try:
            found = assert_conforms(*outputs, partials=partial, group=self.rank.group, dataflow=dataflow, **arguments)
        except (AssertionError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return str(found)
