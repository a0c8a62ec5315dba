"""Codes and their scales in a graph, of every quantiser that makes its own scales: what is stored, and what it means.

All arithmetic is the quantisers' own, under the active backend's declaration. Scales are one tensor for all rows that
the quantiser reads, in their layout; so they stay as they are where a view moves rows but splits none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fusecheck.dataflow import Dataflow
from fusecheck.quantflow import QuantFlow
from fusecheck.quantisers.known import quantiser
from fusecheck.quantisers.layouts import Layout
from fusecheck.quantisers.quantiser import Quantiser


@dataclass(frozen=True)
class Form:
    """How codes and scales are stored, as an operator's arguments say it.

    Attributes:
        name: of the quantiser.
        layout: of the scales; empty: the quantiser's first.
    """

    name: str
    layout: str = ""

    @property
    def quantiser(self) -> Quantiser:
        """The quantiser itself.

        Raises:
            UsageError: there is none of this name.
        """
        return quantiser(self.name)

    @property
    def named(self) -> str:
        """The layout's name.

        Raises:
            UsageError: there is no quantiser of this name.
        """
        return self.layout or self.quantiser.layouts[0]

    def scales(self, tokens: int, hidden: int, flow: QuantFlow = QuantFlow()) -> Layout:  # noqa: B008
        """Where the scales of `tokens` rows lie.

        Raises:
            UsageError: the group does not divide the row, or the quantiser has no such layout.
        """
        return self.quantiser.layout(tokens, hidden, flow, self.layout or None)

    def width(self, hidden: int) -> int:
        """Elements of a row of stored codes."""
        return hidden // self.quantiser.element.per_byte

    @property
    def dtype(self) -> torch.dtype:
        """Of stored codes."""
        return torch.float8_e4m3fn if self.quantiser.element.per_byte == 1 else torch.uint8

    def like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Empty codes and scales of a tensor [..., hidden]; on fakes, their forms."""
        hidden, tokens = x.shape[-1], 1
        for size in x.shape[:-1]:
            tokens = tokens * size
        layout = self.scales(tokens, hidden)
        codes = x.new_empty((*x.shape[:-1], self.width(hidden)), dtype=self.dtype)
        return codes, x.new_empty_strided(layout.shape, layout.strides, dtype=layout.dtype)


def given_value(scale: Tensor | None) -> float:
    """The factor of the tensor as a number; 1 where the quantiser takes none."""
    return 1.0 if scale is None else float(scale)


def quantise(x: Tensor, scale: Tensor | None, form: Form, dataflow: Dataflow) -> tuple[Tensor, Tensor]:
    """Codes and scales as they are stored.

    Args:
        x: [..., hidden], bf16 or fp16.
        scale: NVFP4's factor of the tensor, one float32.
        form: the quantiser, and the layout of its scales.
        dataflow: how the separate kernel computes.

    Returns:
        codes [..., hidden], two a byte where they have four bits; scales of all rows in their layout.
    """
    flow, made, given = dataflow.quant(form.name), form.quantiser, given_value(scale)
    rows = x.reshape(-1, x.shape[-1])
    scales = made.scales(rows, flow, given)
    codes = made.element.pack(made.codes(rows, scales, flow, given))
    layout = form.scales(len(rows), rows.shape[1], flow)
    stored = layout.allocate(0, x.device)
    layout.write(scales, stored)
    return codes.reshape(*x.shape[:-1], -1).view(form.dtype), stored


def copied(stored: Tensor, layout: Layout) -> Tensor:
    """A fresh copy of a tensor of scales, padding included."""
    fresh = layout.allocate(0, stored.device)
    layout.slots(fresh).copy_(layout.slots(stored))
    return fresh


def linear(
    operand: tuple[Tensor, Tensor, Tensor | None],
    weight: tuple[Tensor, Tensor, Tensor | None],
    bias: Tensor | None,
    form: Form,
    dataflow: Dataflow,
    dtype: torch.dtype,
) -> Tensor:
    """Linear layer on codes: exact products within a group, then both scales, then the groups' sum, one rounding.

    Args:
        operand: codes [..., in], scales, factor of the tensor.
        weight: the same of [out, in].
        bias: [out] or None.
        form: of both.
        dataflow: what its quantisers' scales stand for.
        dtype: of the result, [..., out].
    """
    rows, row_scales = _decoded(operand, form, dataflow)
    columns, column_scales = _decoded(weight, form, dataflow)
    products = torch.bmm(rows, columns.transpose(1, 2))  # [groups, rows, out], exact
    total = (products * row_scales[:, :, None] * column_scales[:, None, :]).sum(0)
    total = total.reshape(*operand[0].shape[:-1], -1)
    return (total if bias is None else total + bias.to(torch.float64)).to(dtype)


def _decoded(stored: tuple[Tensor, Tensor, Tensor | None], form: Form, dataflow: Dataflow) -> tuple[Tensor, Tensor]:
    """Values of codes [groups, rows, size] and of scales [groups, rows], float64."""
    codes, scales, scale = stored
    flow, made = dataflow.quant(form.name), form.quantiser
    values = made.element.decode(made.element.unpack(codes)).flatten(0, -2)
    layout = form.scales(len(values), values.shape[1], flow)
    steps = made.values(layout.read(scales), flow).to(torch.float64)
    factor = given_value(scale)
    steps = steps / factor if flow.given == "multiplies" else steps * factor
    grouped = values.reshape(len(values), steps.shape[-1], -1)
    return grouped.transpose(0, 1), steps.transpose(0, 1)


@lru_cache(maxsize=64)
def exact(form: Form, dataflow: Dataflow) -> bool:
    """Whether a fused kernel's scales and codes are bit for bit those of a separate quantise of the returned norm."""
    flow = dataflow.quant(form.name)
    return (
        flow.reads == "rounded"
        and flow.scale_rule in ("given", "divide", "multiply")
        and flow.code_rule in ("divide", "reciprocal")
        and flow.codes_from == "scale"
    )
